"""The API as OpenAI's own client uses it."""

import json
import math
from typing import Any

import openai
import pytest
import torch

from tests.serving.conftest import Running
from tests.serving.stub import ANSWER

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


def test_models(server: Running) -> None:
    models = server.client.models.list().data
    assert [model.id for model in models] == ["sonnet"]
    assert models[0].model_extra == {"max_model_len": 256}
    assert server.client.models.retrieve("sonnet").owned_by == "lalia"
    with pytest.raises(openai.NotFoundError, match="this server has 'sonnet'"):
        server.client.models.retrieve("gpt-4")


def test_chat(server: Running) -> None:
    answer = server.client.chat.completions.create(model="sonnet", messages=HELLO)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is None
    assert answer.usage is not None
    request = server.model.engine.submitted[0]
    assert answer.usage.prompt_tokens == len(request.prompt)
    assert answer.usage.completion_tokens == len(server.model.tokenizer.encode(ANSWER)) + 1  # the end
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_prompt_is_the_rendered_conversation(server: Running) -> None:
    answer = server.client.chat.completions.create(model="sonnet", messages=HELLO).choices[0].message
    # The client's own answer object, with its nulls, is valid history.
    server.client.chat.completions.create(
        model="sonnet",
        messages=[
            {"role": "developer", "content": "Be brief."},
            *HELLO,
            answer.model_dump(),  # pyright: ignore[reportArgumentType]
            {"role": "user", "content": [{"type": "text", "text": "And"}, {"type": "text", "text": "more?"}]},
        ],
    )
    tokenizer = server.model.tokenizer
    prompt = server.model.engine.submitted[-1].prompt
    wanted = f"system\nBe brief.\nuser\nHello\nassistant\n{ANSWER}\nuser\nAnd\nmore?\nassistant\n"
    assert tokenizer.decode(prompt) == wanted
    assert prompt.count(tokenizer.turn_start_id) == 5
    assert prompt.count(tokenizer.turn_end_id) == 4


def test_specials_in_text_stay_text(server: Running) -> None:
    literals = list(server.model.tokenizer.special)
    assert server.chat(messages=[{"role": "user", "content": "".join(literals)}]).status_code == 200
    prompt = server.model.engine.submitted[-1].prompt
    assert sum(i in server.model.tokenizer.special.values() for i in prompt) == 3  # the template's own
    assert server.complete(prompt="<|endoftext|>").status_code == 200
    assert server.model.engine.submitted[-1].prompt.count(server.model.tokenizer.end_of_text_id) == 1  # the beginning


def test_chat_stream_with_usage(server: Running) -> None:
    chunks = list(
        server.client.chat.completions.create(
            model="sonnet", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
    )
    *body, last = chunks
    assert last.choices == [] and last.usage is not None
    assert last.usage.completion_tokens == len(server.model.tokenizer.encode(ANSWER)) + 1
    assert all(chunk.usage is None for chunk in body)
    assert body[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in body) == ANSWER
    assert [chunk.choices[0].finish_reason for chunk in body] == [None] * (len(body) - 1) + ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(body) > 5  # it came in pieces


def test_stream_helper_of_the_client(server: Running) -> None:
    with server.client.chat.completions.stream(model="sonnet", messages=HELLO) as stream:
        stream.until_done()
        assert stream.get_final_completion().choices[0].message.content == ANSWER


def test_form_of_the_event_stream(server: Running) -> None:
    answer = server.chat(stream=True, max_tokens=1, stream_options={"continuous_usage_stats": True})
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 1]


def test_chat_logprobs(server: Running) -> None:
    answer = server.client.chat.completions.create(
        model="sonnet", messages=HELLO, logprobs=True, top_logprobs=5, max_tokens=40
    )
    described = answer.choices[0].logprobs
    assert described is not None and described.content is not None
    ids = server.model.tokenizer.encode(ANSWER)
    *words, end = described.content
    assert [entry.bytes for entry in words] == [list(server.model.tokenizer.token_bytes(i)) for i in ids]
    assert (end.token, end.bytes) == ("<|im_end|>", None)
    assert b"".join(bytes(entry.bytes or []) for entry in described.content).decode() == ANSWER
    for entry in described.content:
        assert len(entry.top_logprobs) == 5
        shares = [math.exp(other.logprob) for other in entry.top_logprobs]
        assert sum(shares) <= 1 and shares == sorted(shares, reverse=True)
    # The heart is three bytes in several tokens, none of which is a character.
    assert words[-1].token.startswith("bytes:\\x")


def test_chat_logprobs_in_a_stream_are_the_same(server: Running) -> None:
    wanted = {"logprobs": True, "top_logprobs": 2, "max_tokens": 30}
    whole = server.client.chat.completions.create(model="sonnet", messages=HELLO, **wanted)
    streamed: list[Any] = []
    for chunk in server.client.chat.completions.create(model="sonnet", messages=HELLO, stream=True, **wanted):
        if chunk.choices[0].logprobs is not None:
            streamed += chunk.choices[0].logprobs.content or []
    assert whole.choices[0].logprobs is not None
    assert [entry.model_dump() for entry in streamed] == [
        entry.model_dump() for entry in whole.choices[0].logprobs.content or []
    ]


def test_sampling_reaches_the_engine(server: Running) -> None:
    server.client.chat.completions.create(
        model="sonnet",
        messages=HELLO,
        max_completion_tokens=7,
        temperature=0.3,
        top_p=0.9,
        seed=5,
        n=3,
        stop=["x", "y"],
        frequency_penalty=0,
        presence_penalty=0.0,
        response_format={"type": "text"},
        extra_body={"top_k": 4, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True, "logit_bias": None},
    )
    params = [request.params for request in server.model.engine.submitted]
    assert [p.seed for p in params] == [5, 6, 7]
    assert all(
        (p.max_tokens, p.temperature, p.top_p, p.top_k, p.min_p, p.repetition_penalty, p.stop, p.ignore_eos)
        == (7, 0.3, 0.9, 4, 0.1, 1.1, ("x", "y"), True)
        for p in params
    )


