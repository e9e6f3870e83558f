"""Token shards: one split's documents as a flat file of token ids, memory-mapped.

A folder holds, for each split, SPLIT-00000.bin (little-endian u16, or u32 when the vocabulary has more than 65,536
ids; every document starts with <|endoftext|>) and SPLIT-00000.idx.npy (u64: where each document starts), and one
manifest.json with the counts and SHA-256 of all of them.
"""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lalia.errors import CorruptFile, UserError
from lalia.files import fingerprint, read_json, sha256_file, write_json

FORMAT = "lalia token shards 1"
REMEDY = "delete the tokens folder and run the same command again: it tokenizes anew"
_VERIFY_CHUNK = 1 << 24  # tokens read at a time when all are checked


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest dtype that holds every id."""
    return np.dtype("<u2") if vocab_size <= 65_536 else np.dtype("<u4")


def write_split(
    folder: Path, split: str, documents: Iterable[list[int]], vocab_size: int, end_of_text_id: int, num_bytes: int
) -> dict[str, Any]:
    """Write the documents of a split, <|endoftext|> before each, and return their entry for `write_manifest`.

    Args:
        folder: exists.
        split: "train" or "validation".
        documents: ids of each document, without the leading <|endoftext|>; may be a generator.
        vocab_size: decides the dtype.
        end_of_text_id: id of <|endoftext|>.
        num_bytes: UTF-8 bytes of the documents' texts.

    Raises:
        UserError: if there is no document.
    """
    dtype = token_dtype(vocab_size)
    tokens_path, index_path = folder / f"{split}-00000.bin", folder / f"{split}-00000.idx.npy"
    digest = hashlib.sha256()
    starts: list[int] = []
    num_tokens = 0
    with tokens_path.open("wb") as file:
        for ids in documents:
            content = np.array([end_of_text_id, *ids], dtype=dtype).tobytes()
            starts.append(num_tokens)
            num_tokens += len(ids) + 1
            digest.update(content)
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if not starts:
        raise UserError(f"the {split} split has no document to tokenize; give more text, or change the split's share")
    with index_path.open("wb") as file:
        np.save(file, np.array(starts, dtype="<u8"), allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    return {
        "tokens": {"file": tokens_path.name, "sha256": digest.hexdigest()},
        "index": {"file": index_path.name, "sha256": sha256_file(index_path)},
        "num_tokens": num_tokens,
        "num_documents": len(starts),
        "num_bytes": num_bytes,
    }


def write_manifest(
    folder: Path, splits: dict[str, dict[str, Any]], vocab_size: int, end_of_text_id: int, tokenizer_sha256: str
) -> None:
    """Write manifest.json, last: shards without it are unfinished."""
    manifest = {
        "format": FORMAT,
        "tokenizer_sha256": tokenizer_sha256,
        "vocab_size": vocab_size,
        "end_of_text_id": end_of_text_id,
        "dtype": token_dtype(vocab_size).name,
        "splits": splits,
    }
    write_json(folder / "manifest.json", manifest)


@dataclass(frozen=True, eq=False)
class TokenShards:
    """One split's tokens.

    Attributes:
        tokens: all ids, memory-mapped (num_tokens,) u16 or u32.
        document_starts: where each document's <|endoftext|> is, (num_documents,) int64.
        num_bytes: UTF-8 bytes of the split's texts.
        fingerprint: identity of the content, for resuming and for receipts.
    """

    split: str
    tokens: np.ndarray
    document_starts: np.ndarray
    num_bytes: int
    vocab_size: int
    end_of_text_id: int
    tokenizer_sha256: str
    fingerprint: str

    @property
    def num_tokens(self) -> int:
        """Number of tokens, the <|endoftext|> of each document included."""
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.document_starts)

    def document(self, number: int) -> np.ndarray:
        """Ids of one document, its leading <|endoftext|> included."""
        ends = np.append(self.document_starts[1:], self.num_tokens)
        return self.tokens[self.document_starts[number] : ends[number]]

    @classmethod
    def open(cls, folder: Path | str, split: str, verify: bool = False) -> "TokenShards":
        """Map a split into memory, after checking its files against the manifest.

        Args:
            folder: the tokens folder.
            split: "train" or "validation".
            verify: read everything, check SHA-256, the range of every id and every document's first token.

        Raises:
            UserError: if the manifest has no such split.
            CorruptFile: if a file is missing, cut off, or another than was written; the message has the remedy.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder)
        splits = manifest["splits"]
        if split not in splits:
            raise UserError(f"{folder} has no split {split!r}; it has {', '.join(splits)}")
        entry = splits[split]
        dtype = token_dtype(manifest["vocab_size"])
        tokens_path, index_path = folder / entry["tokens"]["file"], folder / entry["index"]["file"]
        tokens = _map_tokens(tokens_path, dtype, entry["num_tokens"])
        starts = _read_index(index_path, entry["num_tokens"], entry["num_documents"])
        shards = cls(
            split=split,
            tokens=tokens,
            document_starts=starts,
            num_bytes=entry["num_bytes"],
            vocab_size=manifest["vocab_size"],
            end_of_text_id=manifest["end_of_text_id"],
            tokenizer_sha256=manifest["tokenizer_sha256"],
            fingerprint=fingerprint([manifest["tokenizer_sha256"], split, entry]),
        )
        if verify:
            for path, part in ((tokens_path, "tokens"), (index_path, "index")):
                if sha256_file(path) != entry[part]["sha256"]:
                    raise CorruptFile(f"{path} has another SHA-256 than manifest.json records; {REMEDY}")
            shards._check_ids(tokens_path)
        return shards

    def check_tokenizer(self, sha256: str) -> None:
        """Refuse to go with another tokenizer than the one that made the ids.

        Raises:
            CorruptFile: naming both.
        """
        if sha256 != self.tokenizer_sha256:
            raise CorruptFile(
                f"the {self.split} split was tokenized with a tokenizer of SHA-256 {self.tokenizer_sha256[:12]}..., "
                f"the one beside it has {sha256[:12]}...; {REMEDY}"
            )

    def _check_ids(self, path: Path) -> None:
        for start in range(0, self.num_tokens, _VERIFY_CHUNK):
            check_range(self.tokens[start : start + _VERIFY_CHUNK], self.vocab_size, path)
        if (self.tokens[self.document_starts] != self.end_of_text_id).any():
            raise CorruptFile(f"{path}: a document does not start with token {self.end_of_text_id}; {REMEDY}")


