"""From request bodies to token ids within the model's context, and from those to running engine requests."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lalia.serving.errors import ApiError
from lalia.serving.schema import ChatRequest, CompletionRequest, GenerationRequest
from lalia.tokenizer.chat import render

if TYPE_CHECKING:
    from lalia.inference.language_model import LanguageModel
    from lalia.inference.request import Request


def chat_prompt(model: "LanguageModel", body: ChatRequest) -> list[int]:
    """Token ids of the conversation, up to where the assistant's answer begins.

    Raises:
        ApiError: 400 if conversation and answer do not fit the context.
        UserError: if the model has no chat template, or it refuses the conversation.
    """
    roles = {"developer": "system"}  # OpenAI's newer word for it
    messages = [{"role": roles.get(m.role, m.role), "content": m.content} for m in body.messages]
    _check_bytes(model, sum(len(m["content"].encode()) for m in messages), "messages")
    ids = render(model.tokenizer, messages, add_generation_prompt=True)
    _check_length(model, len(ids), body, "messages")
    return ids


def completion_prompts(model: "LanguageModel", body: CompletionRequest) -> list[list[int]]:
    """Token ids of every prompt.

    Raises:
        ApiError: 400 if a prompt and its completion do not fit the context, or an id is outside the vocabulary.
    """
    prompts = []
    for prompt in body.prompt:
        if isinstance(prompt, str):
            _check_bytes(model, len(prompt.encode()), "prompt")
            ids = model.encode(prompt)  # with the token that begins a text, as in lalia.generate
        else:
            ids = prompt
            wrong = next((i for i in ids if not 0 <= i < model.tokenizer.vocab_size), None)
            if wrong is not None:
                limit = model.tokenizer.vocab_size - 1
                raise ApiError(f"prompt: token id {wrong} is outside the vocabulary of 0 to {limit}", param="prompt")
        _check_length(model, len(ids), body, "prompt")
        prompts.append(ids)
    return prompts


def submit(model: "LanguageModel", prompts: Sequence[list[int]], body: GenerationRequest) -> "list[Request]":
    """Start every choice of every prompt, choices of one prompt together; all or none."""
    requests: list[Request] = []
    try:
        for prompt in prompts:
            for choice in range(body.num_choices):
                requests.append(model.engine.submit(prompt, body.sampling(choice, model.max_length - len(prompt))))
    except BaseException:
        for request in requests:
            request.cancel()
        raise
    return requests


def _check_bytes(model: "LanguageModel", num_bytes: int, field: str) -> None:
    """Refuse before tokenizing what is too long whatever its tokens are, if the tokenizer forgets none of it."""
    if model.tokenizer.lossy is not None:
        return
    longest = int(model.tokenizer.token_bytes_table().max())
    at_least = -(-num_bytes // longest)
    if at_least > model.max_length:
        raise _too_long(f"{field}: at least {at_least} tokens", model.max_length, field)


def _check_length(model: "LanguageModel", num_tokens: int, body: GenerationRequest, field: str) -> None:
    limit = body.asked_tokens
    wanted = 1 if limit is None else limit
    if num_tokens + wanted <= model.max_length:
        return
    if limit is None or num_tokens >= model.max_length:
        raise _too_long(f"{field}: {num_tokens} tokens", model.max_length, field)
    name = "max_tokens" if body.max_tokens is not None else "max_completion_tokens"
    asked = f"{field}: {num_tokens} tokens, and {limit} more asked for by {name}, {num_tokens + limit} in all"
    raise _too_long(asked, model.max_length, name)


def _too_long(asked: str, limit: int, param: str) -> ApiError:
    remedy = "ask for fewer tokens or shorten the text" if param.startswith("max_") else "shorten the text"
    return ApiError(
        f"{asked}, but this model's context holds {limit} tokens, answer included; {remedy}",
        param=param,
        code="context_length_exceeded",
    )
