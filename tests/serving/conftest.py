"""A real server on a free loopback port, with a scripted engine behind it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest

from lalia.progress import Progress
from lalia.serving.app import create_app
from lalia.serving.server import Server, hosts_allowed, listen
from lalia.tokenizer.bpe import Tokenizer
from tests.serving.stub import StubModel, make_tokenizer, wait_until


@dataclass
class Running:
    """A server and ways to talk to it."""

    url: str
    port: int
    model: Any
    server: Server
    http: httpx.Client
    client: openai.OpenAI

    def chat(self, **fields: Any) -> httpx.Response:
        """POST /v1/chat/completions with one message, unless `fields` say otherwise."""
        body = {"messages": [{"role": "user", "content": "Hello"}], **fields}
        return self.http.post("/v1/chat/completions", json=body)

    def complete(self, **fields: Any) -> httpx.Response:
        """POST /v1/completions."""
        return self.http.post("/v1/completions", json={"prompt": "Thou art", **fields})


@contextmanager
def run_server(model: Any, allowed_hosts: tuple[str, ...] = ()) -> Iterator[Running]:
    """Serve `model` in a thread, as `lalia.serving.server.serve` does in the main one."""
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        app = create_app(model, model.name, hosts_allowed("127.0.0.1", "127.0.0.1", allowed_hosts))
        server = Server(app, Progress(quiet=True))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        assert wait_until(lambda: server.started)
        url = f"http://127.0.0.1:{port}"
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20)
        with httpx.Client(base_url=url, timeout=20) as http, client:
            yield Running(url, port, model, server, http, client)
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="session")
def shared_server(tokenizer: Tokenizer) -> Iterator[Running]:
    with run_server(StubModel(tokenizer)) as running:
        yield running


@pytest.fixture
def server(shared_server: Running) -> Iterator[Running]:
    """The server, its engine at full speed; afterwards it must be idle and healthy."""
    engine = shared_server.model.engine
    engine.seconds_per_token, engine.failing = 0.0, False
    engine.submitted.clear()
    yield shared_server
    assert wait_until(lambda: not engine.running), "a request was left running in the engine"
    assert shared_server.http.get("/health").status_code == 200
    assert shared_server.chat(max_tokens=2).status_code == 200


@pytest.fixture
def own_server(tokenizer: Tokenizer) -> Iterator[Running]:
    """A server that the test may stop."""
    with run_server(StubModel(tokenizer)) as running:
        yield running
