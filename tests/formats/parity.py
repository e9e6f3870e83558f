"""The comparisons of the parity table: ours against a reference, in every way that a model is run.

Each function gives the largest absolute difference over all outputs, in float32. tests/formats/test_parity.py holds
them to TOLERANCE; benchmarks/family_parity.py writes them into docs/families.md.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from lalia.formats.hf_folder import save_model
from lalia.inference.decoder import Decoder
from lalia.model.cache import KVCache
from lalia.model.transformer import Transformer
from tests.formats.grok_reference import load_grok_reference
from tests.formats.references import CAUSAL, MODELS, make_input, our_output, their_output

TOLERANCE = 1e-5
VISIBLE = 1e-4
"""A negative control must differ by more than this."""

PIECES = (7, 1, 12, 20)
LENGTHS = (40, 27)
"""Tokens of the two rows of a padded batch; the end of the second is padding, or its beginning."""

IDS = {"clip text": {"eos_token_id": 96}}
"""What the folder must say besides the config: CLIP's text model finds the end of the text by it."""


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference; infinity if the shapes differ or a value is no number."""
    if ours.shape != theirs.shape or not bool(torch.isfinite(ours).all()):
        return float("inf")
    return (ours - theirs).abs().max().item()


def one_pass(name: str, theirs: Any, ours: Transformer, folder: Path) -> float:
    """Both over two whole sequences."""
    given = make_input(name)
    return difference(our_output(name, ours, given), their_output(name, theirs, given))


def token_by_token(name: str, theirs: Any, ours: Transformer, folder: Path) -> float:
    """Ours one token a pass behind a key-value cache, two sequences at a time."""
    return _cached(name, theirs, ours, (1,) * make_input(name).shape[1])


def in_pieces(name: str, theirs: Any, ours: Transformer, folder: Path) -> float:
    """Ours left to right in pieces behind a key-value cache, two sequences at a time."""
    return _cached(name, theirs, ours, PIECES)


def _cached(name: str, theirs: Any, ours: Transformer, pieces: tuple[int, ...]) -> float:
    tokens = make_input(name)
    cache = KVCache(ours.config, num_slots=len(tokens), max_length=tokens.shape[1])
    outputs = []
    for piece in tokens.split(pieces, 1):
        with torch.no_grad():
            outputs.append(ours.logits(ours(piece, cache=cache)))
        cache.lengths = [length + piece.shape[1] for length in cache.lengths]
    return difference(torch.cat(outputs, 1), their_output(name, theirs, tokens))


def decoder(name: str, theirs: Any, ours: Transformer, folder: Path) -> float:
    """Ours through the fast path: two prompts of different lengths in pieces, then both a token at a time."""
    tokens = make_input(name)
    fast, cache = Decoder(ours), KVCache(ours.config, num_slots=len(tokens), max_length=tokens.shape[1])
    starts = (7 + 1 + 12, 7 + 1)
    rows: list[list[Tensor]] = []
    for slot, start in enumerate(starts):
        cache.first = slot
        pieces = tokens[slot : slot + 1, :start].split([7, 1, 12][: 3 - slot], 1)
        rows.append([fast.logits(fast(piece, cache)) for piece in pieces])
    cache.first = 0
    for step in range(tokens.shape[1] - max(starts)):
        ids = torch.stack([tokens[slot, start + step] for slot, start in enumerate(starts)])
        logits = fast.logits(fast(ids[:, None], cache))
        for slot, row in enumerate(rows):
            row.append(logits[slot : slot + 1])
    expected = their_output(name, theirs, tokens)
    found = [torch.cat(row) for row in rows]
    return max(difference(row, expected[slot, : len(row)]) for slot, row in enumerate(found))


def padded(name: str, theirs: Any, ours: Transformer, folder: Path) -> float:
    """A batch of two lengths, padded on the right and, for decoders, on the left; padding itself is not compared."""
    sides = ("right", "left") if name in CAUSAL or name == "clip text" else ("right",)
    return max(_padded(name, theirs, ours, side) for side in sides)


def _padded(name: str, theirs: Any, ours: Transformer, side: str) -> float:
    tokens, kept, positions = padded_batch(name, side)
    document_ids = torch.where(kept, 0, -1)
    causal = ours.config.causal
    given = {"positions": positions} if causal else {}
    found = our_output(name, ours, tokens, document_ids=document_ids, **given)
    if name == "grok-1":  # its reference knows no padding: each row by itself
        expected = torch.zeros_like(found)
        for row, mask in enumerate(kept):
            expected[row, mask] = their_output(name, theirs, tokens[row : row + 1, mask])[0]
    else:
        more = {"position_ids": positions} if causal else {}
        expected = their_output(name, theirs, tokens, attention_mask=kept.long(), **more)
    if found.dim() == 3:
        rest = torch.ones(len(kept), found.shape[1] - kept.shape[1], dtype=torch.bool)  # pooled states behind the rest
        compared = torch.cat((kept, rest), 1)
        found, expected = found[compared], expected[compared]
    return difference(found, expected)


def padded_batch(name: str, side: str) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, what of them is kept, and the position of each in its row; (2, 40) each."""
    rows = make_input(name)
    tokens, kept = torch.ones_like(rows), torch.zeros(rows.shape, dtype=torch.bool)
    for row, length in enumerate(LENGTHS):
        place = slice(0, length) if side == "right" else slice(rows.shape[1] - length, None)
        tokens[row, place], kept[row, place] = rows[row, -length:], True
    return tokens, kept, (kept.long().cumsum(1) - 1).clamp_min(0)


