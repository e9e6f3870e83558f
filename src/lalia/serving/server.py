"""Serve one model until told to stop."""

import asyncio
import errno
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from lalia.errors import UserError
from lalia.inference.clip import Clip
from lalia.inference.loading import load
from lalia.progress import Progress
from lalia.serving.app import create_app
from lalia.serving.gate import LOOPBACK_NAMES, Traffic

HEADER_SECONDS = 15.0
"""How long a client may take to send the head of a request."""


def serve(
    folder: Path | str,
    host: str = "127.0.0.1",
    port: int = 8000,
    progress: Progress | None = None,
    name: str | None = None,
    allowed_hosts: Sequence[str] = (),
    max_length: int | None = None,
    quantize: str | None = None,
) -> None:
    """Serve the model in `folder` over HTTP; returns after Ctrl-C or SIGTERM.

    The first signal lets running answers finish while new requests get 503; the second cuts them off.

    Args:
        folder: a model folder.
        host: address to listen on. On a loopback address only requests to 127.0.0.1, localhost, ::1, `host` and
            `allowed_hosts` are answered; on others all are, unless `allowed_hosts` names some.
        port: 0 takes a free one.
        name: the model's name in the API; default its own.
        max_length: longest sequence in tokens, prompt and answer together; None means the model's context.
        quantize: int8, int4 or none, as for `lalia.load`.

    Raises:
        UserError: if the address is not to be had, or the model does not load.
    """
    progress = progress or Progress()
    with listen(host, port) as listener:  # before the model is loaded, which takes longer
        address, port = listener.getsockname()[:2]
        model = load(folder, max_length=max_length, quantize=quantize)
        if isinstance(model, Clip):
            raise UserError(f"{folder} is a CLIP model; the server has no API for images (use lalia.load in Python)")
        app = create_app(model, name or model.name, hosts_allowed(address, host, allowed_hosts))
        shown_host = f"[{host}]" if ":" in host else host
        progress.say(f"{name or model.name} answers at http://{shown_host}:{port} (API: /v1). Ctrl-C stops it.")
        Server(app, progress).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address, not yet accepting.

    Raises:
        UserError: if it is taken, forbidden or no address of this machine.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"port = {port}: expected 0 to 65535 (0 takes a free one)")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError:
        raise UserError(f"host = {host!r} is no address of this machine; use 127.0.0.1, or 0.0.0.0 for all") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
        return listener
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"port {port} on {host} is in use by another program; stop that one or choose another with --port "
                f"(for example {port + 1 if port < 65535 else 8000})"
            ) from None
        if error.errno == errno.EACCES:
            raise UserError(f"port {port} needs administrator rights; choose one above 1023 with --port") from None
        if error.errno == errno.EADDRNOTAVAIL:
            raise UserError(f"host = {host!r} is no address of this machine; use 127.0.0.1, or 0.0.0.0") from None
        raise


def hosts_allowed(address: str, host: str, extra: Sequence[str]) -> list[str] | None:
    """Names that the Host header may carry; None for any.

    Args:
        address: the IP address that is listened on.
        host: what the user called it.
        extra: further names the user allows.
    """
    if address.startswith("127.") or address == "::1":
        return [*LOOPBACK_NAMES, address, host, *extra]
    return [*LOOPBACK_NAMES, host, *extra] if extra else None


class Server(uvicorn.Server):
    """uvicorn, except that it goes on listening while running answers finish, so that others hear 503."""

    def __init__(self, app: FastAPI, progress: Progress) -> None:
        config = uvicorn.Config(
            app,
            http=_Protocol,  # h11 also bounds the head of a request, to 64 KiB
            ws="none",
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="on",
        )
        super().__init__(config)
        self.traffic: Traffic = app.state.traffic
        self._cut_off: Callable[[], None] = app.state.cut_off
        self._progress = progress
        self._num_signals = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._num_signals += 1
        self.traffic.stopping = True
        if self._num_signals > 2:
            self.should_exit = self.force_exit = True
        elif self._num_signals == 1 and self.traffic.running:
            self._progress.say(f"Finishing {self.traffic.running} running requests; Ctrl-C again cuts them off.")

    async def on_tick(self, counter: int) -> bool:
        if self._num_signals == 2:
            self._cut_off()
        if self.traffic.stopping and not self.traffic.running:
            self.should_exit = True
        return await super().on_tick(counter)


class _Protocol(H11Protocol):
    """uvicorn's HTTP/1.1, with a limit on the time that the head of a request may take."""

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._head_timer is not None:
            self._head_timer.cancel()

    def _watch_head(self) -> None:
        waiting = self.conn.their_state is h11.IDLE
        if waiting and self._head_timer is None:
            self._head_timer = self.loop.call_later(HEADER_SECONDS, self._give_up)
        elif not waiting and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()
