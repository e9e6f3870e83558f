"""What a request asks of the sampler, and the sampler: one token for every row of a batch.

The order of operations is: repetition penalty, temperature, top-k, top-p, min-p, each working on what the one before
left. Ids that no text uses (padding, reserved) are never drawn. Log-probabilities are those of the model itself:
temperature 1, no penalty, nothing removed, as in OpenAI's API.
"""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pydantic import ConfigDict, Field, field_validator
from torch import Tensor

from lalia.settings import Settings

MAX_STOP_STRINGS, MAX_STOP_CHARACTERS = 16, 1000
LARGE = 1e30
"""Bound on penalised logits and inverse temperatures, so that their products stay numbers in float32."""
FIRST_CANDIDATES = 128
"""Tokens that top-p looks at before it sorts the whole vocabulary; 128 nearly always hold the asked-for mass."""


class SamplingParams(Settings):
    """How to continue a prompt. Every value out of range is refused with a message naming the field."""

    # Strict: "1" is no number and true is no integer, wherever the values come from.
    model_config = ConfigDict(strict=True)

    max_tokens: int | None = Field(default=None, ge=1)
    """Tokens to generate at most; None means as many as fit in the context."""
    temperature: float = Field(default=0.8, ge=0, le=5)
    """Logits are divided by it; 0 takes the most likely token (greedy)."""
    top_k: int = Field(default=0, ge=0, le=2**31 - 1)
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Keep the fewest most likely tokens that hold this probability (Holtzman et al. 2020)."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Keep tokens of at least this share of the most likely token's probability (Nguyen et al. 2024)."""
    repetition_penalty: float = Field(default=1.0, gt=0, le=10)
    """Divide positive logits of tokens seen in prompt or answer by it, multiply negative ones (Keskar et al. 2019)."""
    stop: tuple[str, ...] = Field(default=(), max_length=MAX_STOP_STRINGS)
    """Strings that end the generation; the text stops before the one completed first."""
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    """Same seed, same draws, whatever else is in the batch; None draws differently every time."""
    logprobs: int | None = Field(default=None, ge=0, le=20)
    """Give the log-probability of every token, and of this many most likely alternatives; None gives nothing."""
    ignore_eos: bool = False
    """Go on after an end-of-text or end-of-turn token (for benchmarks)."""

    @field_validator("stop", mode="before")
    @classmethod
    def _tuple(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value

    @field_validator("stop")
    @classmethod
    def _usable(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            if not 1 <= len(text) <= MAX_STOP_CHARACTERS:
                raise ValueError(f"a stop string has {len(text)} characters, expected 1 to {MAX_STOP_CHARACTERS}")
        return value


class RowState:
    """What sampling remembers of one request: its random numbers and, under a penalty, the tokens seen."""

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int], vocab_size: int) -> None:
        # Python's generator, because one number per token is all a draw takes, and it is cheaper to ask than torch's.
        self.random = random.Random(None if params.seed is None else params.seed % 2**64)
        self.seen: Tensor | None = None
        if params.repetition_penalty != 1.0:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool)
            self.seen[list(prompt_ids)] = True

    def add(self, token_id: int) -> None:
        """Record a token that was drawn."""
        if self.seen is not None:
            self.seen[token_id] = True


