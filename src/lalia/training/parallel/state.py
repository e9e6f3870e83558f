"""Weights and optimizer state under names and shapes that are the same in every layout.

Query, key and value are stored as one matrix, gate and up as another. Where such a matrix is divided, every rank holds
rows of each piece, so that the whole of it has another order of rows than in one process; each piece for itself is
divided as usual. So pieces are what checkpoints hold:

    one process      q0 q1 | k0 k1 | v0 v1            pieces q0 q1, k0 k1, v0 v1
    two tensor ranks q0 k0 v0, q1 k1 v1               the same, each a DTensor, Shard(0)
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lalia.model.config import ModelConfig
from lalia.model.transformer import Transformer

if TYPE_CHECKING:  # the import takes half a second, which a process that is alone does not need to spend
    from torch.distributed.tensor import DTensor


def is_divided(tensor: Tensor) -> TypeGuard["DTensor"]:
    """Whether the tensor is a DTensor."""
    return hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds, in the same memory; all of an ordinary one."""
    return tensor.to_local() if is_divided(tensor) else tensor


def stacked_heights(config: ModelConfig, name: str) -> tuple[int, ...] | None:
    """Rows of the pieces that a parameter holds one above the other, in one process; None if it is one piece.

    Args:
        name: of the parameter in the model, for example layers.0.attention.qkv.weight.
    """
    if name.endswith(("attention.qkv.weight", "attention.qkv.bias")):
        return config.query_size, config.key_value_size, config.key_value_size
    if config.gated and name.endswith(("feed_forward.up.weight", "feed_forward.up.bias")):
        return config.intermediate_size, config.intermediate_size
    if config.gated and name.endswith("feed_forward.up"):  # (experts, rows, hidden_size)
        return (config.expert_size or config.intermediate_size,) * 2
    return None


def pieces(config: ModelConfig, name: str, tensor: Tensor) -> list[Tensor]:
    """The pieces of a parameter, or of a gradient or optimizer state of its shape, as views of its memory.

    Args:
        name: of the parameter in the model.
        tensor: (rows, ...), or (experts, rows, hidden_size); DTensor where the parameter is one.

    Returns:
        for each piece (height, ...), DTensors of regular placements if `tensor` is one.
    """
    heights = stacked_heights(config, name)
    if heights is None:
        return [tensor]
    dim = 1 if tensor.ndim == 3 else 0
    if not is_divided(tensor):
        return list(tensor.split(heights, dim))
    from torch.distributed.tensor import DTensor

    mesh, placements = tensor.device_mesh, tensor.placements
    shares = 1
    for size, placement in zip(mesh.shape, placements, strict=True):
        shares *= size if placement.is_shard(dim) else 1
    result: list[Tensor] = []
    parts = tensor.to_local().split([height // shares for height in heights], dim)
    for height, part in zip(heights, parts, strict=True):
        shape = torch.Size((*tensor.shape[:dim], height, *tensor.shape[dim + 1 :]))
        stride = torch.empty(shape, device="meta").stride()
        result.append(DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride))
    return result


@torch.no_grad()
def saved_state(model: Transformer, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Everything that a checkpoint holds of a model and its optimizers, to be written from or read into in place.

    Names are `model.NAME` and `optimizer.NAME.KEY`, NAME that of the parameter; a parameter of several pieces gives
    NAME/0, NAME/1 and so on. Shapes are those of one process, whatever the layout. An optimizer has to have created its
    state when it was made, from the parameters as `parallelize` left them.

    Returns:
        views of the weights and the state: ordinary tensors, the same on every rank, or DTensors.
    """
    gather_again(model)
    result: dict[str, Tensor] = {}

    def add(kind: str, name: str, tensor: Tensor, key: str = "") -> None:
        parts = pieces(model.config, name, tensor)
        for number, part in enumerate(parts):
            result[f"{kind}.{name}{f'/{number}' if len(parts) > 1 else ''}{key}"] = part

    names: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters():
        names[parameter] = name
        add("model", name, parameter.detach())
    for optimizer in optimizers:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            name, state = names[parameter], optimizer.state.get(parameter, {})
            assert state, f"the optimizer of {name} has no state yet; it has to create it when it is made"
            for key, value in state.items():
                if value.shape == parameter.shape:
                    add("optimizer", name, value, f".{key}")
                elif is_divided(parameter) and value.ndim and value.shape == local(parameter).shape:
                    add("optimizer", name, _like(parameter, value), f".{key}")
                else:  # a counter, or one per piece
                    result[f"optimizer.{name}.{key}"] = value
    return result


def _like(parameter: "DTensor", value: Tensor) -> Tensor:
    """A rank's part of some state, as a DTensor over the same ranks as the parameter."""
    from torch.distributed.tensor import DTensor

    mesh, placements = parameter.device_mesh, parameter.placements
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(value, mesh, placements, run_check=False, shape=shape, stride=stride)


@torch.no_grad()
def full_state(model: Transformer) -> dict[str, Tensor]:
    """The model's state_dict as in one process: ordinary tensors on the CPU, of the main process; empty on the others.

    All ranks call it. Parameters are gathered one after the other, so a device needs room for one of them only.
    """
    gather_again(model)
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    result: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensor = whole(model.config, name, parameter.detach())
        if is_main:
            result[name] = tensor.cpu()
    return result


def whole(config: ModelConfig, name: str, tensor: Tensor) -> Tensor:
    """A parameter, or something of its shape, as in one process; all ranks call it.

    Args:
        name: of the parameter in the model.
    """
    if not is_divided(tensor):
        return tensor
    parts = [part.full_tensor() for part in pieces(config, name, tensor) if is_divided(part)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1 if tensor.ndim == 3 else 0)


def gather_again(model: nn.Module) -> None:
    """Let go of weights that are still gathered after a forward pass without a backward pass (evaluation).

    The weights outside the layers stay gathered behind a forward pass, since the loss reads the head's. Until a
    backward pass lets go of them, parameters are the gathered ones, and changes to the divided ones go unnoticed.
    """
    if hasattr(model, "reshard"):
        model.reshard()  # pyright: ignore[reportCallIssue]
