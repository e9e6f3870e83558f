"""Tensor parallelism: every rank of a group computes with some heads and feed-forward units, on the same tokens.

Shoeybi et al. 2019 (Megatron-LM): query, key, value, gate and up are divided by rows, and what multiplies their results
by columns, so that each layer exchanges activations twice forward and twice backward. The residual stream, norms,
embedding and head are the same on all ranks of the group and computed by each; dividing the vocabulary would save
memory and time of the head, and need a loss that knows of it.
"""

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from lalia.model.config import ModelConfig
from lalia.model.experts import Linear
from lalia.model.functions import linear
from lalia.model.transformer import Attention, Norm, Transformer
from lalia.training.parallel.state import local, stacked_heights
from lalia.training.parallel.world import World


def apply_tensor(model: Transformer, world: World) -> None:
    """Divide the layers' matrices among the ranks of a tensor-parallel group, in place; `layout.misfits` must agree."""
    assert world.weights is not None
    mesh = world.weights["tensor"]
    config = model.config
    share = config.model_copy(
        update={
            "num_attention_heads": config.num_attention_heads // mesh.size(),
            "num_key_value_heads": config.num_key_value_heads // mesh.size(),
        }
    )
    for number, layer in enumerate(model.layers):
        where = f"layers.{number}"
        plan: dict[str, ParallelStyle] = {
            "attention.qkv": _Rows(config, f"{where}.attention.qkv"),
            "attention.output": _Columns(),
            "feed_forward.up": _Rows(config, f"{where}.feed_forward.up"),
            "feed_forward.down": _Columns(),
        }
        if config.qk_norm != "none":
            plan |= {"attention.query_norm": _OfEveryHead(), "attention.key_norm": _OfEveryHead()}
        parallelize_module(layer, mesh, plan)
        attention = layer.get_submodule("attention")
        assert isinstance(attention, Attention)
        attention.config = share  # it counts its own heads


class _Rows(ParallelStyle):
    """Each rank multiplies by its rows of every piece, which gives its share of each piece's results."""

    def __init__(self, config: ModelConfig, name: str) -> None:
        self.config, self.name = config, name

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, Linear)
        rank, size = device_mesh.get_local_rank(), device_mesh.size()
        for name, parameter in list(module.named_parameters()):
            heights = stacked_heights(self.config, f"{self.name}.{name}") or (parameter.shape[0],)
            shares = [piece.chunk(size)[rank] for piece in parameter.detach().split(heights)]
            setattr(module, name, _divided(torch.cat(shares), device_mesh, 0))

        def forward(x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features / ranks)
            bias = None if module.bias is None else local(module.bias)
            return linear(_same(x, device_mesh), local(module.weight), bias)

        module.forward = forward
        return module


class _Columns(ParallelStyle):
    """Each rank multiplies its share of the inputs by its columns; the sum over the ranks is the result."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, Linear)
        share = module.weight.detach().chunk(device_mesh.size(), 1)[device_mesh.get_local_rank()]
        module.weight = _divided(share.contiguous(), device_mesh, 1)

        def forward(x: Tensor) -> Tensor:  # (..., in_features / ranks) -> (..., out_features)
            y = _total(linear(x, local(module.weight)), device_mesh)
            return y if module.bias is None else y + module.bias.to(y.dtype)

        module.forward = forward
        return module


class _OfEveryHead(ParallelStyle):
    """A norm of single heads: its weight is the same on all ranks, and each computes the gradient of its own heads."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, Norm)

        def forward(x: Tensor) -> Tensor:
            weight, bias = (None if p is None else _same(p, device_mesh) for p in (module.weight, module.bias))
            norm = SimpleNamespace(weight=weight, bias=bias, eps=module.eps, offset=module.offset, kind=module.kind)
            return Norm.forward(norm, x)  # pyright: ignore[reportArgumentType]

        module.forward = forward
        return module


def _divided(share: Tensor, mesh: DeviceMesh, dim: int) -> nn.Parameter:
    return nn.Parameter(DTensor.from_local(share, mesh, (Shard(dim),), run_check=False))


def _same(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """x, which all ranks hold; its gradient is the sum of theirs."""
    return DTensor.from_local(x, mesh, (Replicate(),), run_check=False).to_local(grad_placements=(Partial(),))


def _total(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of all ranks' x; each gets the gradient of the sum."""
    return DTensor.from_local(x, mesh, (Partial(),), run_check=False).redistribute(placements=(Replicate(),)).to_local()
