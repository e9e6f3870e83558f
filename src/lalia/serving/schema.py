"""The bodies of requests: what is understood, what is refused, and the message for each refusal.

Nothing is ignored. A field of OpenAI's API that this server does not implement is accepted only with the value that
asks for nothing (null, or those in `NEUTRAL`), so that clients which always send it still work.
"""

from typing import Annotated, Any, Literal, Self, TypeVar

import pydantic_core
from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from lalia.inference.sampling import MAX_STOP_CHARACTERS, MAX_STOP_STRINGS, SamplingParams
from lalia.serving.errors import ApiError, did_you_mean, shown
from lalia.settings import Settings

MAX_CHOICES = 8
MAX_PROMPTS = 64
MAX_INPUTS = 2048
"""Texts of one request to /v1/embeddings, as OpenAI has it."""
MAX_LOGPROBS = 20
MAX_MESSAGES = 1000
SHOWN_PROBLEMS = 8
"""How many problems of one body an error message tells."""
COMPLETION_TOKENS = 16
"""max_tokens of /v1/completions where the request names none, as OpenAI has it."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_json": (),
    "guided_regex": (),
    "logit_bias": ({},),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "prompt_cache_key": (),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields of other servers that we do not implement, and the values besides null that ask for nothing."""

NEUTRAL_IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (),
    "reasoning_content": ("",),
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": ([],),
    "type": ("text", "message"),
}
"""The same within a message: the openai client's answers, sent back as history, carry most of these as null."""


def _content(value: Any) -> str:
    """A message's content: a string, or text parts, which are joined by line ends."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("expected a string or a list of text parts")
    texts: list[str] = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f"part of type {shown(kind)}: this model reads text only, send parts of type 'text'")
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise ValueError("a text part is {'type': 'text', 'text': '...'} and nothing else")
        texts.append(part["text"])
    return "\n".join(texts)


def _stop(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("expected a string or a list of strings")
    if len(stops) > MAX_STOP_STRINGS:
        raise ValueError(f"{len(stops)} stop strings, at most {MAX_STOP_STRINGS} are allowed")
    if any(not 0 < len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        raise ValueError(f"a stop string has 1 to {MAX_STOP_CHARACTERS} characters")
    return stops


def _prompts(value: Any) -> list[str | list[int]]:
    """Any of OpenAI's four forms as a list of texts and token-id lists."""
    if _is_ids(value) or isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not (all(isinstance(p, str) for p in value) or all(map(_is_ids, value))):
        raise ValueError("expected a string, a list of strings, a list of token ids or a list of token-id lists")
    if not value or not all(value):
        raise ValueError("the prompt is empty; give at least one character or token id")
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"{len(value)} prompts, at most {MAX_PROMPTS} per request are allowed")
    return value


def _inputs(value: Any) -> list[str | list[int]]:
    """As `_prompts`, with more of them; an empty text has a vector too, an empty list of ids has none."""
    if _is_ids(value) or isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not (all(isinstance(p, str) for p in value) or all(map(_is_ids, value))):
        raise ValueError("expected a string, a list of strings, a list of token ids or a list of token-id lists")
    if not value or any(ids == [] for ids in value):
        raise ValueError("the input is empty; give at least one text or token id")
    if len(value) > MAX_INPUTS:
        raise ValueError(f"{len(value)} texts, at most {MAX_INPUTS} per request are allowed")
    return value


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in value)


_STRINGS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
_IDS = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
_PROMPT = {"anyOf": [*_STRINGS["anyOf"], _IDS, {"type": "array", "items": _IDS, "minItems": 1}]}
_PART = {"type": "object", "properties": {"type": {"const": "text"}, "text": {"type": "string"}}, "required": ["type"]}
_CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}]}


class Message(Settings):
    """One turn of a conversation."""

    model_config = ConfigDict(strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_content), WithJsonSchema(_CONTENT)]


