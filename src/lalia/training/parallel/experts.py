"""Expert parallelism: every rank of a group holds some of the experts, and rows travel to the ranks of theirs.

Lepikhin et al. 2020 (GShard): the ranks of a group have rows of their own. Each sorts its rows by expert, sends to
every other rank those of that rank's experts, computes what it received, and sends the results back; backward the
gradients take the same ways. Nothing is dropped, nothing padded: a rank computes as many rows as were sent to it.

All ranks of a group must take part in every forward and backward pass of the model, in evaluation too, and in the same
order: a rank alone would wait for the others' rows.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from lalia.model.experts import MixtureOfExperts, inverse
from lalia.model.transformer import Transformer
from lalia.training.parallel.state import local
from lalia.training.parallel.world import World


def apply_experts(model: Transformer, world: World) -> None:
    """Divide the experts' weights among the ranks of a group, in place; they must be the same on every rank.

    `up` and `down` become DTensors over `World.experts`, Shard(0) along "expert" and Replicate() along "copies". A
    rank's gradients are those of all rows of its group; the sum along "copies" is GradientSync's. `layout.misfits`
    must agree.
    """
    size = world.layout.expert
    mixtures = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
    assert world.experts is not None
    rank, group = world.experts.get_local_rank("expert"), world.experts.get_group("expert")
    for module in mixtures:
        for name in ("up", "down"):
            share = getattr(module, name).detach().chunk(size)[rank].clone()
            divided = DTensor.from_local(share, world.experts, (Replicate(), Shard(0)), run_check=False)
            setattr(module, name, nn.Parameter(divided))
        module.exchange = lambda module, rows, counts: exchange(module, rows, counts, group)


def exchange(module: MixtureOfExperts, rows: Tensor, counts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`MixtureOfExperts.compute` by the ranks that hold the experts.

    Args:
        rows: (rows, hidden) of this rank, those of the first expert of all first.
        counts: (num_experts,) int64, rows of each expert.

    Returns:
        (rows, hidden)
    """
    ranks = group.size()
    counts = counts.view(ranks, -1)  # (ranks, experts of a rank)
    theirs = torch.empty_like(counts)  # rows that each rank has for the experts of this one
    dist.all_to_all_single(theirs, counts, group=group)
    sent, received = torch.stack((counts.sum(1), theirs.sum(1))).tolist()
    arrived = _AllToAll.apply(rows, received, sent, group)
    # They come rank by rank, and of each rank expert by expert.
    experts = torch.arange(theirs.shape[1], device=rows.device).repeat(ranks)
    order = experts.repeat_interleave(theirs.view(-1), output_size=sum(received)).argsort(stable=True)
    up, down = local(module.up), local(module.down)
    computed = module.compute(arrived.index_select(0, order), theirs.sum(0), up, down)
    return _AllToAll.apply(computed.index_select(0, inverse(order)), sent, received, group)


class _AllToAll(torch.autograd.Function):
    """Rows to and from all ranks of a group, and their gradients the same way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> Tensor:
        """(sum of sent, hidden) -> (sum of received, hidden), rank by rank."""
        ctx.received, ctx.sent, ctx.group = received, sent, group
        return _all_to_all(rows, received, sent, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _all_to_all(grad, ctx.sent, ctx.received, ctx.group), None, None, None


def _all_to_all(rows: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> Tensor:
    result = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(result, rows.contiguous(), received, sent, group=group)
    return result
