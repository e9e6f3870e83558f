"""The server around the real engine and a tiny random model, in a process of its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from lalia.formats.hf_folder import save_model
from lalia.inference.language_model import LanguageModel
from lalia.tokenizer.bpe import Tokenizer
from tests.serving.conftest import Running, run_server
from tests.serving.stub import make_transformer, wait_until
from tests.serving.test_bad_requests import refusal

MESSAGES: list[Any] = [{"role": "user", "content": "Shall I compare thee"}]


@pytest.fixture(scope="module")
def real(tokenizer: Tokenizer) -> Iterator[Running]:
    with run_server(LanguageModel(make_transformer(tokenizer), tokenizer, "tiny", max_batch=4)) as running:
        yield running


def test_server_gives_what_the_python_api_gives(real: Running, tokenizer: Tokenizer) -> None:
    model = LanguageModel(make_transformer(tokenizer), tokenizer, "tiny")
    sampling: dict[str, Any] = {"max_tokens": 24, "temperature": 0.9, "seed": 11}
    chat = real.client.chat.completions.create(model="tiny", messages=MESSAGES, **sampling)
    assert chat.choices[0].message.content == model.chat(MESSAGES, **sampling)
    text = real.client.completions.create(model="tiny", prompt="Thou art", **sampling)
    wanted = model.generate("Thou art", **sampling)
    assert (text.choices[0].text, text.choices[0].finish_reason) == (wanted.text, wanted.finish_reason)
    assert text.usage is not None and text.usage.completion_tokens == len(wanted.token_ids)
    streamed = real.client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True, **sampling)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == chat.choices[0].message.content
    other = real.client.chat.completions.create(model="tiny", messages=MESSAGES, **{**sampling, "seed": 12})
    assert other.choices[0].message.content != chat.choices[0].message.content


def test_echoed_logprobs_are_the_models(real: Running, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Rough winds do shake the darling buds of May")
    answer = real.client.completions.create(
        model="tiny", prompt=[ids], echo=True, logprobs=3, max_tokens=1, temperature=0
    )
    described = answer.choices[0].logprobs
    assert described is not None and described.token_logprobs and described.top_logprobs
    wanted = real.model.log_probs(torch.tensor(ids)).tolist()
    assert described.token_logprobs[1:-1] == pytest.approx(wanted, abs=1e-4)
    # Greedy: the new token is the likeliest of those weighed, and its own log-probability is among them.
    assert described.token_logprobs[-1] == pytest.approx(max(described.top_logprobs[-1].values()), abs=1e-6)


def test_sampling_beside_others_is_the_same(real: Running) -> None:
    """The whole set of parameters reaches the sampler, with and without company in the batch."""
    wanted: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 30, "seed": 3, "logprobs": True, "top_logprobs": 2}
    wanted |= {"top_k": 50, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1}
    alone = real.chat(**wanted).json()["choices"][0]
    beside = real.chat(**wanted, n=8).json()["choices"]
    assert beside[0]["message"] == alone["message"]
    assert len({choice["message"]["content"] for choice in beside}) > 1


def test_leaving_clients_free_the_engine(real: Running) -> None:
    for _ in range(8):
        with real.http.stream("POST", "/v1/chat/completions", json={"messages": MESSAGES, "stream": True, "n": 2}) as r:
            next(r.iter_lines())
    assert wait_until(lambda: real.model.engine.stats()["running"] + real.model.engine.stats()["waiting"] == 0)
    assert real.chat(max_tokens=1).is_success


def test_context_limit_is_reached_and_not_passed(real: Running) -> None:
    body = {"prompt": [[5] * 250], "ignore_eos": True, "temperature": 0}
    answer = real.http.post("/v1/completions", json=body).json()
    assert answer["usage"] == {"prompt_tokens": 250, "completion_tokens": 6, "total_tokens": 256}
    assert answer["choices"][0]["finish_reason"] == "length"
    error = refusal(real.http.post("/v1/completions", json={**body, "max_tokens": 7}))
    assert error["code"] == "context_length_exceeded"


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_model(make_transformer(tokenizer, 4096), path)
    tokenizer.save(path)
    return path


def test_process_serves_drains_on_sigterm_and_ends_cleanly(folder: Path) -> None:
    """Signals, port and exit status of the real thing."""
    code = f"from lalia.serving.server import serve; serve({str(folder)!r}, port=0, max_length=1000)"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith("tiny answers at http://127.0.0.1:"), line + process.stderr.read()
        url = line.split()[3]
        refusal(httpx.post(f"{url}/v1/completions", json={"prompt": ""}))
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["max_model_len"] == 1000
        assert httpx.get(f"{url}/health", headers={"host": "evil.example"}).status_code == 400
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            stream = client.completions.create(
                model="tiny", prompt="Thou", stream=True, max_tokens=700, extra_body={"ignore_eos": True}
            )
            chunks = iter(stream)
            next(chunks)
            process.send_signal(signal.SIGTERM)
            assert wait_until(lambda: httpx.get(f"{url}/health").status_code == 503)
            refusal(httpx.post(f"{url}/v1/completions", json={"prompt": "Thou"}), 503)
            assert list(chunks)[-1].choices[0].finish_reason == "length"
        start = time.monotonic()
        assert process.wait(10) == 0
        assert time.monotonic() - start < 5
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
