"""Log-probabilities of tokens, in the two forms of OpenAI's API."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from lalia.inference.language_model import LanguageModel
    from lalia.tokenizer.bpe import Tokenizer

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot hold; OpenAI uses the same."""
SCORED_TOKENS = 256
"""Positions whose logits over the whole vocabulary are held at once."""


@dataclass(frozen=True)
class Scored:
    """A token, its log-probability in nats (None where nothing precedes it) and the likeliest tokens in its place."""

    token_id: int
    logprob: float | None
    alternatives: tuple[tuple[int, float], ...]


def of_delta(delta: Any) -> list[Scored]:
    """The tokens of an engine's Delta that was asked for log-probabilities."""
    return [
        Scored(chosen.token_id, chosen.logprob, tuple((a.token_id, a.logprob) for a in alternatives))
        for chosen, alternatives in zip(delta.logprobs, delta.alternatives, strict=True)
    ]


@torch.inference_mode()
def of_prompt(model: "LanguageModel", ids: Sequence[int], num_alternatives: int) -> list[Scored]:
    """Every token of a prompt, given those before it.

    Args:
        ids: at most `model.max_length` token ids.
        num_alternatives: how many of the likeliest tokens to name at each place.
    """
    transformer = model.model
    device = transformer.head_weight.device
    tokens = torch.tensor(ids, device=device)  # (seq,)
    hidden = transformer(tokens[None])[0]  # (seq, hidden)
    scored = [Scored(ids[0], None, ())]
    for start in range(0, len(ids) - 1, SCORED_TOKENS):
        targets = tokens[start + 1 : start + 1 + SCORED_TOKENS]  # (part,)
        logits = transformer.logits(hidden[start : start + len(targets)]).float()  # (part, vocab)
        # The model's table may be padded beyond the tokenizer's ids; the padding is no token.
        log_probs = logits[:, : model.tokenizer.vocab_size].log_softmax(-1)
        chosen = log_probs.gather(1, targets[:, None])[:, 0].tolist()
        values, best = log_probs.topk(min(num_alternatives, log_probs.shape[1]))
        for token_id, logprob, row_ids, row in zip(
            targets.tolist(), chosen, best.tolist(), values.tolist(), strict=True
        ):
            scored.append(Scored(token_id, logprob, tuple(zip(row_ids, row, strict=True))))
    return scored


def token_bytes(tokenizer: "Tokenizer", token_id: int) -> bytes:
    """A token's bytes, b"" for specials and for rows of the model's table that are no token."""
    return tokenizer.token_bytes(token_id) if token_id < tokenizer.vocab_size else b""


def token_text(tokenizer: "Tokenizer", token_id: int) -> str:
    r"""A token as text: itself, a special's name, or "bytes:\xe2\x82" where it is no whole UTF-8. Unique per token."""
    content = token_bytes(tokenizer, token_id)
    if not content:
        return next((name for name, i in tokenizer.special.items() if i == token_id), f"<|unused_{token_id}|>")
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def chat_entries(tokenizer: "Tokenizer", scored: Sequence[Scored]) -> list[dict[str, Any]]:
    """`choices[].logprobs.content` of a chat completion."""

    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        content = token_bytes(tokenizer, token_id)
        return {
            "token": token_text(tokenizer, token_id),
            "logprob": _finite(logprob),
            "bytes": list(content) if content else None,
        }

    return [
        {**entry(s.token_id, s.logprob), "top_logprobs": [entry(*alternative) for alternative in s.alternatives]}
        for s in scored
    ]


class CompletionLogprobs:
    """`choices[].logprobs` of text completions; remembers how many characters it has described."""

    def __init__(self, tokenizer: "Tokenizer", offset: int = 0) -> None:
        """`offset`: characters of the answer before the first token."""
        self._tokenizer, self._offset = tokenizer, offset

    def columns(self, scored: Sequence[Scored]) -> dict[str, Any]:
        """The four parallel lists for the next tokens."""
        return {
            "tokens": [token_text(self._tokenizer, s.token_id) for s in scored],
            "token_logprobs": [_finite(s.logprob) for s in scored],
            "top_logprobs": [self._top(s) for s in scored],
            "text_offset": list(self._offsets(scored)),
        }

    def _top(self, scored: Scored) -> dict[str, float | None] | None:
        if scored.logprob is None:
            return None
        # The produced token is always among them, as in OpenAI's API, so there may be one more than asked for.
        pairs = dict(scored.alternatives) | {scored.token_id: scored.logprob}
        return {token_text(self._tokenizer, i): _finite(logprob) for i, logprob in pairs.items()}

    def _offsets(self, scored: Sequence[Scored]) -> Iterator[int]:
        for s in scored:
            yield self._offset
            # A character counts where its first byte is, so that pieces of one share an offset or follow it.
            self._offset += sum(byte & 0xC0 != 0x80 for byte in token_bytes(self._tokenizer, s.token_id))


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LOWEST)
