"""Tokenizers from tiktoken ranks: byte-level BPE that joins the neighbours whose result has the lowest rank.

A `.tiktoken` file has a line per token, its bytes in base64 and its rank, which is its id. The expression that cuts
words and the specials are not in the file; GPT-2, GPT-4, GPT-4o, Llama 3 and Qwen publish them apart.
"""

import base64
import binascii
import gzip
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lalia.errors import CorruptFile, UserError
from lalia.tokenizer import patterns
from lalia.tokenizer.decoding import character_of_byte
from lalia.tokenizer.importers.build import added_token, ranked_merges, tokenizer_json
from lalia.tokenizer.specification import MAX_IDS
from lalia.tokenizer.tokenizer import Tokenizer


def tokenizer_from_tiktoken(
    source: Any, pattern: str | None = None, special_tokens: Mapping[str, int] | None = None
) -> Tokenizer:
    """Build a tokenizer from ranks.

    Args:
        source: a `.tiktoken` file (also gzipped), a mapping of bytes to ranks, or a `tiktoken.Encoding`.
        pattern: how text is cut into words: gpt2, cl100k_base, o200k_base, llama3, qwen, ... (lalia.tokenizer.patterns
            has them all). An Encoding knows its name.
        special_tokens: specials and their ids. An Encoding knows its own.

    Raises:
        UserError: if the file is missing or the pattern is not known.
        CorruptFile: if the ranks are damaged: a line that is no base64 and number, a token or rank that occurs twice, a
            byte without a token, a special with an id that is taken.
    """
    what = "the ranks"
    if isinstance(source, str | Path):
        what = str(source)
        ranks = read_ranks(Path(source))
    elif isinstance(source, Mapping):
        ranks = dict(source)
    elif hasattr(source, "_mergeable_ranks"):
        what = f"tiktoken's {source.name}"
        ranks = dict(source._mergeable_ranks)
        pattern = pattern or source.name
        special_tokens = source._special_tokens if special_tokens is None else special_tokens
    else:
        raise UserError(f"cannot read ranks from {type(source).__name__}; give a .tiktoken file or a tiktoken.Encoding")
    if pattern is None:
        known = ", ".join(sorted(patterns.TIKTOKEN_NAMES))
        raise UserError(f"ranks do not say how text is cut into words; give pattern, one of {known}")
    split = patterns.split_name(pattern, patterns.TIKTOKEN_NAMES, "the pattern")
    _check(ranks, dict(special_tokens or {}), what)
    characters = character_of_byte()
    by_rank = sorted((rank, "".join(characters[byte] for byte in token)) for token, rank in ranks.items())
    vocabulary = {token: rank for rank, token in by_rank}
    specials = sorted((special_tokens or {}).items(), key=lambda item: item[1])
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
        # The library numbers added tokens without a hole, unless the vocabulary has them: GPT-4's begin after one.
        "vocab": {**vocabulary, **dict(specials)}, "merges": ranked_merges(vocabulary, vocabulary),
    }  # fmt: skip
    text = tokenizer_json(
        model,
        [added_token(token, i, special=True) for token, i in specials],
        pre_tokenizer=patterns.pre_tokenizer(split),
        decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    )
    end = next((token for token, _ in specials if token in ("<|endoftext|>", "<|end_of_text|>")), None)
    begin = next((token for token, _ in specials if token in ("<|begin_of_text|>", "<|startoftext|>")), None)
    return Tokenizer(text, {"bos_token": begin, "eos_token": end})


def read_ranks(path: Path) -> dict[bytes, int]:
    """The ranks of a `.tiktoken` file, plain or gzipped.

    Raises:
        UserError: if there is no such file.
        CorruptFile: naming the first line that is damaged.
    """
    if not path.is_file():
        raise UserError(f"{path} is no file; give a .tiktoken file")
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise CorruptFile(f"{path} cannot be unpacked ({error}); get it again") from None
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line:
            continue
        parts = line.split()
        try:
            token, rank = base64.b64decode(parts[0], validate=True), int(parts[1])
        except (binascii.Error, ValueError, IndexError):
            token, rank = b"", -1
        if len(parts) != 2 or not token or rank < 0:
            raise CorruptFile(f"{path}: line {number} is no base64 token and its rank; get the file again")
        if token in ranks:
            raise CorruptFile(f"{path}: line {number} has the token of rank {ranks[token]} again; get the file again")
        ranks[token] = rank
    return ranks


def _check(ranks: Mapping[Any, Any], specials: Mapping[str, int], what: str) -> None:
    owners: dict[int, Any] = {}
    for token, rank in [*ranks.items(), *specials.items()]:
        if not isinstance(rank, int) or not 0 <= rank < MAX_IDS:
            raise CorruptFile(f"{what}: the token {token!r:.60} has the rank {rank!r:.40}, expected 0 to {MAX_IDS - 1}")
        if rank in owners:
            raise CorruptFile(f"{what}: the tokens {owners[rank]!r:.60} and {token!r:.60} both have the rank {rank}")
        owners[rank] = token
    if not all(isinstance(token, bytes) for token in ranks):
        raise CorruptFile(f"{what}: a token is no bytes")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise CorruptFile(f"{what}: {len(missing)} of the 256 bytes have no token, the first 0x{missing[0]:02x}")
