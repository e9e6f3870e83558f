"""What a language model must beat: uniform bytes, counted n-grams and a general-purpose compressor."""

import lzma
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from lalia.errors import UserError
from lalia.evaluation.ngram import Document, NgramModel

XZ_PRESET = 9 | lzma.PRESET_EXTREME
XZ_DICTIONARY_BYTES = 64 * 2**20  # of preset 9: how far back a match may reach
BYTE_ORDERS = (5, 8)
TOKEN_ORDER = 5


class Encoder(Protocol):
    """The part of a tokenizer that a baseline needs."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, none of them special."""
        ...


def baselines(
    train: Sequence[str],
    validation: Sequence[str],
    tokenizer: Encoder | None = None,
    max_training_bytes: int = 16_000_000,
) -> list[dict[str, Any]]:
    """Score the baselines on the same text as the model, from weakest method to strongest.

    Args:
        train: documents the baselines may learn from.
        validation: documents to score, each from an empty context (xz sees them in one stream).
        tokenizer: adds an n-gram model over its ids, the strongest simple rival of a model with the same tokenizer.
        max_training_bytes: baselines learn from the first so many bytes, about 120 bytes of memory for each; "how" says
            when that is not all of the training text.

    Returns:
        One dict per baseline: name, bits_per_byte (bits of the validation text / its UTF-8 bytes), seconds, how.

    Raises:
        UserError: if the validation text is empty.
    """
    validation_bytes = [text.encode() for text in validation]
    num_bytes = sum(map(len, validation_bytes))
    if num_bytes == 0:
        raise UserError("the validation text is empty, so nothing can be scored; hold out at least one document")
    total = sum(len(text.encode()) for text in train)
    train = _first_bytes(train, max_training_bytes)
    train_bytes = [text.encode() for text in train]
    learnt = sum(map(len, train_bytes))
    extent = "" if learnt == total else f"; learnt from the first {learnt:,} of {total:,} training bytes"

    results: list[dict[str, Any]] = []

    def add(name: str, how: str, bits: Callable[[], float]) -> None:
        start = time.perf_counter()
        bits_per_byte = bits() / num_bytes
        seconds = round(time.perf_counter() - start, 3)
        results.append({"name": name, "bits_per_byte": bits_per_byte, "seconds": seconds, "how": how})

    add("uniform bytes", "every byte value equally likely", lambda: 8.0 * num_bytes)
    add(
        "byte frequencies",
        "each byte by its share of the training text, one added to every count" + extent,
        lambda: _frequency_bits(b"".join(train_bytes), validation_bytes),
    )
    add(
        "xz -9e",
        "growth of the compressed training text when the validation text is appended; its dictionary of 64 MiB "
        + ("covers" if learnt + num_bytes <= XZ_DICTIONARY_BYTES else "does not cover")
        + " all of it"
        + extent,
        lambda: _xz_bits(b"".join(train_bytes), b"".join(validation_bytes)),
    )
    kneser_ney = "interpolated modified Kneser-Ney, {} {} of context" + extent
    for order in BYTE_ORDERS:
        add(
            f"{order}-gram bytes",
            kneser_ney.format(order - 1, "bytes"),
            lambda order=order: _ngram_bits(train_bytes, validation_bytes, order, 256),
        )
    if tokenizer is not None:
        encode, alphabet_size = tokenizer.encode, tokenizer.vocab_size
        add(
            f"{TOKEN_ORDER}-gram tokens",
            kneser_ney.format(TOKEN_ORDER - 1, "tokens") + f"; the model's own {alphabet_size:,} tokens",
            lambda: _ngram_bits(map(encode, train), map(encode, validation), TOKEN_ORDER, alphabet_size),
        )
    return results


def _first_bytes(texts: Sequence[str], limit: int) -> list[str]:
    """The first `limit` bytes of `texts`; the last text kept may be cut, at a character."""
    kept: list[str] = []
    for text in texts:
        if limit <= 0:
            break
        encoded = text.encode()
        kept.append(text if len(encoded) <= limit else encoded[:limit].decode(errors="ignore"))
        limit -= len(encoded)
    return kept


def _frequency_bits(train: bytes, validation: list[bytes]) -> float:
    """A unigram model with add-one counts: fitted by hand, since Kneser-Ney would discount."""
    counts = np.bincount(np.frombuffer(train, np.uint8), minlength=256) + 1
    code_lengths = -np.log2(counts / counts.sum())
    return float(code_lengths[np.frombuffer(b"".join(validation), np.uint8)].sum())


def _xz_bits(train: bytes, validation: bytes) -> float:
    return 8.0 * (_xz_size(train + validation) - _xz_size(train))


def _xz_size(content: bytes) -> int:
    return len(lzma.compress(content, preset=XZ_PRESET))


def _ngram_bits(train: Iterable[Document], validation: Iterable[Document], order: int, alphabet_size: int) -> float:
    model = NgramModel.fit(list(train), order, alphabet_size)
    return sum(model.bits(document) for document in validation)
