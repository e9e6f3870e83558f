"""The processes that train together: who this one is, and how the devices are laid out."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from lalia.devices import num_processes
from lalia.errors import UserError
from lalia.training.parallel.layout import AXES, ParallelConfig, resolve


@dataclass(frozen=True)
class World:
    """This process among those that train together.

    Attributes:
        layout: devices along each axis, `replicate` resolved.
        device: where this process computes.
        mesh: over `AXES`; None where the process is alone.
        weights: over ("replicate", "shard", "tensor"), how weights are laid out: ranks that take parts of the same rows
            hold different tokens as well, so weights are divided among shard x context of them.
        timeout_seconds: how long a process waits for the others.
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
    timeout_seconds: float = 600.0

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

    def from_main(self, value: Tensor) -> Tensor:
        """The first process's value, in all (in place); on the device, so that no process has to wait."""
        if self.size > 1:
            dist.broadcast(value, 0)
        return value

    def agree(self, *flags: bool) -> list[bool]:
        """Each flag, True if it is True in any process; on the host, so that no device has to wait."""
        if self.size == 1:
            return list(flags)
        values = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return [bool(value) for value in values]


def start(config: ParallelConfig, timeout_seconds: float = 600.0) -> World:
    """Join the processes that torchrun (or whoever sets its environment variables) started; alone without it.

    Raises:
        UserError: if the layout does not fit the number of processes, or there are more of them than GPUs.
    """
    size = num_processes()
    layout = resolve(config, size)
    cuda, local_rank = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", "0"))
    if cuda and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"this machine has {torch.cuda.device_count()} GPUs and process {local_rank} of it has none; start as many "
            "processes as there are GPUs (torchrun --nproc-per-node gpu ...)"
        )
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if size == 1:
        return World(layout, device)
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _join("cpu:gloo,cuda:nccl" if cuda else "gloo", timedelta(seconds=timeout_seconds))
    replicate, shard, context, tensor = layout.replicate, layout.shard, layout.context, layout.tensor
    assert replicate is not None
    mesh = init_device_mesh(device.type, (replicate, shard, context, tensor), mesh_dim_names=AXES)
    names = ("replicate", "shard", "tensor")
    weights = init_device_mesh(device.type, (replicate, shard * context, tensor), mesh_dim_names=names)
    experts = None
    if layout.expert > 1:
        # Of every rank of a group of experts the others have other rows, but the same part of them.
        ranks = torch.arange(size).view(-1, layout.expert, context).transpose(1, 2).reshape(-1, layout.expert)
        experts = DeviceMesh(device.type, ranks, mesh_dim_names=("copies", "expert"))
    world = World(layout, device, dist.get_rank(), size, mesh, weights, experts, timeout_seconds)
    meshes = [each for each in (mesh, weights, experts) if each is not None]
    groups = [dist.group.WORLD, world.tokens, *(group for each in meshes for group in each.get_all_groups())]
    for group in groups:  # those of a mesh, and the one that Ray has formed, come with a timeout of their own
        if group is not None:
            group.set_timeout(timedelta(seconds=timeout_seconds))
    return world


def _join(backend: str, timeout: timedelta) -> None:
    """Form the process group once all are there: they may start minutes apart, on a `timeout` of seconds."""
    store, rank, size = next(rendezvous("env://", timeout=JOIN_TIMEOUT))
    # torchrun's store outlives the processes: after a restart it still holds the addresses of those that died.
    store = PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    store.set(f"lalia/here/{rank}", "")
    store.wait([f"lalia/here/{other}" for other in range(size)], JOIN_TIMEOUT)
    # Checkpoints and messages go between CPUs, beside what NCCL does.
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


JOIN_TIMEOUT = timedelta(minutes=10)
"""Longest wait for the other processes to start."""
