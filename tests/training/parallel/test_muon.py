"""Muon on parts and copies of matrices in several processes: as in one process, each doing its share of the work."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from lalia.training import muon
from lalia.training.muon import Muon, orthogonalize
from lalia.training.parallel.state import local
from lalia.training.parallel.world import ParallelConfig, start
from tests.training.parallel.ranks import run

MATRICES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "qkv": ((16, 8), (8, 4, 4)),
    "qkv of another layer": ((16, 8), (8, 4, 4)),
    "output": ((8, 8), (8,)),
    "down": ((8, 12), (8,)),
    "experts": ((2, 12, 8), (6, 6, 6, 6)),
}
"""Shapes of parameters, and the heights of the matrices in them; wide, square and tall ones, odd and even counts."""

DIVIDED = {"qkv": (1, 0), "qkv of another layer": (1, 0), "output": (0, 1), "down": (0, 1), "experts": (0, None)}
"""Dimension of each that the axes `shard` and `tensor` divide; None: copies."""

LR, STEPS = 0.1, 3


def _tensors(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, (shape, _) in MATRICES.items()}


def _train(mesh: DeviceMesh | None, part: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
    """The parts of the weights here after some steps."""
    parameters = {name: nn.Parameter(part(name, tensor)) for name, tensor in _tensors(99).items()}
    pairs = [(parameter, MATRICES[name][1]) for name, parameter in parameters.items()]
    optimizer = Muon(pairs, LR, weight_decay=0.1, mesh=mesh)
    for step in range(STEPS):
        for name, tensor in _tensors(step).items():
            parameters[name].grad = part(name, tensor)
        optimizer.step(torch.ones(()))
    return {name: local(parameter.detach()) for name, parameter in parameters.items()}


def _largest_differences(layouts: list[ParallelConfig]) -> list[tuple[dict[str, float], int]]:
    """From the parts of what one process makes, by parameter; and how many numbers were orthogonalized here."""
    return [_compare(layout) for layout in layouts]


def _compare(layout: ParallelConfig) -> tuple[dict[str, float], int]:
    world = start(layout)
    assert world.weights is not None
    mesh = world.weights["shard", "tensor"]

    def part(name: str, tensor: Tensor) -> Tensor:
        placements: list[Placement] = []
        for axis, dim in zip(("shard", "tensor"), DIVIDED[name], strict=True):
            if dim is None or mesh[axis].size() == 1:
                placements.append(Replicate())
                continue
            # An axis that divides the rows divides those of each piece.
            pieces = tensor.split(MATRICES[name][1]) if dim == 0 and tensor.ndim == 2 else (tensor,)
            tensor = torch.cat(
                [piece.chunk(mesh[axis].size(), dim)[mesh[axis].get_local_rank()] for piece in pieces], dim
            )
            placements.append(Shard(dim))
        if all(placement.is_replicate() for placement in placements):
            return tensor
        return DTensor.from_local(tensor.contiguous(), mesh, placements, run_check=False)

    numbers: list[int] = []

    def counting(matrices: Tensor, *args: Any) -> Tensor:
        numbers.append(matrices.numel())
        return orthogonalize(matrices, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muon, "orthogonalize", counting)
        ours = _train(world.weights, part)
    expected = _train(None, lambda _, tensor: tensor)
    return {name: float((ours[name] - local(part(name, expected[name]))).abs().max()) for name in ours}, sum(numbers)


LAYOUTS = {
    2: [ParallelConfig(replicate=2), ParallelConfig(shard=2), ParallelConfig(tensor=2)],
    4: [ParallelConfig(shard=2, tensor=2), ParallelConfig(replicate=2, shard=2)],
}


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_as_in_one_process(size: int) -> None:
    whole = STEPS * sum(torch.Size(shape).numel() for shape, _ in MATRICES.values())
    for layout, *results in zip(LAYOUTS[size], *run(_largest_differences, size, LAYOUTS[size]), strict=True):
        for differences, numbers in results:
            assert max(differences.values()) < 1e-5, (layout, differences)
            assert numbers < 0.7 * whole, layout  # nobody does the work of all


def test_parts_by_themselves_differ() -> None:
    """Negative control: the directions of halves are not halves of the direction."""
    gradient = _tensors(0)["output"]
    halves = torch.cat([orthogonalize(half.T[None], torch.float32)[0].T for half in gradient.chunk(2)])
    assert (halves - orthogonalize(gradient[None], torch.float32)[0]).abs().max() > 0.1
