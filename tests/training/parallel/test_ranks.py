"""The harness itself: results by rank, and the error of the rank that failed first."""

import time

import pytest
import torch
import torch.distributed as dist

from lalia.training.parallel.layout import ParallelConfig
from lalia.training.parallel.world import start
from tests.training.parallel.ranks import run


def _sum(offset: int) -> tuple[int, torch.Tensor]:
    world = start(ParallelConfig())
    return world.rank, world.sum(torch.tensor([float(offset + world.rank)]))


def _fail() -> None:
    if dist.get_rank() == 1:
        raise ValueError("no such luck")
    dist.barrier()  # waits for a rank that never comes


def _sleep() -> None:
    time.sleep(60)


def _waited(group: str, timeout_seconds: float) -> float:
    """Seconds that a process waits, in a group of a mesh or in "tokens", for one that does not come."""
    world = start(ParallelConfig(replicate=2, shard=2), timeout_seconds)
    began = time.monotonic()
    waited = 0.0
    if world.rank == 1:
        with pytest.raises(RuntimeError):
            if group == "tokens":
                world.sum(torch.ones(1))
            else:
                assert world.mesh is not None
                dist.all_reduce(torch.ones(1), group=world.mesh.get_group(group))
        waited = time.monotonic() - began
    time.sleep(max(0.0, began + 12 - time.monotonic()))
    return waited


@pytest.mark.parametrize("group", ["replicate", "shard", "tokens"])
def test_no_group_of_processes_waits_longer_than_asked(group: str) -> None:
    """Sub-groups have a timeout of their own, half an hour for gloo, unless they are told."""
    waited = run(_waited, 4, group, 1.5, timeout_seconds=60.0)[1]
    assert 1.0 < waited < 9.0  # the one that does not come would end the wait after 12


def test_results_by_rank() -> None:
    assert run(_sum, 2, 10) == [(0, torch.tensor([21.0])), (1, torch.tensor([21.0]))]


def test_first_failure_is_shown() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1 of 2 failed first.*no such luck"):
        run(_fail, 2)


def test_bounded() -> None:
    with pytest.raises(AssertionError, match=r"ranks \[0\] of 1 did not end within 1.5 s"):
        run(_sleep, 1, timeout_seconds=1.5)
