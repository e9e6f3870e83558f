"""Answers that last: server-sent events, and work that stops when the client leaves."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lalia.serving.errors import ApiError

Result = TypeVar("Result")


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


async def while_connected(receive: Receive, work: Awaitable[Result]) -> Result:
    """The result of `work`, which is cancelled if the client leaves first.

    Raises:
        ClientLeft: if it did.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_until_disconnect(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeft
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        # Wait until the cancelled work has let go of its engine requests.
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events, ended by "data: [DONE]", or by an error object where the answer cannot be completed."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[Mapping[str, Any] | None, None], done: Callable[[], None]) -> None:
        """
        Args:
            chunks: JSON objects; None sends a comment that keeps the connection alive.
            done: called once, when the stream is over in whatever way.
        """
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._chunks, self._done = chunks, done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._write(send))
        except ClientLeft:
            pass
        finally:
            self._done()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

        async def write(data: str) -> None:
            await send({"type": "http.response.body", "body": data.encode(), "more_body": True})

        try:
            async with aclosing(self._chunks) as chunks:
                async for chunk in chunks:
                    await write(": keep-alive\n\n" if chunk is None else f"data: {_json(chunk)}\n\n")
            await write("data: [DONE]\n\n")
        except ApiError as error:
            await write(f"data: {_json(error.body())}\n\n")
        await send({"type": "http.response.body", "body": b""})


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