def test_defaults_are_the_samplers(server: Running) -> None:
    server.chat(temperature=None, top_p=None, max_tokens=None, seed=None, n=None, stop=None, logprobs=None)
    params = server.model.engine.submitted[0].params
    assert params == type(params)()
    server.complete(temperature=None, logprobs=None)
    assert server.model.engine.submitted[1].params.max_tokens == 16


def test_several_choices(server: Running) -> None:
    asked: dict[str, Any] = {"model": "sonnet", "messages": HELLO, "n": 3, "max_tokens": 4}
    whole = server.client.chat.completions.create(**asked)
    assert [choice.message.content for choice in whole.choices] == ["Thou art more lovely"] * 3
    assert whole.usage is not None and whole.usage.completion_tokens == 12
    texts, reasons = ["", "", ""], ["", "", ""]
    for chunk in server.client.chat.completions.create(**asked, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason or ""
    assert texts == ["Thou art more lovely"] * 3
    assert reasons == ["length"] * 3


def test_completions_stream(server: Running) -> None:
    chunks = list(
        server.client.completions.create(
            model="sonnet", prompt="Thou", stream=True, max_tokens=4, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == "Thou art more lovely"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 4


@pytest.mark.parametrize(
    ("prompt", "count"),
    [("Thou art", 1), (["Thou art", "And"], 2), ([1, 2, 3], 1), ([[1, 2, 3], [4]], 2), ([[258], [1, 2], [3]], 3)],
)
def test_every_form_of_prompt(server: Running, prompt: Any, count: int) -> None:
    answer = server.client.completions.create(model="sonnet", prompt=prompt, max_tokens=2, n=2)
    assert [choice.index for choice in answer.choices] == list(range(2 * count))
    prompts = [request.prompt for request in server.model.engine.submitted]
    encode = server.model.encode
    forms = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    ids = [encode(form) if isinstance(form, str) else form for form in forms]
    assert prompts == [each for each in ids for _ in range(2)]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (sum(map(len, ids)), 4 * count)


def test_echo_with_logprobs_scores_the_prompt(server: Running) -> None:
    """What lm-evaluation-harness does; the reference is the model's own softmax."""
    ids = server.model.tokenizer.encode("Shall I compare thee to a summer's day?")
    answer = server.client.completions.create(
        model="sonnet", prompt=[ids], max_tokens=1, echo=True, logprobs=1, temperature=0, seed=1234
    )
    choice = answer.choices[0]
    assert choice.text == "Shall I compare thee to a summer's day?Thou"
    described = choice.logprobs
    assert described is not None and described.token_logprobs and described.top_logprobs and described.tokens
    assert len(described.token_logprobs) == len(described.tokens) == len(ids) + 1
    assert described.token_logprobs[0] is None and described.top_logprobs[0] is None  # pyright: ignore
    model = server.model.model
    with torch.no_grad():
        log_probs = model.logits(model(torch.tensor([ids])))[0].log_softmax(-1)
    for position, token_id in enumerate(ids[1:], 1):
        assert described.token_logprobs[position] == pytest.approx(float(log_probs[position - 1, token_id]), abs=1e-4)
        best = int(log_probs[position - 1].argmax())
        top = described.top_logprobs[position]
        assert max(top.values()) == pytest.approx(float(log_probs[position - 1, best]), abs=1e-4)
        assert described.tokens[position] in top
    assert described.text_offset is not None
    for offset, token in zip(described.text_offset, described.tokens, strict=True):
        assert choice.text[offset:].startswith(token)


@pytest.mark.parametrize("stream", [False, True])
def test_echo_without_new_tokens(server: Running, stream: bool) -> None:
    answer = server.complete(max_tokens=0, echo=True, logprobs=0, stream=stream)
    assert server.model.engine.submitted == []
    body = json.loads(answer.text.split("\n\n")[0].removeprefix("data: "))
    assert body["choices"][0]["text"] == "Thou art"
    assert body["choices"][0]["logprobs"]["tokens"] == ["<|endoftext|>", "Thou", " art"]
    assert body["choices"][0]["logprobs"]["text_offset"] == [0, 0, 4]


def test_errors_raise_the_clients_exceptions(server: Running) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client.chat.completions.create(model="sonnet", messages=HELLO, temperature=7)
    assert caught.value.param == "temperature" and "7" in caught.value.message
    with pytest.raises(openai.NotFoundError) as missing:
        server.client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert missing.value.code == "model_not_found" and "'sonnet'" in missing.value.message
    with pytest.raises(openai.BadRequestError) as long:
        server.client.chat.completions.create(model="sonnet", messages=[{"role": "user", "content": "zq" * 300}])
    assert long.value.code == "context_length_exceeded" and "256" in long.value.message


def test_engine_failure_is_an_error_in_both_forms(server: Running) -> None:
    server.model.engine.failing = True
    with pytest.raises(openai.InternalServerError) as whole:
        server.client.chat.completions.create(model="sonnet", messages=HELLO)
    with pytest.raises(openai.APIError) as streamed:
        list(server.client.chat.completions.create(model="sonnet", messages=HELLO, stream=True))
    for error in (whole.value, streamed.value):
        assert "the engine failed" in error.message
        assert "0xdeadbeef" not in str(error.body) and "/home" not in str(error.body)
    server.model.engine.failing = False
