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
    """

    layout: ParallelConfig
    device: torch.device
    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None

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

    def sum(self, value: Tensor) -> Tensor:
        """Sum over the processes that hold different tokens (in place); those of a tensor-parallel group agree."""
        if self.mesh is not None and self.size > self.layout.tensor:
            dist.all_reduce(value, group=self.mesh[AXES[:3]]._flatten("tokens").get_group())
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
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout_seconds))
    assert layout.replicate is not None
    shape = (layout.replicate, layout.shard, layout.context, layout.tensor)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=AXES)
    return World(layout, device, dist.get_rank(), size, mesh)


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
    return config.model_copy(update={"replicate": replicate})
