"""Where every process is, so that one that waits in vain can say for whom."""

import threading
import time
from dataclasses import dataclass
from typing import Any

from lalia.errors import UserError
from lalia.training.parallel.world import World


@dataclass(frozen=True)
class Place:
    """Where a process was when it last said so.

    Attributes:
        seconds: since then.
        silent_seconds: since its last sign of life, which a thread gives every second.
    """

    rank: int
    step: int
    place: str
    seconds: float
    silent_seconds: float


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
            self._sign()
            threading.Thread(target=self._live, name="heartbeat", daemon=True).start()

    def beat(self, step: int, place: str) -> None:
        """Note that this process is at `place` of a step."""
        if self._store is not None:
            self._store.set(_key("place", self.world.rank), f"{time.time():.3f} {step} {place}")

    def places(self) -> list[Place]:
        """Every process, the most suspicious first: no sign of life, then the lowest step, then the longest there."""
        now, found = time.time(), []
        for rank in range(self.world.size):
            at, step, place = (self._read("place", rank) or f"{now} 0 its start").split(" ", 2)
            alive = self._read("alive", rank)
            silent = max(0.0, now - float(alive)) if alive else float("inf")
            found.append(Place(rank, int(step), place, max(0.0, now - float(at)), silent))
        return sorted(found, key=lambda p: (p.silent_seconds < 5 * SIGN_SECONDS, p.step, -p.seconds))

    def explain(self, error: Exception) -> UserError:
        """What to tell the user when a collective operation failed or took too long."""
        try:
            places = self.places()
        except RuntimeError:
            return UserError(
                f"process {self.world.rank} waited in vain for the others, and the place where they met is gone: look "
                f"at the first machine. The cause as it was reported: {str(error).splitlines()[0][:300]}"
            )
        first = places[0]
        listed = "; ".join(f"process {p.rank} was at step {p.step}, {p.place}, {p.seconds:.0f} s ago" for p in places)
        return UserError(
            f"process {self.world.rank} waited in vain for the others. Look at process {first.rank} and its machine: "
            f"step {first.step}, {first.place}, for {first.seconds:.0f} s, last sign of life "
            f"{first.silent_seconds:.0f} s ago ({listed}). torchrun --max-restarts starts all of them again from the "
            "last checkpoint; pretrain.timeout_seconds is how long they wait. The cause as it was reported: "
            f"{str(error).splitlines()[0][:300]}"
        )

    def _read(self, kind: str, rank: int) -> str | None:
        key = _key(kind, rank)
        return self._store.get(key).decode() if self._store is not None and self._store.check([key]) else None

    def _sign(self) -> None:
        self._store.set(_key("alive", self.world.rank), f"{time.time():.3f}")

    def _live(self) -> None:
        while True:
            time.sleep(SIGN_SECONDS)
            try:
                self._sign()
            except RuntimeError:  # the store is gone, and with it whoever would read
                return


SIGN_SECONDS = 1.0
"""Between two signs of life."""


def is_communication_failure(error: Exception) -> bool:
    """Whether an error of PyTorch says that another process did not answer."""
    import torch.distributed as dist

    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    signs = ("Timed out", "timed out", "Connection closed", "Connection reset", "connectFullMesh", "Broken pipe")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


def _key(kind: str, rank: int) -> str:
    return f"lalia/{kind}/{rank}"
