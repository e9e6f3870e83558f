"""Requests that last: clients that leave, servers that stop, and everyone else meanwhile."""

import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from lalia.serving import app, generation
from tests.serving.conftest import Running
from tests.serving.stub import ANSWER, wait_until
from tests.serving.test_bad_requests import refusal

MESSAGES = [{"role": "user", "content": "Hello"}]
ENDLESS = {"messages": MESSAGES, "ignore_eos": True, "max_tokens": 200}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(server: Running, stream: bool) -> None:
    engine = server.model.engine
    engine.seconds_per_token = 0.05
    with httpx.Client(base_url=server.url) as client:
        try:
            with client.stream(
                "POST", "/v1/chat/completions", json={**ENDLESS, "stream": stream, "n": 2}, timeout=0.3
            ) as r:
                next(r.iter_lines())
        except httpx.ReadTimeout:
            assert not stream
        else:
            assert stream
    assert wait_until(lambda: not engine.running, 1)
    assert [request.finish_reason for request in engine.submitted] == ["cancelled"] * 2


def test_row_32_many_clients_cut_in_the_middle(server: Running) -> None:
    engine = server.model.engine
    engine.seconds_per_token = 0.02
    body = b'{"messages": [{"role": "user", "content": "Hi"}], "stream": true, "ignore_eos": true, "max_tokens": 200}'
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body)

    def cut() -> bytes:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(head + body)
            return connection.recv(15)

    with ThreadPoolExecutor(40) as pool:
        answers = [future.result() for future in [pool.submit(cut) for _ in range(200)]]
    assert set(answers) == {b"HTTP/1.1 200 OK"}
    assert wait_until(lambda: not engine.running)
    assert server.server.traffic.running == 0 or wait_until(lambda: server.server.traffic.running == 0)


def test_generation_does_not_block_the_server(server: Running) -> None:
    server.model.engine.seconds_per_token = 0.05
    with ThreadPoolExecutor(20) as pool:
        # More than there are threads in the event loop's pool.
        answers = [pool.submit(server.chat, max_tokens=12) for _ in range(20)]
        assert wait_until(lambda: len(server.model.engine.running) == 20)
        start = time.monotonic()
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert time.monotonic() - start < 0.5
        assert all(answer.result().status_code == 200 for answer in answers)
    assert time.monotonic() - start < 3  # together, not one after the other


def test_row_1_server_answers_while_it_refuses(server: Running) -> None:
    with ThreadPoolExecutor(4) as pool:
        bodies = [
            {"n": 10**12},
            {"prompt": "a" * 1_000_000},
            {f"f{i}": 1 for i in range(40_000)},
            {"stop": ["s"] * 10_000},
        ]
        refused = [pool.submit(server.complete, **body) for body in bodies * 4]
        start = time.monotonic()
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert time.monotonic() - start < 1
        assert {future.result().status_code for future in refused} == {400}


def test_silence_is_filled_with_comments(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "KEEP_ALIVE_SECONDS", 0.05)
    server.model.engine.seconds_per_token = 0.2
    with server.http.stream(
        "POST", "/v1/chat/completions", json={"messages": MESSAGES, "stream": True, "max_tokens": 2}
    ) as r:
        lines = list(r.iter_lines())
    assert lines[0] == ": keep-alive" and lines[1] == ""
    assert lines[-2:] == ["data: [DONE]", ""]
    server.model.engine.seconds_per_token = 0.07
    chunks = server.client.chat.completions.create(
        model="sonnet", messages=[{"role": "user", "content": "Hi"}], stream=True, max_tokens=4
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Thou art more lovely"


def test_too_much_work_is_refused(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "MAX_ANSWERS", 3)
    server.model.engine.seconds_per_token = 0.05
    with server.http.stream("POST", "/v1/chat/completions", json={**ENDLESS, "stream": True, "n": 2}) as response:
        lines = response.iter_lines()  # its end would close the connection
        next(lines)
        busy = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": MESSAGES, "n": 2})
        assert refusal(busy, 503)["code"] == "overloaded" and busy.headers["retry-after"]
        assert httpx.post(f"{server.url}/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 1}).is_success
    assert wait_until(lambda: server.chat(n=3, max_tokens=1).is_success)  # counted down again


def test_stopping_lets_streams_finish_and_refuses_new_requests(own_server: Running) -> None:
    engine = own_server.model.engine
    engine.seconds_per_token = 0.05
    text: list[str] = []

    def read() -> None:
        for chunk in own_server.client.chat.completions.create(
            model="sonnet", messages=[{"role": "user", "content": "Hi"}], stream=True
        ):
            text.append(chunk.choices[0].delta.content or "")

    reader = threading.Thread(target=read)
    reader.start()
    assert wait_until(lambda: len(text) > 2)
    own_server.server.handle_exit(signal.SIGTERM, None)
    assert refusal(own_server.chat(), 503)["code"] == "stopping"
    assert own_server.http.get("/").status_code == 503
    health = own_server.http.get("/health")
    assert health.status_code == 503 and health.json() == {"status": "stopping"}
    reader.join(10)
    assert "".join(text) == ANSWER
    assert wait_until(lambda: not engine.started)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{own_server.url}/health")


def test_a_second_signal_cuts_streams_off_with_an_error(own_server: Running) -> None:
    own_server.model.engine.seconds_per_token = 0.05
    with own_server.http.stream("POST", "/v1/chat/completions", json={**ENDLESS, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        own_server.server.handle_exit(signal.SIGINT, None)
        time.sleep(0.3)
        assert own_server.model.engine.running
        own_server.server.handle_exit(signal.SIGINT, None)
        rest = [line for line in lines if line]
    assert '"code":"stopping"' in rest[-1]
    assert wait_until(lambda: not own_server.model.engine.started)
