"""From blocking engine requests to asynchronous events, without blocking the event loop."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lalia.serving.errors import ApiError

if TYPE_CHECKING:
    from lalia.inference.request import Delta, Request

KEEP_ALIVE_SECONDS = 10.0
"""A stream that has nothing to say for so long sends a comment, so that no proxy takes it for dead."""

log = logging.getLogger("lalia.serving")


@dataclass(frozen=True)
class Event:
    """A step of one choice; `delta` None means that the choice is complete."""

    choice: int
    delta: "Delta | None"


async def events(requests: Sequence["Request"]) -> AsyncGenerator[Event | None, None]:
    """The steps of several engine requests as they come, and None where nothing came for `KEEP_ALIVE_SECONDS`.

    Every request that is not complete when the iteration ends, for whatever reason, is cancelled.

    Raises:
        ApiError: 500 or 503 if the engine fails or is stopped meanwhile.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Event | Exception] = asyncio.Queue()

    def put(item: Event | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server ended without us
            loop.call_soon_threadsafe(queue.put_nowait, item)

    def follow(choice: int, request: "Request") -> None:
        try:
            for delta in request:
                put(Event(choice, delta))
            put(Event(choice, None))
        except Exception as error:
            log.exception("a request failed in the engine")
            put(error)

    running = set(range(len(requests)))
    try:
        for choice, request in enumerate(requests):
            threading.Thread(target=follow, args=(choice, request), daemon=True).start()
        while running:
            try:
                # Not wait_for: before Python 3.12 it may swallow the cancellation that a leaving client causes.
                async with asyncio.timeout(KEEP_ALIVE_SECONDS):
                    item = await queue.get()
            except TimeoutError:
                yield None
                continue
            if isinstance(item, Exception):
                raise ApiError(
                    "the engine failed on this request; the server's log says more", 500, code="engine_failed"
                )
            if item.delta is None:
                running.discard(item.choice)
                if requests[item.choice].finish_reason == "cancelled":
                    raise ApiError("the server stopped before the answer was complete", 503, code="stopping")
            yield item
    finally:
        for choice in running:
            requests[choice].cancel()  # harmless where it has ended
