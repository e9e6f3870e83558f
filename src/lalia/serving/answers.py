"""What both generating routes put around their choices: ids, usage, and the two ways of running requests."""

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Protocol

from lalia.serving.generation import events
from lalia.serving.schema import GenerationRequest

if TYPE_CHECKING:
    from lalia.inference.request import Delta, Request


class Choice(Protocol):
    """One answer on its way, in the form of one of the routes."""

    def chunk(self, delta: "Delta") -> dict[str, Any] | None:
        """What a stream says about `delta`; None if nothing. Called for every delta, streaming or not."""
        ...

    def last_chunk(self, finish_reason: str) -> dict[str, Any]:
        """What a stream says at the end."""
        ...

    def whole(self, finish_reason: str) -> dict[str, Any]:
        """The complete choice."""
        ...


class Answer:
    """The envelope of one response."""

    def __init__(self, kind: str, model_name: str, body: GenerationRequest, num_prompt_tokens: int) -> None:
        """`kind`: "chat.completion" or "text_completion"."""
        prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
        self._kind, self._num_prompt_tokens = kind, num_prompt_tokens
        self._head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model_name}
        options = body.stream_options
        self._usage_last = bool(options and options.include_usage)
        self._usage_always = bool(options and options.continuous_usage_stats)

    def _usage(self, num_completion_tokens: int) -> dict[str, int]:
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": num_completion_tokens,
            "total_tokens": self._num_prompt_tokens + num_completion_tokens,
        }

    async def whole(self, choices: Sequence[Choice], requests: "Sequence[Request]") -> dict[str, Any]:
        """The response of a request that does not stream."""
        async with aclosing(events(requests)) as steps:
            async for step in steps:
                if step is not None and step.delta is not None:
                    choices[step.choice].chunk(step.delta)
        reasons = [str(request.finish_reason) for request in requests] or ["length"] * len(choices)
        return {
            **self._head,
            "object": self._kind,
            "choices": [
                {"index": index, **choice.whole(reason)}
                for index, (choice, reason) in enumerate(zip(choices, reasons, strict=True))
            ],
            "usage": self._usage(sum(request.num_completion_tokens for request in requests)),
        }

    async def stream(
        self, choices: Sequence[Choice], requests: "Sequence[Request]"
    ) -> AsyncGenerator[dict[str, Any] | None, None]:
        """The chunks of a request that streams, and None where a sign of life is due."""
        num_tokens = 0

        def chunk(index: int, content: dict[str, Any]) -> dict[str, Any]:
            usage = {"usage": self._usage(num_tokens)} if self._usage_always else {}
            usage = usage or ({"usage": None} if self._usage_last else {})
            return {**self._head, "object": self._streamed_kind, "choices": [{"index": index, **content}], **usage}

        if not requests:  # an echo that asks for no new token
            for index, choice in enumerate(choices):
                yield chunk(index, choice.last_chunk("length"))
        async with aclosing(events(requests)) as steps:
            async for step in steps:
                if step is None:
                    yield None
                    continue
                choice = choices[step.choice]
                if step.delta is None:
                    yield chunk(step.choice, choice.last_chunk(str(requests[step.choice].finish_reason)))
                    continue
                num_tokens += len(step.delta.token_ids)
                content = choice.chunk(step.delta)
                if content is not None:
                    yield chunk(step.choice, content)
        if self._usage_last:
            total = sum(request.num_completion_tokens for request in requests)
            yield {**self._head, "object": self._streamed_kind, "choices": [], "usage": self._usage(total)}

    @property
    def _streamed_kind(self) -> str:
        return "chat.completion.chunk" if self._kind == "chat.completion" else self._kind
