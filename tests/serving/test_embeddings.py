"""POST /v1/embeddings as OpenAI's own client uses it, for an encoder and for a language model."""

import asyncio
import base64
import contextlib
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
import openai
import pytest

import lalia
from lalia.inference.encoder import Encoder
from lalia.inference.language_model import LanguageModel
from lalia.serving import embeddings
from lalia.tokenizer.bpe import Tokenizer
from tests.inference.encoders import TEXTS, make_folder
from tests.serving.conftest import Running, run_server
from tests.serving.stub import make_transformer

TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return lalia.load(make_folder(tmp_path_factory.mktemp("models") / "bert", "BertModel"))


@pytest.fixture(scope="module")
def serving(encoder: Encoder) -> Iterator[Running]:
    with run_server(encoder) as running:
        yield running


def post(serving: Running, **fields: Any) -> httpx.Response:
    return serving.http.post("/v1/embeddings", json={"input": "day", **fields})


def refusal(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_openai_client(serving: Running, encoder: Encoder) -> None:
    assert [model.id for model in serving.client.models.list()] == ["bert"]
    answer = serving.client.embeddings.create(model="bert", input=TEXTS)  # as base64, unless told otherwise
    assert [entry.index for entry in answer.data] == list(range(len(TEXTS)))
    vectors = np.array([entry.embedding for entry in answer.data])
    wanted = encoder.embed(TEXTS)
    assert np.abs(vectors - wanted).max() < TOLERANCE
    assert np.abs(vectors - wanted[::-1]).max() > 1e-2
    num_tokens = sum(map(len, encoder.encode(TEXTS)))
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == num_tokens
    floats = serving.client.embeddings.create(model="bert", input=TEXTS, encoding_format="float")
    assert np.abs(np.array([entry.embedding for entry in floats.data]) - wanted).max() < TOLERANCE


def test_formats(serving: Running, encoder: Encoder) -> None:
    wanted = encoder.embed(["day"])[0]
    plain = post(serving).json()
    assert plain["object"] == "list" and plain["model"] == "bert" and plain["data"][0]["object"] == "embedding"
    assert plain["data"][0]["embedding"] == pytest.approx(wanted.tolist(), abs=TOLERANCE)
    packed = base64.b64decode(post(serving, encoding_format="base64").json()["data"][0]["embedding"])
    assert struct.unpack(f"<{len(wanted)}f", packed) == pytest.approx(wanted.tolist(), abs=TOLERANCE)


def test_token_ids(serving: Running, encoder: Encoder) -> None:
    ids = encoder.encode(TEXTS[:3])
    wanted = encoder.embed(TEXTS[:3])
    for given, count in ((ids, 3), (ids[0], 1)):
        answer = serving.client.embeddings.create(model="bert", input=given)
        assert len(answer.data) == count
        assert np.abs(np.array([entry.embedding for entry in answer.data]) - wanted[:count]).max() < TOLERANCE


def test_fields_that_ask_for_nothing(serving: Running) -> None:
    assert post(serving, dimensions=32, user="me", model=None).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"input": []}, "input", "the input is empty"),
        ({"input": [[]]}, "input", "the input is empty"),
        ({"input": ["a", 5]}, "input", "expected a string, a list of strings"),
        ({"input": [["a"]]}, "input", "expected a string, a list of strings"),
        ({"input": None}, "input", "expected a string"),
        ({"input": [True]}, "input", "expected a string"),
        ({"input": ["a"] * 2049}, "input", "2049 texts, at most 2048"),
        ({"input": [5000]}, "input", "token id 5000 is outside the vocabulary of 0 to"),
        ({"input": [-1]}, "input", "token id -1 is outside"),
        ({"input": ["day", "summer " * 60]}, "input", "input.1: 62 tokens, but this model reads 48; shorten or split"),
        ({"dimensions": 16}, "dimensions", "vectors have 32 and are not made to be cut"),
        ({"encoding_format": "hex"}, "encoding_format", "must be 'float' or 'base64'"),
        ({"inputs": "x"}, "inputs", "did you mean 'input'"),
    ],
)
def test_refusals(serving: Running, fields: dict[str, Any], param: str, message: str) -> None:
    error = refusal(post(serving, **fields))
    assert error["param"] == param and message in error["message"] and error["type"] == "invalid_request_error"


