"""Parallelism applied to a model from outside, and the gradients that come of it.

Losses are sums over tokens, so gradients are summed over the ranks that hold different tokens, never averaged: ranks
with more targets then count for more, as they should.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket

from lalia.model.transformer import Transformer
from lalia.training.parallel.layout import check_model
from lalia.training.parallel.state import is_divided, local, release
from lalia.training.parallel.world import World

if TYPE_CHECKING:
    from torch.distributed.tensor import Shard

BUCKET_BYTES = 25 * 2**20
"""Gradients that one message carries."""


def parallelize(model: Transformer, world: World) -> None:
    """Apply the world's layout to a model whose weights are the same on every rank, in place.

    Before the optimizers are made: afterwards parameters are others, some of them DTensors.

    Raises:
        UserError: if the model does not divide as the layout asks.
    """
    layout = world.layout
    check_model(layout, model.config)
    if layout.expert > 1:
        from lalia.training.parallel.experts import apply_experts

        apply_experts(model, world)
    if layout.tensor > 1:
        from lalia.training.parallel.tensor import apply_tensor

        apply_tensor(model, world)
    if layout.context > 1:
        from lalia.training.parallel.context import apply_context

        apply_context(model, world)
    if world.tokens is not None and not _is_plain(world):
        _shard(model, world)


def _is_plain(world: World) -> bool:
    """Whether every rank holds the whole model."""
    layout = world.layout
    return layout.shard == layout.tensor == layout.expert == 1


def _shard(model: Transformer, world: World) -> None:
    """FSDP2 (Zhao et al. 2023): each layer's weights are gathered while it computes, then let go.

    What is outside the layers is gathered from the beginning of forward to the end of backward, since the loss reads
    the head's weight behind the model's forward pass.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.tensor import Shard

    assert world.weights is not None
    # Along a replicate axis of one, gradients would be sent to nobody.
    mesh = world.weights["shard"] if world.layout.replicate == 1 else world.weights["replicate", "shard"]
    kept_whole = set(_left_to_sync(model))
    by_columns = {p for name, p in model.named_parameters() if name.endswith(_DIVIDED_BY_COLUMNS)}

    def placement(parameter: nn.Parameter) -> "Shard":
        return Shard(1) if parameter in by_columns else Shard(0)

    for module in (*model.layers, model):
        fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=module is not model,
            shard_placement_fn=placement,
            ignored_params=kept_whole,
        )
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    # A forward pass without a backward pass leaves the outer weights gathered, of which the optimizer knows nothing.
    model.register_forward_pre_hook(lambda module, _: release(module), prepend=True)


_DIVIDED_BY_COLUMNS = ("attention.qkv.weight", "feed_forward.up.weight", "feed_forward.router")
"""Their rows are pieces of different sizes, which tensor-parallel ranks divide, or the few of a router."""


def _left_to_sync(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that FSDP leaves alone: of experts, of which other ranks have others, and biases of divided rows."""
    return [p for name, p in model.named_parameters() if _is_expert(p) or name.endswith(_WHOLE)]


_WHOLE = ("attention.qkv.bias", "feed_forward.up.bias")


def _is_expert(parameter: Tensor) -> bool:
    return is_divided(parameter) and "expert" in (parameter.device_mesh.mesh_dim_names or ())


class GradientSync:
    """Sums gradients over the ranks that hold different tokens, in the last micro-batch of a step.

        sync = GradientSync(LossModule(model, objective), world)
        for number, part in enumerate(parts):
            with sync(last=number == len(parts) - 1):
                loss, weight = sync.module(part)
                loss.backward()

    Where weights are divided by FSDP, so are gradients, after every micro-batch; what is left to do in the last is the
    sum over the replicas. Gradients of whole layers would otherwise stay in memory on every rank.

    Args:
        module: computes the loss of a batch; contains the model as `parallelize` left it, and no other parameters.
    """

    def __init__(self, module: nn.Module, world: World) -> None:
        self.module: nn.Module = module
        """To be called in place of the one given."""
        self._world = world
        self._fsdp: Any = None
        self._rest: list[nn.Parameter] = []
        if world.tokens is None:
            return
        if _is_plain(world):
            self.module = nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)
            self.module.register_comm_hook(None, _sum_bucket)
        else:
            self._fsdp = next(m for m in module.modules() if isinstance(m, Transformer))
            self._rest = _left_to_sync(module)

    @contextmanager
    def __call__(self, last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch."""
        if self._fsdp is not None:
            self._fsdp.set_requires_all_reduce(last)
            yield
            if last:
                self._sum_rest()
        elif not last and self.module is not None and isinstance(self.module, nn.parallel.DistributedDataParallel):
            with self.module.no_sync():
                yield
        else:
            yield

    @torch.no_grad()
    def _sum_rest(self) -> None:
        """The gradients of parameters that FSDP leaves alone, each over the ranks that hold the same weights."""
        gradients: dict[dist.ProcessGroup, list[Tensor]] = defaultdict(list)
        for parameter in self._rest:
            if parameter.grad is None:  # no token chose one of this rank's experts
                parameter.grad = torch.zeros_like(parameter)
            group = self._world.tokens
            if _is_expert(parameter):
                assert self._world.experts is not None
                group = self._world.experts["copies"].get_group()
            assert group is not None
            gradients[group].append(local(parameter.grad))
        for group, tensors in gradients.items():
            if group.size() > 1:
                for bucket in _buckets(tensors):
                    flat = torch.cat([tensor.flatten() for tensor in bucket])
                    dist.all_reduce(flat, group=group)
                    for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                        tensor.copy_(part.view_as(tensor))


def _sum_bucket(state: None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's way of reducing a bucket, without its division by the number of ranks."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.nbytes > BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


@torch.no_grad()
def gradient_norm(model: nn.Module, world: World) -> Tensor:
    """Root of the sum of squares of the whole model's gradients, every element counted once, whatever the layout.

    Returns:
        float32 scalar on the device, the same on every rank; nothing waits for it.
    """
    by_groups: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = defaultdict(list)
    for parameter in model.parameters():
        if parameter.grad is not None:
            by_groups[_groups(parameter.grad)].append(local(parameter.grad).float())
    if list(by_groups) == [()]:  # without rounding once more
        return nn.utils.get_total_norm(by_groups[()])
    total = torch.zeros((), device=world.device)
    # Every rank has the same groups of parameters, in the order of the parameters.
    for groups, gradients in by_groups.items():
        squares = nn.utils.get_total_norm(gradients).square()
        for group in groups:
            dist.all_reduce(squares, group=group)
        total += squares
    return total.sqrt()


def _groups(gradient: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The ranks among which the elements of a gradient are divided, axis by axis."""
    if not is_divided(gradient):
        return ()
    mesh = gradient.device_mesh
    axes = [axis for axis, placement in enumerate(gradient.placements) if not placement.is_replicate()]
    return tuple(mesh.get_group(axis) for axis in axes if mesh.size(axis) > 1)
