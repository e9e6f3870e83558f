"""Checkpoints of several processes: any layout loads what any other saved, and they agree about damage."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from lalia.errors import UserError
from lalia.training import checkpoints as module
from lalia.training.checkpoint_files import Part
from lalia.training.checkpoints import Checkpoints, read_model
from lalia.training.parallel.world import ParallelConfig, World, start
from tests.training.parallel.ranks import run
from tests.training.test_checkpoints import Said, folders

Placements = dict[str, tuple[Any, ...]]


def whole(seed: int) -> dict[str, Tensor]:
    """What every layout is to hold. Seven rows do not divide by 2 or 4, and three are fewer than four processes."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.a": (7, 6), "model.b": (3, 2), "model.c": (8, 4, 2), "model.norm": (5,), "optimizer.step": ()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


LAYOUTS: dict[str, tuple[int, tuple[int, ...], Placements]] = {
    "one": (1, (), {}),
    "sharded over 2": (2, (2,), {"model.a": (Shard(0),), "model.b": (Shard(0),), "model.c": (Shard(1),)}),
    "copies on 2": (2, (2,), {}),
    "sharded twice over 4": (
        4,
        (2, 2),
        {
            "model.a": (Shard(0), Shard(1)),
            "model.b": (Shard(0), Shard(0)),
            "model.c": (Replicate(), Shard(2)),
            "model.norm": (Shard(0), Replicate()),
        },
    ),
}
"""Number of processes, shape of the mesh, and how each tensor lies on it; those left out are whole everywhere."""


