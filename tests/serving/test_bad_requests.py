"""Everything a server is sent that it must refuse by name, staying alive. Rows as in the list of known incidents."""

import itertools
import json
import re
import time
from typing import Any

import httpx
import pytest

from tests.serving.conftest import Running

LEAKS = re.compile(r"0x[0-9a-f]+|/home|/usr|/root|/tmp|site-packages|Traceback|\.py\b")
ROUTES = ["/v1/chat/completions", "/v1/completions"]
SMALLEST = {
    "/v1/chat/completions": '"messages": [{"role": "user", "content": "Hi"}]',
    "/v1/completions": '"prompt": "Hi"',
}


def refusal(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error object, after checking its form and that it tells nothing of the machine."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert not LEAKS.search(answer.text), answer.text
    assert len(answer.text) < 3000
    return error


def post_raw(server: Running, route: str, fields: str, **options: Any) -> httpx.Response:
    """POST raw JSON: the smallest valid body with `fields` added."""
    body = "{" + SMALLEST[route] + (", " + fields if fields else "") + "}"
    return server.http.post(route, content=body.encode(), **options)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400"])
def test_row_4_numbers_that_are_none(server: Running, route: str, field: str, value: str) -> None:
    error = refusal(post_raw(server, route, f'"{field}": {value}'))
    assert error["param"] == field and field in error["message"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", ["-0.1", "2.1", '"1"', "true", "[]"]),
        ("top_p", ["0", "-1", "1.1", '"1"', "true"]),
        ("top_k", ["-1", "1.5", '"1"', "true", "2147483648", "9223372036854775808"]),
        ("min_p", ["-0.1", "1.1"]),
        ("repetition_penalty", ["0", "-1", "11"]),
        ("n", ["0", "-1", "9", "1000000", "1000000000000", "9223372036854775808", "1.5", '"1"', "true"]),
        ("seed", ["9223372036854775808", "1.5", '"1"', "true"]),
        ("max_tokens", ["-1", "0", "1.5", '"1"', "true", "2147483648", "9223372036854775808"]),
        ("stream", ["1", '"true"']),
        ("ignore_eos", ["0", '"no"']),
        ("stop", ['""', '["a", ""]', "[1]", "{}", json.dumps(["s"] * 10_000), json.dumps("s" * 2000)]),
        ("user", ["1"]),
        ("model", ["1", "[]"]),
        ("stream_options", ["{}", "1"]),
    ],
)
def test_rows_1_25_35_out_of_range(server: Running, route: str, field: str, values: list[str]) -> None:
    for value in values:
        start = time.monotonic()
        error = refusal(post_raw(server, route, f'"{field}": {value}'))
        assert field in error["message"] and error["param"] == field, (value, error)
        assert time.monotonic() - start < 1


@pytest.mark.parametrize("route", ROUTES)
def test_row_25_extreme_but_valid(server: Running, route: str) -> None:
    for fields in ('"seed": -1', '"seed": 9223372036854775807, "n": 2', '"top_k": 2147483647', '"seed": 0'):
        assert post_raw(server, route, fields).status_code == 200, fields


@pytest.mark.parametrize(
    ("route", "field", "value"),
    [
        ("/v1/completions", "best_of", "1000000"),
        ("/v1/completions", "suffix", '"end"'),
        ("/v1/completions", "prompt_embeds", '"AAAA"'),
        ("/v1/completions", "logprobs", "21"),
        ("/v1/completions", "logprobs", "1000000"),
        ("/v1/completions", "logprobs", "true"),
        ("/v1/completions", "echo", "1"),
        ("/v1/chat/completions", "logprobs", "1"),
        ("/v1/chat/completions", "logprobs", '"yes"'),
        ("/v1/chat/completions", "frequency_penalty", "0.1"),
        ("/v1/chat/completions", "frequency_penalty", "false"),
        ("/v1/chat/completions", "presence_penalty", "-2"),
        ("/v1/chat/completions", "tools", '[{"type": "function", "function": {"name": "f", "parameters": {}}}]'),
        ("/v1/chat/completions", "tool_choice", '"required"'),
        ("/v1/chat/completions", "response_format", '{"type": "json_object"}'),
        ("/v1/chat/completions", "functions", '[{"name": "f"}]'),
        ("/v1/chat/completions", "modalities", '["audio"]'),
        ("/v1/chat/completions", "store", "true"),
        ("/v1/chat/completions", "metadata", '{"a": "b"}'),
        ("/v1/chat/completions", "reasoning_effort", '"high"'),
        ("/v1/chat/completions", "logit_bias", '{"50256": -100}'),
        ("/v1/chat/completions", "logit_bias", json.dumps({str(i): 1 for i in range(50_000)})),
        ("/v1/chat/completions", "guided_regex", '"(a|a)*b"'),
        ("/v1/chat/completions", "chat_template", '"{% for i in range(10**9) %}{% endfor %}"'),
        ("/v1/chat/completions", "chat_template_kwargs", '{"tokenize": true}'),
        ("/v1/chat/completions", "temprature", "1"),
        ("/v1/chat/completions", "prompt", '"Hi"'),
    ],
)
def test_rows_2_10_11_17_35_unsupported_fields(server: Running, route: str, field: str, value: str) -> None:
    error = refusal(post_raw(server, route, f'"{field}": {value}'))
    assert error["param"] == field and field in error["message"]