class Sampler:
    """Draws one token per row for a fixed list of requests, all rows in the same few operations, on the CPU.

    Args:
        params: of each row.
        never: (vocab_size,) bool, ids that are never drawn, or None.
    """

    def __init__(self, params: Sequence[SamplingParams], never: Tensor | None = None) -> None:
        def column(values: list[float], neutral: float) -> Tensor | None:
            return torch.tensor(values)[:, None] if any(value != neutral for value in values) else None

        self.never = never
        self.greedy = torch.tensor([p.temperature == 0 for p in params])
        self.all_greedy, self.any_greedy = bool(self.greedy.all()), bool(self.greedy.any())
        self.penalty = column([p.repetition_penalty for p in params], 1.0)
        self.temperature = column([max(p.temperature, 1 / LARGE) if p.temperature else 1.0 for p in params], 1.0)
        self.top_p = column([p.top_p for p in params], 1.0)
        self.min_p = column([p.min_p for p in params], 0.0)
        self.top_k = [p.top_k for p in params]

    def __call__(self, logits: Tensor, states: Sequence[RowState]) -> list[int]:
        """Draw.

        Args:
            logits: (rows, vocab_size) float32; changed in place.
            states: of each row.

        Returns:
            One token id per row.

        Raises:
            FloatingPointError: if the logits hold NaN. No random number has been taken then.
        """
        if self.penalty is not None:
            none = torch.zeros(logits.shape[1], dtype=torch.bool)
            seen = torch.stack([none if state.seen is None else state.seen for state in states])
            logits = penalise(logits, seen, self.penalty)
        if self.never is not None:
            logits.masked_fill_(self.never, float("-inf"))
        best = logits.argmax(-1) if self.any_greedy else None
        if best is not None:
            _check_finite(logits.gather(-1, best[:, None]))  # NaN counts as the largest
            if self.all_greedy:
                return best.tolist()
        if self.temperature is not None:
            # Below their maximum logits can be divided by anything: the largest stays 0, others may become -inf.
            logits = (logits - logits.max(-1, keepdim=True).values).div_(self.temperature)
        threshold = self._threshold(logits)
        if threshold is not None:
            logits = logits.masked_fill(logits < threshold, float("-inf"))
        drawn = draw(logits, [state.random for state in states])
        return (drawn if best is None else torch.where(self.greedy, best, drawn)).tolist()

    def _threshold(self, logits: Tensor) -> Tensor | None:
        """The smallest logit that top-k, top-p and min-p leave in each row, (rows, 1); equal logits stay together."""
        threshold = None
        if self.top_p is not None or any(self.top_k):
            threshold = self._smallest_kept(logits)
        if self.min_p is not None:
            smallest = logits.max(-1, keepdim=True).values + self.min_p.log()
            threshold = smallest if threshold is None else torch.maximum(threshold, smallest)
        return threshold

    def _smallest_kept(self, logits: Tensor) -> Tensor:
        """Threshold of top-k and top-p, from the largest few logits where they suffice, otherwise from all sorted."""
        vocab_size = logits.shape[1]
        limits = [min(k, vocab_size) if k else vocab_size for k in self.top_k]
        largest_k = max((k for k in limits if k < vocab_size), default=0)
        num_candidates = min(max(largest_k, FIRST_CANDIDATES if self.top_p is not None else 1), vocab_size)
        limit = torch.tensor(limits)[:, None]
        while True:
            candidates = _largest(logits, num_candidates)
            rank = torch.arange(num_candidates)
            within = rank < limit
            num_kept = limit
            if self.top_p is None:
                break
            # Probabilities among what top-k left: of the candidates where k limits them, otherwise of all.
            among = candidates.masked_fill(~within, float("-inf"))
            total = torch.where(limit < vocab_size, among.logsumexp(-1, True), logits.logsumexp(-1, True))
            cumulative = (among - total).exp().cumsum(-1)  # (rows, candidates)
            before = torch.nn.functional.pad(cumulative[:, :-1], (1, 0))
            num_kept = torch.minimum(limit, ((before < self.top_p) & within).sum(-1, keepdim=True))
            settled = (cumulative[:, -1:] >= self.top_p) | (limit <= num_candidates) | (self.top_p >= 1)
            if num_candidates == vocab_size or bool(settled.all()):
                num_kept = torch.where(self.top_p >= 1, limit, num_kept)
                break
            num_candidates = vocab_size
        last = candidates.gather(-1, num_kept.clamp(1, num_candidates) - 1)
        return last.masked_fill(num_kept >= vocab_size, float("-inf"))


def _largest(logits: Tensor, num: int) -> Tensor:
    """The `num` largest of each row in descending order, (rows, num)."""
    if num < logits.shape[1]:
        return logits.topk(num).values
    return torch.from_numpy(np.sort(logits.numpy(), -1)[:, ::-1].copy())  # several times as fast as torch's sort


def penalise(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Logits with those of the tokens seen divided by the penalty where positive, multiplied where negative.

    Args:
        logits: (rows, vocab_size)
        seen: (rows, vocab_size) bool
        penalty: (rows, 1)
    """
    penalised = torch.where(logits > 0, logits / penalty, logits * penalty).clamp_(-LARGE, LARGE)
    return torch.where(seen, penalised, logits)


def draw(logits: Tensor, generators: Sequence[random.Random]) -> Tensor:
    """One id per row with probability softmax(logits), by inverting the cumulative distribution.

    Each row takes one number from its own generator, so a draw depends on nothing else in the batch.

    Args:
        logits: (rows, vocab_size), -inf where a token must not be drawn.

    Returns:
        (rows,) int64
    """
    # Summed in float64 and rounded to float32: a probability under 6e-8 may be rounded away, or doubled.
    cumulative = torch.softmax(logits, -1).cumsum(-1)  # (rows, vocab_size)
    total = cumulative[:, -1:]
    _check_finite(total)
    uniform = torch.tensor([[generator.random()] for generator in generators])
    # Below the total even after rounding, so that the id found has a probability above 0.
    target = torch.minimum(uniform * total, total.nextafter(torch.zeros(())))
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


def _check_finite(values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise FloatingPointError("the model's scores are not numbers (NaN or infinity): its weights are broken")


def describe(
    log_probs: Tensor, token_ids: Sequence[int], num_alternatives: Sequence[int]
) -> list[tuple[float, list[tuple[int, float]]]]:
    """For each row, the log-probability of its token and its most likely tokens with theirs, likeliest first.

    Args:
        log_probs: (rows, vocab_size)
        token_ids: of each row.
        num_alternatives: how many of the most likely tokens of each row.
    """
    chosen = log_probs.gather(-1, torch.tensor(token_ids)[:, None]).squeeze(-1).tolist()
    most = min(max(num_alternatives), log_probs.shape[1])
    if most == 0:
        return [(log_prob, []) for log_prob in chosen]
    values, ids = (t.tolist() for t in log_probs.topk(most))
    return [
        (log_prob, list(zip(ids[i][:n], values[i][:n], strict=True)))
        for i, (log_prob, n) in enumerate(zip(chosen, num_alternatives, strict=True))
    ]
