"""Where every process is, so that one that waits in vain can say for whom."""

import time
from typing import Any

from lalia.errors import UserError
from lalia.training.parallel.world import World


class Heartbeat:
    """Notes this process's place in the key-value store that the processes met through, and reads the others'.

    The store belongs to the process that started them (torchrun's agent), so it outlives a process that hangs.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._store: Any = None
        if world.size > 1:
            from torch.distributed.distributed_c10d import _get_default_store  # there is no public way to it

            self._store = _get_default_store()

    def beat(self, step: int, place: str) -> None:
        """Note that this process is at `place` of a step."""
        if self._store is not None:
            self._store.set(_key(self.world.rank), f"{time.time():.3f} {step} {place}")

    def places(self) -> list[tuple[int, float, int, str]]:
        """(rank, seconds since its last note, step, place) of every process, the one longest silent first."""
        found = []
        for rank in range(self.world.size):
            if self._store is None or not self._store.check([_key(rank)]):
                found.append((rank, float("inf"), 0, "its start"))
                continue
            at, step, place = self._store.get(_key(rank)).decode().split(" ", 2)
            found.append((rank, max(0.0, time.time() - float(at)), int(step), place))
        return sorted(found, key=lambda entry: (entry[2], -entry[1]))

    def explain(self, error: Exception) -> UserError:
        """What to tell the user when a collective operation failed or took too long."""
        places = self.places()
        listed = "; ".join(
            f"process {rank} was at step {step}, {place}, {silent:.0f} s ago" for rank, silent, step, place in places
        )
        rank, silent, step, place = places[0]
        return UserError(
            f"process {self.world.rank} waited in vain for the others. Behind all others is process {rank}: step "
            f"{step}, {place}, silent for {silent:.0f} s. ({listed}.) Look at that process and its machine; torchrun "
            "--max-restarts starts all of them again from the last checkpoint; pretrain.timeout_seconds is how long "
            f"they wait. The cause as it was reported: {str(error).splitlines()[0][:300]}"
        )


def is_communication_failure(error: Exception) -> bool:
    """Whether an error of PyTorch says that another process did not answer."""
    import torch.distributed as dist

    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    signs = ("Timed out", "timed out", "Connection closed", "Connection reset", "connectFullMesh", "Broken pipe")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


def _key(rank: int) -> str:
    return f"lalia/place/{rank}"