def written(name: str, theirs: Any, ours: Transformer, folder: Path) -> float:
    """The reference's own program reads the folder that ours wrote."""
    save_model(ours, folder, IDS.get(name))
    return difference(
        our_output(name, ours, make_input(name)), their_output(name, read_by_them(name, folder), make_input(name))
    )


def sharded(name: str, theirs: Any, ours: Transformer, folder: Path) -> float:
    """Likewise with the weights in several files."""
    save_model(ours, folder, IDS.get(name), max_shard_bytes=50_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return difference(
        our_output(name, ours, make_input(name)), their_output(name, read_by_them(name, folder), make_input(name))
    )


def read_by_them(name: str, folder: Path) -> Any:
    """What the class of the reference reads from a folder; its report of weights must be clean."""
    model_type, kind, _ = MODELS[name]
    if model_type == "grok-1":
        return load_grok_reference(folder)
    read, report = getattr(transformers, kind).from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    return read.eval()


CHECKS: dict[str, Callable[[str, Any, Transformer, Path], float]] = {
    "one pass": one_pass,
    "cache": token_by_token,
    "pieces": in_pieces,
    "decoder": decoder,
    "padded": padded,
    "written": written,
    "sharded": sharded,
}
"""Name of a column of the table -> the comparison."""


def checks_of(name: str) -> list[str]:
    """The comparisons that make sense for a model: only what generates has a cache, and images need no padding."""
    cached = ("cache", "pieces", "decoder")
    return [
        check
        for check in CHECKS
        if (check not in cached or name in CAUSAL) and (check, name) != ("padded", "clip vision")
    ]


def altered(model: Transformer, changes: dict[str, Any]) -> Transformer:
    """The same weights under another config; "rope_scaling.factor" changes one value of the scaling."""
    changed: dict[str, Any] = {}
    for key, value in changes.items():
        outer, _, inner = key.partition(".")
        if inner:
            value = getattr(model.config, outer).model_copy(update={inner: value})
        changed[outer] = value
    other = Transformer(model.config.model_copy(update=changed))
    other.load_state_dict(model.state_dict(), strict=False)
    return other.eval()


def control(name: str, theirs: Any, ours: Transformer, changes: dict[str, Any]) -> float:
    """`one_pass` with something wrong in our config."""
    given = make_input(name)
    return difference(our_output(name, altered(ours, changes), given), their_output(name, theirs, given))


def spelled(changes: dict[str, Any]) -> str:
    """A negative control in words."""
    return ", ".join(f"{key} = {_short(value)}" for key, value in changes.items())


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
