"""One answer on its way, in the two forms of OpenAI's API."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lalia.serving import logprobs
from lalia.serving.logprobs import CompletionLogprobs, Scored

if TYPE_CHECKING:
    from lalia.inference.request import Delta
    from lalia.tokenizer.bpe import Tokenizer


class ChatChoice:
    """A choice of /v1/chat/completions."""

    def __init__(self, tokenizer: "Tokenizer", with_logprobs: bool) -> None:
        self._tokenizer, self._with_logprobs = tokenizer, with_logprobs
        self._text: list[str] = []
        self._entries: list[dict[str, Any]] = []
        self._started = False

    def chunk(self, delta: "Delta") -> dict[str, Any] | None:
        entries = logprobs.chat_entries(self._tokenizer, logprobs.of_delta(delta)) if self._with_logprobs else []
        self._text.append(delta.text)
        self._entries += entries
        if not delta.text and not entries:
            return None
        return self._delta({"content": delta.text}, entries, None)

    def last_chunk(self, finish_reason: str) -> dict[str, Any]:
        return self._delta({} if self._started else {"content": ""}, [], finish_reason)

    def whole(self, finish_reason: str) -> dict[str, Any]:
        return {
            "message": {"role": "assistant", "content": "".join(self._text), "refusal": None},
            "logprobs": {"content": self._entries, "refusal": None} if self._with_logprobs else None,
            "finish_reason": finish_reason,
        }

    def _delta(self, delta: dict[str, Any], entries: list[dict[str, Any]], finish_reason: str | None) -> dict[str, Any]:
        role = {} if self._started else {"role": "assistant"}
        self._started = True
        described = {"content": entries, "refusal": None} if entries else None
        return {"delta": {**role, **delta}, "logprobs": described, "finish_reason": finish_reason}


class CompletionChoice:
    """A choice of /v1/completions."""

    def __init__(
        self, tokenizer: "Tokenizer", with_logprobs: bool, echoed: str = "", echoed_scores: Sequence[Scored] = ()
    ) -> None:
        """`echoed`: the prompt, if the answer begins with it, and its tokens' scores if those are wanted too."""
        self._logprobs = CompletionLogprobs(tokenizer) if with_logprobs else None
        self._pending_text = echoed
        self._pending = self._logprobs.columns(echoed_scores) if self._logprobs and echoed_scores else None
        self._text: list[str] = []
        self._columns: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }

    def chunk(self, delta: "Delta") -> dict[str, Any] | None:
        columns = self._logprobs.columns(logprobs.of_delta(delta)) if self._logprobs else None
        return self._next(delta.text, columns, None)

    def last_chunk(self, finish_reason: str) -> dict[str, Any]:
        chunk = self._next("", None, finish_reason)
        return chunk or {"text": "", "logprobs": None, "finish_reason": finish_reason}

    def whole(self, finish_reason: str) -> dict[str, Any]:
        self._next("", None, None)
        described = self._columns if self._logprobs else None
        return {"text": "".join(self._text), "logprobs": described, "finish_reason": finish_reason}

    def _next(self, text: str, columns: dict[str, Any] | None, finish_reason: str | None) -> dict[str, Any] | None:
        """One chunk of `text`, behind what is still to be echoed."""
        text, self._pending_text = self._pending_text + text, ""
        if self._pending is not None:
            columns = {name: values + (columns[name] if columns else []) for name, values in self._pending.items()}
            self._pending = None
        self._text.append(text)
        for name, values in (columns or {}).items():
            self._columns[name] += values
        if not text and not columns:
            return None
        return {"text": text, "logprobs": columns, "finish_reason": finish_reason}
