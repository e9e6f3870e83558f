"""A model that answers from a script: fast, and with probabilities known beforehand."""

import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from lalia.inference.request import Delta, TokenLogprob
from lalia.inference.sampling import SamplingParams
from lalia.model.config import ModelConfig
from lalia.model.transformer import Transformer
from lalia.tokenizer.bpe import Tokenizer, train_tokenizer
from lalia.tokenizer.config import TokenizerConfig
from lalia.tokenizer.stream import TextStream

SONNET = """Shall I compare thee to a summer's day?
Thou art more lovely and more temperate:
Rough winds do shake the darling buds of May,
And summer's lease hath all too short a date;
Sometime too hot the eye of heaven shines,
And often is his gold complexion dimm'd;
And every fair from fair sometime declines,
By chance or nature's changing course untrimm'd;
But thy eternal summer shall not fade,
Nor lose possession of that fair thou ow'st;
Nor shall death brag thou wander'st in his shade,
When in eternal lines to time thou grow'st:
So long as men can breathe or eyes can see,
So long lives this, and this gives life to thee.
"""
ANSWER = "Thou art more lovely and more temperate: so long as men can breathe or eyes can see \u2665"
MARKUP = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script> [a](javascript:hacked=1) & </div>'


def make_tokenizer() -> Tokenizer:
    return train_tokenizer([SONNET, ANSWER[:-1]], TokenizerConfig(vocab_size=448))


def make_transformer(tokenizer: Tokenizer, max_length: int = 256) -> Transformer:
    """Tiny, random, always the same."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=64,
        max_position_embeddings=max_length,
        qk_norm="before_rope",
    )
    model = Transformer(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape) * 0.2 if weight.dim() > 1 else torch.ones(weight.shape))
    return model


class StubRequest:
    """One answer; computed by whoever iterates over it."""

    def __init__(self, engine: "StubEngine", prompt: Sequence[int], params: SamplingParams) -> None:
        self._engine, self.prompt, self.params = engine, list(prompt), params
        self.num_prompt_tokens, self.num_completion_tokens = len(prompt), 0
        self.finish_reason: str | None = None
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        self._cancelled.set()

    def __iter__(self) -> Iterator[Delta]:
        try:
            yield from self._steps()
        finally:
            self._engine.running.discard(self)

    def _steps(self) -> Iterator[Delta]:
        tokenizer = self._engine.tokenizer
        asked = tokenizer.decode(self.prompt)
        ids = tokenizer.encode(next((a for q, a in self._engine.answers.items() if q in asked), ANSWER))
        ids = (ids * 100)[: self.params.max_tokens or 100] if self.params.ignore_eos else [*ids, tokenizer.turn_end_id]
        stream = TextStream(tokenizer)
        for position, token_id in enumerate(ids):
            if position == self.params.max_tokens:
                self.finish_reason = "length"
                return
            if self._engine.failing:
                raise RuntimeError("the engine broke at 0xdeadbeef in /home/someone")
            if self._cancelled.wait(self._engine.seconds_per_token):
                self.finish_reason = "cancelled"
                return
            self.num_completion_tokens += 1
            text = stream.push(token_id)
            if self.params.logprobs is None:
                yield Delta(text, (token_id,))
                continue
            chosen, alternatives = self._weighed(position, token_id)
            yield Delta(text, (token_id,), (chosen,), (alternatives[: self.params.logprobs],))
        self.finish_reason = "length" if self.params.ignore_eos else "stop"

    def _weighed(self, position: int, token_id: int) -> tuple[TokenLogprob, tuple[TokenLogprob, ...]]:
        """The token between alternatives whose probabilities fall by a constant factor."""
        tokenizer = self._engine.tokenizer
        draw = random.Random(position)
        likeliest = draw.choice([0.92, 0.7, 0.45, 0.2])
        shares = [likeliest * (1 - likeliest) ** rank for rank in range(40)]
        others = draw.sample([i for i in range(256, tokenizer.vocab_size - 16) if i != token_id], 39)
        rank = draw.choice([0, 0, 0, 1, 2, 12])
        ids = [*others[:rank], token_id, *others[rank:]]
        weighed = [
            TokenLogprob(i, tokenizer.decode([i]), tokenizer.token_bytes(i), math.log(share))
            for i, share in zip(ids, shares, strict=True)
        ]
        return weighed[rank], tuple(weighed[:20])


@dataclass
class StubEngine:
    tokenizer: Tokenizer
    max_length: int
    seconds_per_token: float = 0.0
    answers: dict[str, str] = field(default_factory=lambda: {"markup": MARKUP})
    failing: bool = False
    running: set[StubRequest] = field(default_factory=set)
    submitted: list[StubRequest] = field(default_factory=list)
    started: bool = False

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams) -> StubRequest:
        assert 0 < len(prompt_ids) <= self.max_length - (params.max_tokens or 1), "the server checks this before"
        request = StubRequest(self, prompt_ids, params)
        self.running.add(request)
        self.submitted.append(request)
        return request

    def start(self) -> None:
        self.started = True

    def stop(self) -> None:
        self.started = False


class StubModel:
    """Has what the server uses of a LanguageModel."""

    def __init__(self, tokenizer: Tokenizer, max_length: int = 256) -> None:
        self.name, self.max_length, self.tokenizer = "sonnet", max_length, tokenizer
        self.model = make_transformer(tokenizer, max_length)
        self.config = self.model.config
        self.engine = StubEngine(tokenizer, max_length)

    def encode(self, prompt: str) -> list[int]:
        return [self.tokenizer.end_of_text_id, *self.tokenizer.encode(prompt)]


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether `condition` came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True