class StreamOptions(Settings):
    """What a stream carries besides text."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(Settings):
    """What both routes share. Null means the default, which is `SamplingParams`'."""

    model_config = ConfigDict(strict=True)

    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=0)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=2**31 - 1, description="0 keeps all tokens")
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    stop: Annotated[list[str], BeforeValidator(_stop), WithJsonSchema(_STRINGS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    user: str | None = Field(default=None, description="a label of the client's; neither used nor logged")

    @model_validator(mode="after")
    def _consistent_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise pydantic_core.PydanticCustomError("stream_options", "stream_options needs stream = true")
        return self

    @property
    def num_choices(self) -> int:
        """Answers wanted per prompt."""
        return self.n or 1

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives wanted per token, None for no log-probabilities at all."""
        raise NotImplementedError

    @property
    def asked_tokens(self) -> int | None:
        """Most tokens to produce, None where the request names no number."""
        return self.max_tokens

    def limit(self, room: int) -> int | None:
        """Most tokens to produce, None for as many as fit in `room`."""
        return self.asked_tokens

    def sampling(self, choice: int, room: int) -> SamplingParams:
        """Sampling parameters of one choice.

        Args:
            choice: which of n; each has its own seed, so that choices differ.
            room: tokens that fit behind the prompt.
        """
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "ignore_eos")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.seed is not None:
            given["seed"] = self.seed + choice
        return SamplingParams(
            max_tokens=self.limit(room), stop=tuple(self.stop or ()), logprobs=self.num_logprobs, **given
        )


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(default=None, ge=0)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _consistent_chat(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise pydantic_core.PydanticCustomError("top_logprobs", "top_logprobs needs logprobs = true")
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise pydantic_core.PydanticCustomError(
                "max_completion_tokens", "max_tokens and max_completion_tokens differ; send one of them"
            )
        if 0 in both:
            name = "max_tokens" if self.max_tokens == 0 else "max_completion_tokens"
            raise pydantic_core.PydanticCustomError(name, "{name} = 0: must be at least 1", {"name": name})
        return self

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def asked_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    prompt: Annotated[list[str | list[int]], PlainValidator(_prompts), WithJsonSchema(_PROMPT)]
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None

    @model_validator(mode="after")
    def _consistent_completion(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise pydantic_core.PydanticCustomError(
                "max_tokens", "max_tokens = 0 makes sense only with echo = true; ask for at least 1"
            )
        if len(self.prompt) * self.num_choices > MAX_PROMPTS:
            raise pydantic_core.PydanticCustomError(
                "n",
                "{prompts} prompts x n = {n} is more than {limit} answers",
                {"prompts": len(self.prompt), "n": self.num_choices, "limit": MAX_PROMPTS},
            )
        return self

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    def limit(self, room: int) -> int | None:
        return min(COMPLETION_TOKENS, room) if self.max_tokens is None else self.max_tokens


class EmbeddingRequest(Settings):
    """Body of POST /v1/embeddings."""

    model_config = ConfigDict(strict=True)

    model: str | None = None
    input: Annotated[list[str | list[int]], PlainValidator(_inputs), WithJsonSchema(_PROMPT)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(default=None, description="the length that the vectors have, or null")
    user: str | None = Field(default=None, description="a label of the client's; neither used nor logged")


Body = TypeVar("Body", bound=Settings)


def parse_body(kind: type[Body], body: bytes) -> Body:
    """Validate the raw bytes of a request.

    Raises:
        ApiError: 400, naming every field at fault; `param` is the first of them.
    """
    try:
        values = pydantic_core.from_json(body, allow_inf_nan=True)  # NaN is refused below, by the field's name
    except ValueError as error:
        raise ApiError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(values, dict):
        raise ApiError(f"the body is {shown(values)}, expected a JSON object", code="invalid_json")
    problems = _remove_neutral(values, NEUTRAL, kind.model_fields, "")
    if isinstance(messages := values.get("messages"), list):
        for number, message in enumerate(messages):
            if isinstance(message, dict):
                problems += _remove_neutral(message, NEUTRAL_IN_MESSAGE, Message.model_fields, f"messages.{number}.")
    unknown = [name for name in values if name not in kind.model_fields]
    for name in unknown[SHOWN_PROBLEMS:]:  # pydantic would describe every single one
        del values[name]
    hidden = max(len(unknown) - SHOWN_PROBLEMS, 0)
    try:
        parsed = kind.model_validate(values)
    except ValidationError as error:
        details = error.errors(include_url=False)
        problems += [_describe(kind, detail) for detail in details[:SHOWN_PROBLEMS]]
        hidden += max(len(details) - SHOWN_PROBLEMS, 0)
    else:
        if not problems:
            return parsed
    hidden += max(len(problems) - SHOWN_PROBLEMS, 0)
    messages = [message for _, message in problems[:SHOWN_PROBLEMS]] + ([f"and {hidden} more"] if hidden else [])
    raise ApiError("; ".join(messages), param=problems[0][0])


def _remove_neutral(
    values: dict[str, Any], neutral: dict[str, tuple[Any, ...]], known: dict[str, Any], path: str
) -> list[tuple[str, str]]:
    """Take the fields that ask for nothing out of `values`; (field, message) for those that ask for something."""
    problems = []
    for name in [name for name in values if name in neutral and name not in known]:
        value = values.pop(name)
        # isinstance keeps false from passing for 0.
        same = (value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral[name])
        if value is not None and not any(same):
            problems.append((path + name, f"{path}{name} = {shown(value)} is not supported here; leave the field out"))
    return problems


def _describe(kind: type[Settings], problem: Any) -> tuple[str, str]:
    """(field, message) of one of pydantic's errors."""
    # Union members and the like put their type's name into the location; a field's path has none of those.
    location = [str(part) for part in problem["loc"]]
    field = ".".join(location)
    if problem["type"] == "extra_forbidden":
        inner = {"messages": Message, "stream_options": StreamOptions}.get(location[0], Settings)
        known = kind.model_fields if len(location) == 1 else inner.model_fields
        return field, f"unknown field {shown(field)}{did_you_mean(location[-1], known)}"
    if problem["type"] == "missing":
        return field, f"{field} is required"
    if not location:  # one of our checks across fields, whose type is the field's name
        return problem["type"], problem["msg"]
    if problem["type"] == "too_short":
        return field, f"{field} is empty"
    message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return field, f"{field} = {shown(problem['input'])}: {message}"
