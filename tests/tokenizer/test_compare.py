"""The comparison finds public vocabularies only where they are, and only unaltered."""

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest

from lalia.errors import UserError
from lalia.tokenizer import compare
from lalia.tokenizer.bpe import Tokenizer
from lalia.tokenizer.compare import bytes_per_token_report

TEXTS = ["the people said what they were.\n", "and \u4f60\u597d"]


def test_ours_is_counted(tokenizer: Tokenizer) -> None:
    report = bytes_per_token_report(TEXTS, tokenizer)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    num_tokens = sum(len(tokenizer.encode(text)) for text in TEXTS)
    assert report["num_bytes"] == num_bytes
    assert report["ours"]["num_tokens"] == num_tokens and report["ours"]["vocab_size"] == 448
    assert report["ours"]["bytes_per_token"] == pytest.approx(num_bytes / num_tokens, abs=1e-4)
    with pytest.raises(UserError, match="no text"):
        bytes_per_token_report([""], tokenizer)


def test_what_is_missing_is_said(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compare.importlib.util, "find_spec", lambda name: None)
    report = bytes_per_token_report(TEXTS, tokenizer)
    assert report["gpt2"]["available"] is False and "encoder.json was not found" in report["gpt2"]["why"]
    assert report["cl100k"]["available"] is False and "tiktoken is not installed" in report["cl100k"]["why"]
    assert all("pip install 'lalia[compare]'" in report[name]["remedy"] for name in ("gpt2", "cl100k"))


def test_an_altered_file_is_refused(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    source = ("words.txt", compare.hashlib.sha256(b"words").hexdigest(), "cached", (("nowhere_to_be_found", "x.gz"),))
    (tmp_path / "cached").write_bytes(b"words")
    assert compare._find(source, "some-package") == (b"words", f"tiktoken's cache {tmp_path}")
    (tmp_path / "cached").write_bytes(b"wordz")
    with pytest.raises(compare._NotAvailable, match="is not the published file"):
        compare._find(source, "some-package")


def test_a_package_is_searched_without_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "carries_words"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "words.gz").write_bytes(gzip.compress(b"words"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    digest = compare.hashlib.sha256(b"words").hexdigest()
    source = ("words.txt", digest, "cached", (("carries_words", "words.gz"),))
    assert compare._find(source, "carries-words") == (b"words", "package carries_words")
    (package / "words.gz").write_bytes(gzip.compress(b"words")[:-9])
    with pytest.raises(compare._NotAvailable, match="cannot be read"):
        compare._find(source, "carries-words")


@pytest.mark.parametrize(("name", "sources"), [
    ("gpt2", [compare._GPT2_VOCABULARY, compare._GPT2_MERGES]),
    ("cl100k_base", [compare._CL100K_RANKS]),
])  # fmt: skip
def test_counts_equal_those_of_tiktoken(
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    random_texts: Callable[..., list[str]],
    name: str,
    sources: list[compare._Source],
) -> None:
    """The reference is tiktoken's own encoding, its cache filled with the files found; needs lalia[compare]."""
    tiktoken = pytest.importorskip("tiktoken")
    for source in sources:
        try:
            content, _ = compare._find(source, "")
        except compare._NotAvailable as missing:
            pytest.skip(missing.why)
        (tmp_path / source[2]).write_bytes(content)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    encoding = tiktoken.get_encoding(name)
    texts = random_texts(200, seed=9)
    row = bytes_per_token_report(texts, tokenizer)[name.removesuffix("_base")]
    assert row["found"] == f"tiktoken's cache {tmp_path}"
    assert row["num_tokens"] == sum(len(encoding.encode_ordinary(text)) for text in texts)
    assert row["vocab_size"] == len(encoding.token_byte_values()) + (name == "gpt2")  # GPT-2's lists <|endoftext|>
