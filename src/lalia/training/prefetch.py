"""The next batch, made while the device works on the present one."""

import threading
import time
from collections.abc import Callable
from queue import Empty, Queue
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Calls `make(0 + first), make(1 + first), ...` on a thread, one ahead of what is taken.

    What `make` raises is raised by `take` when its turn comes.

    Attributes:
        wait_seconds: time that `take` has waited.
    """

    def __init__(self, make: Callable[[int], T], first: int, end: int) -> None:
        self.wait_seconds = 0.0
        self._made: Queue[tuple[T | None, BaseException | None]] = Queue(maxsize=1)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(make, first, end), name="batches", daemon=True)
        self._thread.start()

    def take(self) -> T:
        """The next one, in order."""
        began = time.perf_counter()
        value, error = self._made.get()
        self.wait_seconds += time.perf_counter() - began
        if error is not None:
            raise error
        assert value is not None
        return value

    def stop(self) -> None:
        """End the thread; what it made is dropped."""
        self._stopped.set()
        while self._thread.is_alive():
            try:
                self._made.get(timeout=0.01)
            except Empty:
                self._thread.join(timeout=0.01)

    def _work(self, make: Callable[[int], T], first: int, end: int) -> None:
        for number in range(first, end):
            if self._stopped.is_set():
                return
            try:
                made: tuple[T | None, BaseException | None] = (make(number), None)
            except BaseException as error:  # noqa: BLE001 (it is raised again by take)
                made = (None, error)
            self._made.put(made)
            if made[1] is not None:
                return
