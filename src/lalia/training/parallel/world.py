"""The processes that train together: who this one is, and how the devices are laid out."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lalia.errors import UserError
from lalia.settings import Settings

AXES = ("replicate", "shard", "context", "tensor")
"""Axes of the device mesh, the outermost first: neighbours in the last share a machine's fastest links."""


class ParallelConfig(Settings):
    """How many devices along each axis; their product is the number of processes."""

    replicate: int | None = Field(default=None, ge=1)
    """Copies of the model, each on rows of its own (data parallel); None means what the other axes leave."""
    shard: int = Field(default=1, ge=1)
    """Devices among which weights, gradients and optimizer state of one copy are divided, each on rows of its own."""
    context: int = Field(default=1, ge=1)
    """Devices among which every row's tokens are divided, for long sequences."""
    tensor: int = Field(default=1, ge=1)
    """Devices among which every layer's heads and feed-forward units are divided."""
    expert: int = Field(default=1, ge=1)
    """Devices among which the experts of a mixture are divided: neighbours among those with rows of their own."""


@dataclass(frozen=True)
class World:
    """This process among those that train together.

    Attributes:
        layout: devices along each axis, `replicate` resolved.
        device: where this process computes.
        mesh: over `AXES`; None where the process is alone.
        weights: over ("replicate", "shard", "tensor"), how weights are laid out: ranks that take parts of the same rows
            hold different tokens as well, so weights are divided among shard x context of them.
        experts: over ("copies", "expert"), how the weights of experts are laid out: those along "expert" hold different
            experts, those along "copies" the same ones, whose gradients are summed; None if experts are not divided.
    """

    layout: ParallelConfig
    device: torch.device
    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    weights: DeviceMesh | None = None
    experts: DeviceMesh | None = None

    @classmethod
    def alone(cls, device: torch.device | str = "cpu") -> "World":
        """One process, one device."""
        return cls(ParallelConfig(replicate=1), torch.device(device))

    @property
    def is_main(self) -> bool:
        """Whether this process writes what one process writes: logs, samples, the model folder."""
        return self.rank == 0

    @property
    def data_size(self) -> int:
        """Number of groups of processes that each take rows of their own."""
        assert self.layout.replicate is not None
        return self.layout.replicate * self.layout.shard

    @property
    def data_rank(self) -> int:
        """Which of those groups this process belongs to."""
        return self.rank // (self.layout.context * self.layout.tensor)

    @property
    def context_rank(self) -> int:
        """Which part of every row this process takes."""
        return self.rank // self.layout.tensor % self.layout.context

    @property
    def tokens(self) -> dist.ProcessGroup | None:
        """The processes that hold different tokens, along the first three axes; None if this is the only one."""
        if self.mesh is None or self.size == self.layout.tensor:
            return None
        return self.mesh[AXES[:3]]._flatten("tokens").get_group()

    def sum(self, value: Tensor) -> Tensor:
        """Sum over the processes that hold different tokens (in place); those of a tensor-parallel group agree."""
        if (group := self.tokens) is not None:
            dist.all_reduce(value, group=group)
        return value

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.mesh is not None:
            dist.barrier()


def start(config: ParallelConfig, timeout_seconds: float = 600.0) -> World:
    """Join the processes that torchrun (or whoever sets its environment variables) started; alone without it.

    Raises:
        UserError: if the layout does not fit the number of processes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    layout = resolve(config, size)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if size == 1:
        return World(layout, device)
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # Checkpoints and messages go between CPUs, beside what NCCL does.
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    assert layout.replicate is not None
    replicate, shard, context, tensor, expert = (
        layout.replicate,
        layout.shard,
        layout.context,
        layout.tensor,
        layout.expert,
    )
    mesh = init_device_mesh(device.type, (replicate, shard, context, tensor), mesh_dim_names=AXES)
    names = ("replicate", "shard", "tensor")
    weights = init_device_mesh(device.type, (replicate, shard * context, tensor), mesh_dim_names=names)
    experts = None
    if expert > 1:
        # Of every rank of a group of experts the others have other rows, but the same part of them.
        ranks = torch.arange(size).view(-1, expert, context).transpose(1, 2).reshape(-1, expert)
        experts = DeviceMesh(device.type, ranks, mesh_dim_names=("copies", "expert"))
    return World(layout, device, dist.get_rank(), size, mesh, weights, experts)


def resolve(config: ParallelConfig, size: int) -> ParallelConfig:
    """The layout with `replicate` filled in.

    Raises:
        UserError: if the axes do not multiply to the number of processes.
    """
    others = config.shard * config.context * config.tensor
    replicate = config.replicate or max(1, size // others)
    if replicate * others != size:
        raise UserError(
            f"the layout replicate {replicate} x shard {config.shard} x context {config.context} x tensor "
            f"{config.tensor} = {replicate * others} does not fit the {size} processes that were started; change "
            f"pretrain.parallel, or start {replicate * others} processes (torchrun --nproc-per-node ...)"
        )
    if (replicate * config.shard) % config.expert:
        raise UserError(
            f"pretrain.parallel.expert = {config.expert} must divide replicate x shard = {replicate * config.shard}"
        )
    if config.expert > 1 and config.tensor > 1:
        raise UserError(
            f"pretrain.parallel.expert = {config.expert} with tensor = {config.tensor} is not supported; set one to 1"
        )
    return config.model_copy(update={"replicate": replicate})