def check_range(ids: np.ndarray, vocab_size: int, where: Path | str) -> None:
    """Refuse ids that the vocabulary lacks: on a GPU they would end the process without a reason.

    Raises:
        CorruptFile: naming the id and the vocabulary.
    """
    largest = int(ids.max(initial=0))
    if largest >= vocab_size:
        raise CorruptFile(f"{where}: token id {largest} is outside the vocabulary of {vocab_size}; {REMEDY}")


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    manifest = read_json(path)
    problem = None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        problem = f"is not of format {FORMAT!r}"
    elif not _has_shape(manifest):
        problem = "lacks an entry, or one has another type than it should"
    elif manifest["dtype"] != token_dtype(manifest["vocab_size"]).name:
        problem = f"says {manifest['dtype']} where a vocabulary of {manifest['vocab_size']} needs another dtype"
    if problem:
        raise CorruptFile(f"{path} {problem}; {REMEDY}")
    return manifest


def _has_shape(manifest: dict[str, Any]) -> bool:
    try:
        counts = [manifest["vocab_size"], manifest["end_of_text_id"]]
        names = [manifest["tokenizer_sha256"], manifest["dtype"]]
        for entry in manifest["splits"].values():
            counts += [entry["num_tokens"], entry["num_documents"], entry["num_bytes"]]
            names += [entry[part][key] for part in ("tokens", "index") for key in ("file", "sha256")]
    except (KeyError, TypeError, AttributeError):
        return False
    return all(type(count) is int and count >= 0 for count in counts) and all(isinstance(name, str) for name in names)


def _map_tokens(path: Path, dtype: np.dtype, num_tokens: int) -> np.ndarray:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise CorruptFile(f"{path} is missing; {REMEDY}") from None
    expected = num_tokens * dtype.itemsize
    if size != expected or not num_tokens:
        raise CorruptFile(f"{path} has {size} bytes, expected {expected} ({num_tokens} {dtype.name}); {REMEDY}")
    return np.memmap(path, dtype=dtype, mode="r", shape=(num_tokens,))


def _read_index(path: Path, num_tokens: int, num_documents: int) -> np.ndarray:
    try:
        starts = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise CorruptFile(f"{path} is missing; {REMEDY}") from None
    except (ValueError, EOFError, OSError) as error:
        raise CorruptFile(f"{path} is no .npy file ({error}); {REMEDY}") from None
    if starts.dtype != np.dtype("<u8") or starts.shape != (num_documents,) or not num_documents:
        raise CorruptFile(
            f"{path} holds {starts.dtype.name} {starts.shape}, expected uint64 ({num_documents},); {REMEDY}"
        )
    # Compared before the conversion: a u64 beyond int64 would turn negative.
    if starts[0] != 0 or starts[-1] >= num_tokens or (starts[1:] <= starts[:-1]).any():
        raise CorruptFile(f"{path} does not list increasing positions from 0 to below {num_tokens}; {REMEDY}")
    return starts.astype(np.int64)
