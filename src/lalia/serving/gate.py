"""What stands before every route: who may ask, how much they may send, and whether we still take requests."""

import asyncio
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lalia.serving.errors import ApiError, internal_error

MAX_BODY_BYTES = 1024 * 1024
DISCARDED_BYTES = 32 * 1024 * 1024
"""How much of a body that is too large is read and dropped, so that the sender lives to read the answer."""
BODY_SECONDS = 30.0
"""How long a client may take to send its body."""

log = logging.getLogger("lalia.serving")

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")

_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"x-frame-options": b"DENY",
    b"cross-origin-resource-policy": b"same-origin",
    b"cache-control": b"no-store",
}


@dataclass
class Traffic:
    """What passes the gate.

    Attributes:
        stopping: set to answer every new request with 503 while the running ones finish.
        running: requests being answered, those for /health not counted.
    """

    stopping: bool = False
    running: int = 0


class Gate:
    """ASGI middleware: refuses strangers, oversized bodies, and everything new once the server is stopping."""

    def __init__(self, app: ASGIApp, traffic: Traffic, allowed_hosts: Iterable[str] | None) -> None:
        """`allowed_hosts`: names without port that the Host header may carry; None accepts all.

        On a loopback address the list is what keeps a web page of someone else's, whose name was rebound to
        127.0.0.1, from talking to this server through the user's browser.
        """
        self._app, self._traffic = app, traffic
        self._allowed_hosts = None if allowed_hosts is None else {host.lower() for host in allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                given = list(message.get("headers", []))
                names = {name for name, _ in given}
                message["headers"] = given + [pair for pair in _HEADERS.items() if pair[0] not in names]
            await send(message)

        counted = scope["path"] != "/health"
        try:
            self._check(scope)
            # Counted from here on: a request whose body is still arriving when the server stops is answered too.
            self._traffic.running += counted
            try:
                body = await _read_body(receive)
                await self._app(scope, _replay(body, receive), send_with_headers)
            finally:
                self._traffic.running -= counted
        except ApiError as error:
            await _send_error(error, send_with_headers)
        except Exception:
            if started:
                raise  # uvicorn logs it and cuts the connection, so that nobody takes the answer for complete
            log.exception("a request failed")
            await _send_error(internal_error(), send_with_headers)

    def _check(self, scope: Scope) -> None:
        headers = [(name.lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        hosts = [value for name, value in headers if name == b"host"]
        if self._allowed_hosts is not None and not (len(hosts) == 1 and host_name(hosts[0]) in self._allowed_hosts):
            raise ApiError(
                "the Host header names no host of this server; open it under 127.0.0.1 or localhost, or start it "
                "with --allow-host NAME",
                code="host_not_allowed",
            )
        for name, value in headers:
            if name == b"origin" and not self._is_own_page(value, hosts):
                raise ApiError(
                    "requests from pages of other sites are refused; behind a proxy, start the server with "
                    "--allow-host and the proxy's name",
                    403,
                    code="origin_not_allowed",
                )
            if name == b"content-encoding" and value.lower() != "identity":
                raise ApiError("compressed bodies are not accepted; send the JSON as it is", 415)
        if self._traffic.stopping and scope["path"] != "/health":
            raise ApiError(
                "the server is shutting down and takes no new requests",
                503,
                code="stopping",
                headers={"retry-after": "5"},
            )

    def _is_own_page(self, origin: str, hosts: list[str]) -> bool:
        scheme, separator, host = origin.lower().partition("://")
        if not separator or scheme not in ("http", "https") or not host_name(host):
            return False
        # A name that was allowed on purpose may differ from the Host header, which proxies rewrite.
        named = (self._allowed_hosts or set()) - set(LOOPBACK_NAMES)
        return [name.lower() for name in hosts] == [host] or host_name(host) in named


def host_name(host: str) -> str:
    """The name in a Host header, without port and brackets, in lower case; "" where it is malformed."""
    try:
        parts = urlsplit(f"//{host}")
        name, _ = parts.hostname or "", parts.port
    except ValueError:
        return ""
    # A name with a path, a user or a query in it is no name.
    return name.lower() if parts.netloc == host and "@" not in host else ""


async def _read_body(receive: Receive) -> bytes:
    """The whole body, at most `MAX_BODY_BYTES`.

    Raises:
        ApiError: 413 if it is larger, 408 if it takes too long.
    """
    body = bytearray()
    size = 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError("the client left before its request was complete", 400)
                chunk = message.get("body", b"")
                size += len(chunk)
                if size <= MAX_BODY_BYTES:
                    body += chunk
                if not message.get("more_body", False) or size > DISCARDED_BYTES:
                    break
    except TimeoutError:
        raise ApiError(f"the body took longer than {BODY_SECONDS:.0f} seconds to arrive", 408) from None
    if size > MAX_BODY_BYTES:
        raise ApiError(f"the body is larger than the limit of {MAX_BODY_BYTES} bytes", 413, code="body_too_large")
    return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once and then what comes after it: the client's leaving."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _send_error(error: ApiError, send: Send) -> None:
    content = json.dumps(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    headers += [(name.encode(), value.encode()) for name, value in (error.headers or {}).items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
