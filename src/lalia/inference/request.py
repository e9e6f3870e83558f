"""One generation under way: what was asked, what has come of it, and how to wait for more."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lalia.inference.sampling import RowState, SamplingParams
from lalia.inference.stops import StopStrings
from lalia.tokenizer.bpe import Tokenizer
from lalia.tokenizer.stream import TextStream

if TYPE_CHECKING:
    from lalia.inference.engine import Engine

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class TokenLogprob:
    """A token and the natural logarithm of its probability in the model's own distribution.

    `text` is the token alone: part of a character becomes U+FFFD, which `bytes` resolves; specials have no text.
    """

    token_id: int
    text: str
    bytes: bytes
    logprob: float


@dataclass(frozen=True)
class Delta:
    """What one token, or the end, added.

    Attributes:
        text: complete characters, beginnings of stop strings held back; often "".
        token_ids: the tokens, among them the one that ended the text (end of turn, or completing a stop string).
        logprobs: of each token, if asked for.
        alternatives: for each token the most likely ones, if asked for.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    alternatives: tuple[tuple[TokenLogprob, ...], ...] = ()


class Request:
    """A submitted prompt. Iterate for `Delta`s until the generation ends; `Engine.submit` makes requests.

    Attributes:
        prompt_ids, params: what was asked.
        max_tokens: the limit that applies: params.max_tokens, or what fits in the context.
        token_ids: tokens generated so far.
        text: text given out so far.
        finish_reason: "stop" (end token or stop string), "length" (max_tokens), "cancelled"; None while running, and
            after an error.
        error: the exception that ended this request, if one did; iterating raises it.
    """

    def __init__(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        max_tokens: int,
        tokenizer: Tokenizer,
        vocab_size: int,
        engine: "Engine",
    ) -> None:
        self.prompt_ids, self.params, self.max_tokens = prompt_ids, params, max_tokens
        self.token_ids: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.error: Exception | None = None
        self.state = RowState(params, prompt_ids, vocab_size)
        self.cancelled = False
        self._tokenizer = tokenizer
        self._stream, self._stops = TextStream(tokenizer, after=prompt_ids), StopStrings(params.stop)
        self._engine = engine
        self._deltas: list[Delta] = []
        self._changed = threading.Condition()

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None or self.error is not None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def num_completion_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        """Of every token so far, if asked for."""
        return tuple(entry for delta in self._deltas for entry in delta.logprobs)

    @property
    def alternatives(self) -> tuple[tuple[TokenLogprob, ...], ...]:
        """Of every token so far, if asked for."""
        return tuple(entry for delta in self._deltas for entry in delta.alternatives)

    def __iter__(self) -> Iterator[Delta]:
        """All deltas from the first on, waiting for those to come.

        Raises:
            Exception: `error`, after the deltas before it.
        """
        given = 0
        while True:
            finished = self.finished  # read before the deltas: what ends a request comes with its last delta
            deltas = self._deltas[given:]
            yield from deltas
            given += len(deltas)
            if finished:
                break
            if given == len(self._deltas):
                self._engine.advance(self, given)
        if self.error is not None:
            raise self.error

    def wait(self) -> None:
        """Run until finished.

        Raises:
            Exception: `error`, if one ended the request.
        """
        for _ in self:
            pass

    def sleep(self, given: int, timeout_seconds: float) -> None:
        """Sleep until there are more than `given` deltas, or the end has come, or the time is over."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._deltas) > given or self.finished, timeout_seconds)

    def cancel(self) -> None:
        """End the request: at once if the engine rests, otherwise before its next step. Harmless after the end."""
        self.cancelled = True
        self._engine.sweep()

    def next_id(self) -> int:
        """The last known token, whose successor is to be drawn."""
        return self.token_ids[-1] if self.token_ids else self.prompt_ids[-1]

    def add_token(
        self, token_id: int, stop_ids: frozenset[int], logprob: tuple[float, list[tuple[int, float]]] | None
    ) -> None:
        """Take the drawn token, give out what text it completes, and finish if it ends the request."""
        self.token_ids.append(token_id)
        self.state.add(token_id)
        ends = token_id in stop_ids and not self.params.ignore_eos
        text, stopped = ("", False) if ends else self._stops.push(self._stream.push(token_id))
        reason: FinishReason | None = "stop" if ends or stopped else None
        if reason is None and len(self.token_ids) >= self.max_tokens:
            reason = "length"
        if reason is not None and not stopped:
            text += self._rest()
        entry, others = None, ()
        if logprob is not None:
            entry = self._describe(token_id, logprob[0])
            others = tuple(self._describe(i, value) for i, value in logprob[1])
        delta = Delta(text, (token_id,), () if entry is None else (entry,), () if entry is None else (others,))
        self._publish(delta, reason, None)

    def finish(self, reason: FinishReason | None, error: Exception | None = None) -> None:
        """End the request without another token: cancelled, or by an error."""
        self._publish(Delta("" if error else self._rest()), reason, error)

    def _rest(self) -> str:
        """Text held back until the end: half a character, the beginning of a stop string."""
        text, stopped = self._stops.push(self._stream.flush())
        return text if stopped else text + self._stops.flush()

    def _publish(self, delta: Delta, reason: FinishReason | None, error: Exception | None) -> None:
        with self._changed:
            self.text += delta.text
            self._deltas.append(delta)
            self.error, self.finish_reason = error, reason
            self._changed.notify_all()

    def _describe(self, token_id: int, logprob: float) -> TokenLogprob:
        known = token_id < self._tokenizer.vocab_size
        content = self._tokenizer.token_bytes(token_id) if known else b""
        return TokenLogprob(token_id, content.decode("utf-8", errors="replace"), content, logprob)