def test_unknown_field_names_the_nearest(server: Running) -> None:
    assert "'temperature'" in refusal(server.chat(temprature=1))["message"]
    assert "'include_usage'" in refusal(server.chat(stream=True, stream_options={"include_use": True}))["message"]
    message = [{"role": "user", "contents": "Hi"}]
    assert "'content'" in refusal(server.chat(messages=message))["message"]


def test_top_logprobs(server: Running) -> None:
    for value in (-1, 21, 10**6, True, "5"):
        assert refusal(server.chat(logprobs=True, top_logprobs=value))["param"] == "top_logprobs"
    assert "needs logprobs" in refusal(server.chat(top_logprobs=5))["message"]


def test_two_limits_that_differ(server: Running) -> None:
    assert "differ" in refusal(server.chat(max_tokens=5, max_completion_tokens=6))["message"]
    assert server.chat(max_tokens=5, max_completion_tokens=5).status_code == 200


@pytest.mark.parametrize("prompt", ["", [], [[]], [""], ["a", ""], [[1], []], None, 7, {}, [1, "a"], [["a"]], [1.5],
                                    [True], ["a"] * 65, [-1], [448], [2**63], [[0, 10**6]]])  # fmt: skip
def test_row_3_prompts(server: Running, prompt: Any) -> None:
    assert refusal(server.complete(prompt=prompt))["param"] == "prompt"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        (None, "messages"),
        ("Hi", "messages"),
        ({}, "messages"),
        ([[]], "messages.0"),
        (["Hi"], "messages.0"),
        ([{}], "messages.0.role"),
        ([{"role": "user"}], "messages.0.content"),
        ([{"role": "user", "content": None}], "messages.0.content"),
        ([{"role": "user", "content": 5}], "messages.0.content"),
        ([{"role": "tool", "content": "x", "tool_call_id": "1"}], "messages.0.tool_call_id"),
        ([{"role": "root", "content": "x"}], "messages.0.role"),
        ([{"role": "user", "content": "x", "name": "Eve"}], "messages.0.name"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
         "messages.0.content"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "messages.0.content"),
        ([{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}], "messages.0.content"),
        ([{"role": "user", "content": ["a"]}], "messages.0.content"),
        ([{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}], "messages.0.tool_calls"),
        ([{"role": "user", "content": "x"}] * 1001, "messages"),
    ],
)  # fmt: skip
def test_messages(server: Running, messages: Any, param: str) -> None:
    assert refusal(server.chat(messages=messages))["param"] == param


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"text"', b"{'a': 1}", b'{"messages": "\xff"}', b'{"prompt": "\\ud800"}',
     b"[" * 10_000, b'{"a":' * 10_000, b'{"n": ' + b"9" * 5000 + b"}", b"\x00", b"\xef\xbb\xbf{}",
     b"--x\r\nContent-Disposition: a"],
)  # fmt: skip
def test_row_9_bodies_that_are_no_json(server: Running, route: str, body: bytes) -> None:
    assert refusal(server.http.post(route, content=body))["code"] == "invalid_json"


def test_many_problems_are_told_at_once_and_briefly(server: Running) -> None:
    error = refusal(server.chat(temperature=9, top_p=9, n=99))
    assert error["param"] == "temperature" and all(name in error["message"] for name in ("temperature", "top_p", "n"))
    start = time.monotonic()
    error = refusal(server.http.post("/v1/chat/completions", json={f"field{i}": 1 for i in range(40_000)}))
    assert "and 39" in error["message"] and time.monotonic() - start < 2
    messages = [{"role": "user", "content": i} for i in range(900)]
    assert "more" in refusal(server.chat(messages=messages))["message"]


