"""Who may ask, and how a request may arrive. Rows as in the list of known incidents."""

import socket
import time

import pytest

from lalia.errors import UserError
from lalia.serving import gate, server
from lalia.serving.gate import host_name
from lalia.serving.server import hosts_allowed, listen
from lalia.tokenizer.bpe import Tokenizer
from tests.serving.conftest import Running, run_server
from tests.serving.stub import StubModel
from tests.serving.test_bad_requests import refusal


@pytest.mark.parametrize(
    ("header", "name"),
    [("localhost:8000", "localhost"), ("LOCALHOST", "localhost"), ("127.0.0.1", "127.0.0.1"), ("[::1]:80", "::1"),
     ("evil.example", "evil.example"), ("evil.example:80", "evil.example"), ("x/health?", ""), ("a@127.0.0.1", ""),
     ("127.0.0.1#@evil", ""), ("localhost:x", ""), ("[::1", ""), ("", ""), ("127.0.0.1, evil", "127.0.0.1, evil")],
)  # fmt: skip
def test_host_name(header: str, name: str) -> None:
    assert host_name(header) == name


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "x/health?", "", "0"])
def test_row_29_rebound_names_are_refused(server: Running, host: str) -> None:
    for path in ("/", "/v1/models", "/health"):
        error = refusal(server.http.get(path, headers={"host": host}))
        assert error["code"] == "host_not_allowed" and "--allow-host" in error["message"]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "localhost:1234", "[::1]:8000", "LOCALHOST"])
def test_loopback_names_are_answered(server: Running, host: str) -> None:
    assert server.http.get("/v1/models", headers={"host": host}).status_code == 200


def test_further_names_can_be_allowed(tokenizer: Tokenizer) -> None:
    with run_server(StubModel(tokenizer), allowed_hosts=("box.example",)) as running:
        assert running.http.get("/health", headers={"host": "box.example:80"}).status_code == 200
        assert running.http.get("/health", headers={"host": "fox.example"}).status_code == 400
        # The page behind a proxy that rewrites the Host header.
        proxied = running.http.get("/v1/models", headers={"origin": "https://box.example"})
        assert proxied.status_code == 200
        assert running.http.get("/v1/models", headers={"origin": "https://fox.example"}).status_code == 403


def test_which_hosts_are_allowed() -> None:
    assert hosts_allowed("0.0.0.0", "0.0.0.0", ()) is None
    assert hosts_allowed("127.0.0.1", "localhost", ()) is not None
    assert "box" in (hosts_allowed("0.0.0.0", "0.0.0.0", ("box",)) or [])


def test_row_29_pages_of_other_sites_are_refused(server: Running) -> None:
    body = {"prompt": "Thou"}
    for origin in (
        "https://evil.example",
        "null",
        "",
        "http://[::1",
        "file://",
        "http://a@127.0.0.1",
        f"http://127.0.0.1:{server.port + 1}",
    ):
        answer = server.http.post("/v1/completions", json=body, headers={"origin": origin})
        assert refusal(answer, 403)["code"] == "origin_not_allowed"
    own = server.http.post("/v1/completions", json=body, headers={"origin": server.url})
    assert own.status_code == 200
    assert not [name for name in own.headers if name.startswith("access-control-")]
    preflight = server.http.options("/v1/completions", headers={"access-control-request-method": "POST"})
    assert preflight.status_code == 405


def test_every_answer_has_the_protective_headers(server: Running) -> None:
    for path in ("/", "/v1/models", "/nowhere"):
        headers = server.http.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert "server" not in headers


def talk(running: Running, data: bytes, seconds: float = 5.0) -> bytes:
    """What comes back on a bare connection until the server closes it."""
    with socket.create_connection(("127.0.0.1", running.port), timeout=seconds) as connection:
        received = b""
        try:
            connection.sendall(data)
            while part := connection.recv(65_536):
                received += part
        except ConnectionError:
            pass
        return received


def test_row_22_giant_head(server: Running) -> None:
    answer = talk(server, b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 1_000_000 + b"\r\n\r\n")
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431")) or not answer


def test_requests_that_are_no_http(server: Running) -> None:
    assert talk(server, b"\x16\x03\x01\x02\x00\x01\r\n\r\n").startswith(b"HTTP/1.1 400")
    twice = b"GET /health HTTP/1.1\r\nhost: localhost\r\nhost: evil.example\r\n\r\n"
    assert talk(server, twice).startswith(b"HTTP/1.1 400")


def test_row_22_slow_senders_are_cut(own_server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEADER_SECONDS", 0.2)
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.2)
    start = time.monotonic()
    assert talk(own_server, b"GET /health HTTP/1.1\r\nhost: loc") == b""
    assert talk(own_server, b"") == b""
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: 100\r\n\r\n{"
    answer = talk(own_server, head)
    assert answer.startswith(b"HTTP/1.1 408") and b"0 seconds" in answer
    assert time.monotonic() - start < 4


def test_port_in_use() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} on 127.0.0.1 is in use.*--port"):
            listen("127.0.0.1", port)
    with listen("127.0.0.1", port):  # and free again
        pass


@pytest.mark.parametrize(
    ("host", "port"), [("127.0.0.1", 70_000), ("127.0.0.1", -1), ("nowhere.invalid", 0), ("192.0.2.1", 0)]
)
def test_addresses_that_are_none(host: str, port: int) -> None:
    with pytest.raises(UserError, match="port = |is no address of this machine"):
        listen(host, port)


def test_port_is_claimed_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "load", lambda folder: pytest.fail("the model was loaded"))
    with listen("127.0.0.1", 0) as taken, pytest.raises(UserError, match="in use"):
        server.serve("nowhere", port=taken.getsockname()[1])