def laid_out(layout: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
    _, shape, placements = LAYOUTS[layout]
    if not shape:
        return {name: value.clone() for name, value in values.items()}
    mesh = init_device_mesh("cpu", shape)
    return {
        name: distribute_tensor(value, mesh, placements[name]) if name in placements else value.clone()
        for name, value in values.items()
    }


def world() -> World:
    return start(ParallelConfig())


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def difference(tensors: dict[str, Tensor], values: dict[str, Tensor]) -> float:
    return max(float((full(tensors[name]) - value).abs().max()) for name, value in values.items())


def load_then_save(layout: str, folder: str, expected: int | None, step: int) -> tuple[float, float, Any]:
    """Load what another layout saved with seed `expected`, and save a state of seed `step` for the next."""
    checkpoints = Checkpoints(Path(folder), "run", world(), Said())
    tensors = laid_out(layout, {name: torch.zeros_like(value) for name, value in whole(0).items()})
    loaded = checkpoints.load(tensors)
    right = difference(tensors, whole(expected)) if expected else 0.0
    wrong = difference(tensors, whole(step))
    checkpoints.save(step, laid_out(layout, whole(step)), {"step": step})
    checkpoints.wait()
    return right, wrong, loaded


def test_any_layout_loads_any_other(tmp_path: Path) -> None:
    """1 -> 2 -> 4 -> 2 (copies) -> 1 processes, each on another mesh."""
    before = None
    order = ("one", "sharded over 2", "sharded twice over 4", "copies on 2", "one")
    for step, layout in enumerate(order, start=1):
        size = LAYOUTS[layout][0]
        results = run(load_then_save, size, layout, str(tmp_path), before, step)
        for right, wrong, loaded in results:
            assert loaded == (None if before is None else (before, {"step": before}))
            assert right == 0.0
            assert wrong > 0.1  # the comparison sees another state
        weights = read_model(tmp_path / f"step-{step:08d}")
        assert difference(weights, {name[6:]: v for name, v in whole(step).items() if name.startswith("model.")}) == 0.0
        before = step


def sharded_model(folder: str) -> tuple[float, list[str], list[int]]:
    """Rows divided twice, among tensor-parallel neighbours and then by FSDP2, which come back in another order."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False))
    expected = model.state_dict()["0.weight"].clone()
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel()})
    fully_shard(model, mesh=mesh["shard"])
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    checkpoints = Checkpoints(Path(folder), "run", world(), Said())
    checkpoints.save(1, tensors, {})
    checkpoints.wait()
    again = {"model.0.weight": torch.zeros(8, 6)}
    dcp_load(again, storage_reader=HuggingFaceStorageReader(folder + "/step-00000001"))
    assert torch.equal(again["model.0.weight"], expected)  # torch's reader agrees about which rows are whose
    with torch.no_grad():
        for value in tensors.values():
            value.zero_()
    checkpoints.load(tensors)
    sizes = [Part.of(value).local.numel() for value in tensors.values()]
    return difference(tensors, {"model.0.weight": expected}), folders(Path(folder, "step-00000001")), sizes


def test_tensor_parallel_and_fsdp_together(tmp_path: Path) -> None:
    for difference_, files, sizes in run(sharded_model, 4, str(tmp_path)):
        assert difference_ == 0.0
        assert files == ["checkpoint.json", *(f"part-{rank:05d}.safetensors" for rank in range(4))]
        assert sizes == [12]


def several(folder: str) -> dict[str, Any]:
    """What two processes see of copies, parts, damage, a full disk and another model."""
    rank, path = dist.get_rank(), Path(folder)
    said = Said()
    checkpoints = Checkpoints(path, "run", world(), said)
    saw: dict[str, Any] = {}

    def state(step: int) -> dict[str, Tensor | Part]:
        rows = torch.full((2 + rank, 2), float(step))  # 2 rows of 5 here, 3 there: no DTensor is cut like this
        copies: dict[str, Tensor | Part] = {f"model.{name}": torch.full((100,), float(step)) for name in "ab"}
        return copies | {"model.stack": Part(rows, (2 * rank, 0), (5, 2))}

    for step in (1, 2):
        checkpoints.save(step, state(step), {})
    checkpoints.wait()
    dist.barrier()
    saw["sizes"] = [file.stat().st_size for file in sorted(path.glob("step-00000001/*.safetensors"))]

    dist.barrier()
    write, failing = module.write_part_file, {1}

    def fails_on_one(file: Path, parts: dict[str, Part]) -> dict[str, Any]:
        if rank in failing:
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        return write(file, parts)

    module.write_part_file = fails_on_one
    checkpoints.save(3, state(3), {})
    try:
        checkpoints.save(4, state(4), {})
    except OSError as error:
        saw["full"] = (error.errno, str(error.filename))
    module.write_part_file = write
    dist.barrier()
    saw["after"] = folders(path)

    dist.barrier()
    if rank == 0:  # the file that the other process checks
        file = path / "step-00000002" / "part-00001.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    dist.barrier()
    tensors = state(0)
    saw["loaded"] = checkpoints.load(tensors)
    saw["values"] = [float(Part.of(value).local.sum()) for value in tensors.values()]
    saw["said"] = said.lines
    saw["left"] = folders(path)
    try:
        checkpoints.load({**tensors, "model.b": torch.zeros(100 + rank)})  # wrong in one process only
    except UserError as error:
        saw["refused"] = str(error)
    return saw


def test_processes_agree(tmp_path: Path) -> None:
    results = run(several, 2, str(tmp_path))
    for rank, saw in enumerate(results):
        assert len(saw["sizes"]) == 2 and max(saw["sizes"]) < 1.2 * min(saw["sizes"])  # each wrote one of the copies
        assert saw["full"] == (errno.ENOSPC, str(tmp_path / ".step-00000003.partial" / "part-00001.safetensors"))
        assert saw["after"] == ["step-00000001", "step-00000002"]
        assert saw["loaded"] == (1, {})
        assert saw["values"] == [100.0, 100.0, 2.0 * (2 + rank)]
        assert saw["left"] == ["step-00000001"]
        assert "its model.b has shape [100], this model's [101]" in saw["refused"]
    assert len(results[0]["said"]) == 1
    assert "the checksum of part-00001.safetensors does not match" in results[0]["said"][0]
    assert results[1]["said"] == []  # one process speaks for all
    weights = read_model(tmp_path / "step-00000001")
    assert weights["stack"].shape == (5, 2)


def missing_rows(folder: str) -> None:
    Checkpoints(Path(folder), "run", world(), Said()).save(1, {"a": Part(torch.zeros(2, 2), (0, 0), (4, 2))}, {})


def test_rows_that_nobody_holds_are_our_error(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="hold 4 values of a"):
        run(missing_rows, 2, str(tmp_path))
