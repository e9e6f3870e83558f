"""The tokenize stage: train the tokenizer on the training split, write both splits as token shards."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lalia.data.documents import Document, Split, read_documents
from lalia.data.shards import write_manifest, write_split
from lalia.errors import UserError
from lalia.progress import Progress
from lalia.tokenizer.bpe import Tokenizer, train_tokenizer
from lalia.tokenizer.compare import bytes_per_token_report
from lalia.tokenizer.config import TokenizerConfig

SPLITS: tuple[Split, ...] = ("train", "validation")
COMPARED_BYTES = 500_000
_BATCH_CHARACTERS = 4_000_000  # encoded at a time: bounds the memory of the encodings


def tokenize(config: TokenizerConfig, documents: Path, out: Path, progress: Progress) -> dict[str, Any]:
    """Write `out`/tokenizer and the token shards of `documents`, and return what to report about them.

    Returns:
        {"vocab_size", "tokenizer_sha256", "train" and "validation": {"num_tokens", "num_documents", "num_bytes",
        "bytes_per_token"}, "unused_tokens": ids of the vocabulary that the training split never uses, "comparison":
        see `bytes_per_token_report`, on at most 500 kB of validation text, "seconds": per part}.

    Raises:
        UserError: if a split is empty, a text has no UTF-8, or the text is too little for the vocabulary.
    """
    splits = {split: read_documents(documents, split) for split in SPLITS}
    for split, members in splits.items():
        if not members:
            raise UserError(f"the {split} split has no documents; give more text, or change data.validation_fraction")
        for document in members:
            if any("\ud800" <= character <= "\udfff" for character in document.text):
                raise UserError(
                    f"document {document.id!r} has half of a surrogate pair; repair or remove that document"
                )
    began = time.perf_counter()
    progress.say(f"training a vocabulary of {config.vocab_size} on {len(splits['train'])} documents")
    tokenizer = train_tokenizer((document.text for document in splits["train"]), config)
    trained = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(out / "tokenizer")

    used = np.zeros(tokenizer.vocab_size, dtype=bool)
    entries: dict[str, dict[str, Any]] = {}
    for split, members in splits.items():
        num_bytes = sum(document.num_bytes for document in members)
        ids = _encode(tokenizer, members, used if split == "train" else None)
        entries[split] = write_split(out, split, ids, tokenizer.vocab_size, tokenizer.end_of_text_id, num_bytes)
    write_manifest(out, entries, tokenizer.vocab_size, tokenizer.end_of_text_id, tokenizer.sha256)
    encoded = time.perf_counter()

    comparison = bytes_per_token_report(sample(splits["validation"], COMPARED_BYTES), tokenizer)
    summary: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, "tokenizer_sha256": tokenizer.sha256}
    for split, entry in entries.items():
        counts = {name: entry[name] for name in ("num_tokens", "num_documents", "num_bytes")}
        # <|endoftext|> stands for no byte, so it does not count here.
        ordinary = entry["num_tokens"] - entry["num_documents"]
        summary[split] = {**counts, "bytes_per_token": round(entry["num_bytes"] / ordinary, 4) if ordinary else None}
        progress.say(
            f"{split}: {entry['num_documents']} documents, {entry['num_tokens']:,} tokens, "
            f"{summary[split]['bytes_per_token']} bytes per token"
        )
    summary["unused_tokens"] = int((~used).sum()) - len(tokenizer.special)
    summary["comparison"] = comparison
    summary["seconds"] = {"train": round(trained - began, 2), "encode": round(encoded - trained, 2)}
    _say_comparison(comparison, progress)
    return summary


def _encode(tokenizer: Tokenizer, documents: list[Document], used: np.ndarray | None) -> Iterator[list[int]]:
    """Ids of each document; marks in `used` the ids that occur."""
    waiting: list[str] = []
    characters = 0
    for number, document in enumerate(documents):
        waiting.append(document.text)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS or number == len(documents) - 1:
            for ids in tokenizer.encode_batch(waiting):
                if used is not None:
                    used[ids] = True
                yield ids
            waiting, characters = [], 0


def sample(documents: list[Document], num_bytes: int) -> list[str]:
    """The beginnings of documents spread evenly over `documents`, at most `num_bytes` of UTF-8 in all."""
    # At least 4 KiB of each: cutting a text in two costs a token or so, which must not show.
    count = min(len(documents), max(1, num_bytes // 4096))
    chosen = [documents[i * len(documents) // count] for i in range(count)]
    share = num_bytes // count
    return [document.text.encode("utf-8")[:share].decode("utf-8", errors="ignore") for document in chosen]


def _say_comparison(comparison: dict[str, Any], progress: Progress) -> None:
    figures = []
    for name in ("ours", "gpt2", "cl100k"):
        row = comparison[name]
        if row["available"]:
            figures.append(f"{name} {row['bytes_per_token']} (vocabulary {row['vocab_size']:,})")
        else:
            figures.append(f"{name} not available: {row['why']}; {row['remedy']}")
    progress.say(f"bytes per token on {comparison['num_bytes']:,} bytes of validation text: " + "; ".join(figures))