def test_other_refusals(serving: Running) -> None:
    assert "is required" in refusal(serving.http.post("/v1/embeddings", json={}))["message"]
    assert refusal(serving.http.post("/v1/embeddings", content=b"{"))["code"] == "invalid_json"
    assert refusal(post(serving, input=["summer " * 60]))["code"] == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match="this server has 'bert'"):
        serving.client.embeddings.create(model="gpt", input="day")
    assert serving.http.get("/v1/embeddings").status_code == 405


def test_an_encoder_does_not_chat(serving: Running) -> None:
    messages: list[Any] = [{"role": "user", "content": "Hello"}]
    with pytest.raises(openai.BadRequestError, match="'bert' generates no text: it makes vectors of texts"):
        serving.client.chat.completions.create(model="bert", messages=messages)
    with pytest.raises(openai.BadRequestError, match="at /v1/embeddings"):
        serving.client.completions.create(model="bert", prompt="Hello")
    assert "POST /v1/embeddings" in serving.http.get("/").text
    assert serving.http.get("/health").json() == {"status": "ok"}
    assert "EmbeddingRequest" in serving.http.get("/openapi.json").json()["components"]["schemas"]


def test_a_language_model_makes_vectors_too(tokenizer: Tokenizer) -> None:
    model = LanguageModel(make_transformer(tokenizer), tokenizer, "tiny")
    with run_server(model) as running:
        answer = running.client.embeddings.create(model="tiny", input=["Thou art", "lovely"])
    vectors = np.array([entry.embedding for entry in answer.data])
    assert np.abs(vectors - lalia.embed(model, ["Thou art", "lovely"])).max() < TOLERANCE


def test_requests_take_turns_and_the_server_stays_awake(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Encoder(encoder.model, encoder.tokenizer, "slow")
    compute, running_now, most_at_once = slow.embed_ids, 0, 0

    def embed_ids(ids: Any, batch_size: int = 32) -> np.ndarray:
        nonlocal running_now, most_at_once
        running_now += 1
        most_at_once = max(most_at_once, running_now)
        time.sleep(0.03)
        running_now -= 1
        return compute(ids, batch_size)

    monkeypatch.setattr(slow, "embed_ids", embed_ids)
    ended: dict[str, float] = {}
    with run_server(slow) as running:

        def ask(name: str, texts: list[str]) -> None:
            assert post(running, input=texts).status_code == 200
            ended[name] = time.monotonic()

        long = threading.Thread(target=ask, args=("long", ["day"] * 32 * 40))
        long.start()
        time.sleep(0.1)
        began = time.monotonic()
        assert running.http.get("/health").status_code == 200
        assert time.monotonic() - began < 0.5
        ask("short", ["day"])
        long.join()
        assert ended["short"] < ended["long"] - 0.3
        assert most_at_once == 1
        monkeypatch.setattr(embeddings, "MAX_WAITING_TEXTS", 3)
        assert refusal(post(running, input=["day"] * 4), 503)["code"] == "overloaded"
        assert post(running, input=["day"] * 3).status_code == 200
        running.server._cut_off()
        assert refusal(post(running), 503)["code"] == "stopping"


def test_serve_takes_an_encoders_folder_and_refuses_clip(tmp_path: Path) -> None:
    from lalia.errors import UserError
    from lalia.serving.server import serve
    from tests.inference.test_clip import make_folder as make_clip

    with pytest.raises(UserError, match="is a CLIP model"):
        serve(make_clip(tmp_path / "clip", 2), port=0)


def test_a_client_that_leaves_does_not_give_its_turn_away() -> None:
    """The computation under way goes on alone: never two at once, however many clients come and leave."""
    running = most = 0

    class Slow:
        dim, max_length = 2, 8

        def embed_ids(self, ids: list[list[int]], batch_size: int) -> np.ndarray:
            nonlocal running, most
            running += 1
            most = max(most, running)
            time.sleep(0.05)
            running -= 1
            return np.zeros((len(ids), 2), np.float32)

    async def clients() -> None:
        service = embeddings.Embeddings(cast(Any, Slow()), "slow")
        for _ in range(4):
            task = asyncio.ensure_future(service._embed([[1]]))
            await asyncio.sleep(0.01)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await asyncio.gather(*service._turns, return_exceptions=True)

    asyncio.run(clients())
    assert most == 1