@pytest.mark.parametrize("size", [10_000, 1_000_000])
def test_row_34_long_text_is_refused_before_it_is_tokenized(server: Running, size: int) -> None:
    start = time.monotonic()
    error = refusal(server.complete(prompt="a" * size))
    assert error["code"] == "context_length_exceeded" and error["param"] == "prompt"
    assert "at least" in error["message"] and "256" in error["message"]
    assert time.monotonic() - start < 1


def test_context_overflow_gives_both_numbers(server: Running) -> None:
    error = refusal(server.complete(prompt=[1] * 256))
    assert error["code"] == "context_length_exceeded"
    assert "256 tokens" in error["message"] and "holds 256" in error["message"]
    error = refusal(server.complete(prompt=[1] * 200, max_tokens=57))
    assert error["code"] == "context_length_exceeded" and error["param"] == "max_tokens"
    assert "257 in all" in error["message"] and "holds 256" in error["message"]
    # The largest that fit: one token of answer, or none but an echo.
    assert server.complete(prompt=[1] * 255, max_tokens=1).status_code == 200
    assert server.complete(prompt=[1] * 256, max_tokens=0, echo=True).status_code == 200


@pytest.mark.parametrize("size", [1024 * 1024 + 1, 10 * 1024 * 1024])
def test_rows_22_34_body_too_large(server: Running, size: int) -> None:
    body = b'{"prompt": "' + b"a" * (size - 14) + b'"}'
    assert refusal(server.http.post("/v1/completions", content=body), 413)["code"] == "body_too_large"
    chunks = (body[start : start + 65_536] for start in range(0, size, 65_536))  # without Content-Length
    refusal(server.http.post("/v1/completions", content=chunks), 413)


def test_row_28_compressed_body(server: Running) -> None:
    refusal(post_raw(server, "/v1/completions", "", headers={"content-encoding": "gzip"}), 415)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/completions", 405), ("DELETE", "/v1/models", 405), ("POST", "/", 405), ("PUT", "/health", 405),
     ("GET", "/v1/engines", 404), ("POST", "/completions", 404), ("GET", "//v1/models", 404), ("GET", "/docs", 404),
     ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404), ("GET", "/../../etc/passwd", 404), ("GET", "/%00", 404),
     ("GET", "/v1/models/" + "x" * 5000, 404), ("GET", "/favicon.ico", 404)],
)  # fmt: skip
def test_routes_that_are_none(server: Running, method: str, path: str, status: int) -> None:
    refusal(server.http.request(method, path), status)


def test_pairs_of_features(server: Running) -> None:
    """Row 32: no combination of valid fields breaks the server."""
    options: list[dict[str, Any]] = [
        {"stream": True}, {"n": 2}, {"seed": 1}, {"stop": ["a", "b"]}, {"top_k": 1}, {"repetition_penalty": 1.2},
        {"temperature": 0}, {"max_tokens": 3}, {"ignore_eos": True, "max_tokens": 5}, {"user": "me"},
    ]  # fmt: skip
    chat_only = [{"logprobs": True}, {"logprobs": True, "top_logprobs": 3}, {"max_completion_tokens": 3}]
    text_only = [{"logprobs": 2}, {"echo": True}, {"prompt": [[1, 2], [3]]}]
    for send, more in ((server.chat, chat_only), (server.complete, text_only)):
        for first, second in itertools.combinations(options + more, 2):
            answer = send(**{**first, **second})
            fields = {"max_tokens", "max_completion_tokens"}
            limits = {value for name, value in {**first, **second}.items() if name in fields}
            assert answer.status_code == (400 if len(limits) > 1 else 200), (first, second, answer.text)


def test_openapi_describes_the_bodies(server: Running) -> None:
    description = server.http.get("/openapi.json").json()
    for route, name in (("/v1/chat/completions", "ChatRequest"), ("/v1/completions", "CompletionRequest")):
        operation = description["paths"][route]["post"]
        assert operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith(name)
        assert "400" in operation["responses"]
    fields = description["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "temperature", "max_completion_tokens", "top_logprobs"} <= set(fields)
