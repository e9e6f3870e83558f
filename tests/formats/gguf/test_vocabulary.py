"""Tokenizers written to GGUF: llama.cpp encodes as the original does, and what it cannot do is refused."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from lalia.errors import CorruptFile, UserError
from lalia.formats.gguf import save_gguf
from lalia.formats.gguf.vocabulary import vocabulary_metadata
from lalia.tokenizer.patterns import LLAMA3, QWEN2, SPLITS
from tests.formats.gguf.conftest import TEXT
from tests.formats.gguf.llama_cpp import ask, needs_llama_cpp
from tests.formats.gguf.models import VOCAB, tiny

PIECES = [
    "Hello", "world", " the", "I'll", "DON'T", "we've", "it's", "3.14159", "1234567", "0", "\u0663\u0664", "\u00bd",
    "\u4e16\u754c", "\u3053\u3093\u306b\u3061\u306f", "\u0645\u0631\u062d\u0628\u0627", "\u05e9\u05dc\u05d5\u05dd",
    "\u0928\u092e\u0938\u094d\u0924\u0947", "\U0001f642", "\U0001f469\u200d\U0001f4bb", "\U0001f1e9\U0001f1ea",
    "e\u0301", "\u00e9", "\u00df", "\u0130", "\u01c5", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\u00a0",
    "\u3000", "\u200b", "x=1;", "if(a[0]!=b){", "}//", "#include<io>", "__init__", "...", "!?", "--", "\u2014",
    "\u201c", "<|im_end|>", "<|endoftext|>", "<br/>", "&amp;", "C:\\dir", "\ufeff", "\x01",
]  # fmt: skip


DIGITS = ["1234567 1234567 3.14159"] * 20
"""Learned as long tokens where the pattern lets digits stay together, which tells the patterns apart."""


def corpus(number: int) -> list[str]:
    """Random texts in many scripts, with whitespace of all sorts."""
    rng = random.Random(1)
    return ["".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 16))) for _ in range(number)]


def byte_level(folder: Path, steps: list[Any], use_regex: bool, **changes: Any) -> Path:
    """Train a byte-level BPE and write its folder."""
    backend = Tokenizer(models.BPE(**{k: v for k, v in changes.items() if k == "ignore_merges"}))
    last = pre_tokenizers.ByteLevel(add_prefix_space=changes.get("add_prefix_space", False), use_regex=use_regex)
    sequence = pre_tokenizers.Sequence([*steps, last]) if steps else last
    backend.pre_tokenizer = sequence  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False, special_tokens=[])
    backend.train_from_iterator([*TEXT, *DIGITS], trainer)
    backend.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    backend.add_tokens([AddedToken("<br/>", special=False, normalized=False)])
    if changes.get("bos"):
        backend.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", backend.token_to_id("<|endoftext|>"))]
        )
    if "normalizer" in changes:
        backend.normalizer = changes["normalizer"]
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|endoftext|>", "eos_token": {"content": "<|endoftext|>"}, "chat_template": "t"})
    )
    return folder


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


KNOWN: dict[str, Callable[[Path], Path]] = {
    "gpt-2": lambda folder: byte_level(folder, [], True),
    "smollm": lambda folder: byte_level(folder, [pre_tokenizers.Digits(individual_digits=True)], True),
    "smollm as splits": lambda folder: byte_level(folder, [split(pattern) for pattern in SPLITS["smollm"]], False),
    "qwen2": lambda folder: byte_level(folder, [split(QWEN2)], False),
    "llama-bpe": lambda folder: byte_level(folder, [split(LLAMA3)], False, ignore_merges=True, bos=True),
}


@needs_llama_cpp
@pytest.mark.parametrize("pre", KNOWN)
def test_llama_cpp_encodes_the_same(pre: str, tmp_path: Path) -> None:
    folder = KNOWN[pre](tmp_path / "tokenizer")
    case = tiny("llama")
    saved = save_gguf(tmp_path / "model.gguf", case.values, case.tensors, folder)
    texts = corpus(300)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    parsed = [backend.encode(text).ids for text in texts]  # literals of specials become specials
    backend.encode_special_tokens = True
    plain = [backend.encode(text, add_special_tokens=False).ids for text in texts]
    bodies = [{"content": text, "add_special": False, "parse_special": False} for text in texts]
    requests: list[tuple[str, Any]] = [("tokenize", body) for body in bodies]
    requests += [("tokenize", body | {"add_special": True, "parse_special": True}) for body in bodies]
    answers = ask(saved.path, requests)
    different = [text for text, ours, theirs in zip(texts, plain, answers, strict=False) if ours != theirs]
    assert not different, different[:3]
    assert answers[len(texts) :] == parsed
    # Negative control: under the name of another pre-tokenizer the ids differ.
    if pre == "gpt-2":
        old, new = (b"\x05\0\0\0\0\0\0\0" + name for name in (b"gpt-2", b"qwen2"))
        content = saved.path.read_bytes()
        assert content.count(old) == 1
        other = tmp_path / "other.gguf"
        other.write_bytes(content.replace(old, new))
        assert ask(other, requests[: len(texts)]) != plain


UNKNOWN: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "pattern": ("has no name in llama.cpp", lambda folder: byte_level(folder, [split(r"\w+|\W+")], False)),
    "prefix space": ("has no name", lambda folder: byte_level(folder, [], True, add_prefix_space=True)),
    "ignored merges": ("ignore_merges = True", lambda folder: byte_level(folder, [], True, ignore_merges=True)),
    "merges that llama.cpp ignores": (
        "ignore_merges = False",
        lambda folder: byte_level(folder, [split(LLAMA3)], False),
    ),
    "normalizer": ("Lowercase", lambda folder: byte_level(folder, [], True, normalizer=normalizers.Lowercase())),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_refuses_what_llama_cpp_cannot_do(what: str, tmp_path: Path) -> None:
    message, make = UNKNOWN[what]
    with pytest.raises(UserError, match=message):
        vocabulary_metadata(make(tmp_path / "tokenizer"), VOCAB, {})


def test_metadata(tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "tokenizer", [], True, bos=True, normalizer=normalizers.NFC())
    size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    metadata, remarks = vocabulary_metadata(folder, size + 3, {"eos_token_id": [7, 8], "pad_token_id": None})
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"].tolist()
    assert len(tokens) == len(types) == size + 3
    assert types[tokens.index("<|endoftext|>")] == 3 and types[tokens.index("<br/>")] == 4 and types[0] == 1
    assert types[size:] == [5, 5, 5] and tokens[size] == f"[PAD{size}]"
    assert metadata["tokenizer.ggml.bos_token_id"] == tokens.index("<|endoftext|>")
    eos = tokens.index("<|endoftext|>")
    assert (metadata["tokenizer.ggml.eos_token_id"], metadata["tokenizer.ggml.eot_token_id"]) == (eos, 7)
    assert metadata["tokenizer.ggml.add_bos_token"] is True and metadata["tokenizer.ggml.add_eos_token"] is False
    assert metadata["tokenizer.chat_template"] == "t"
    assert ["NFC" in remark for remark in remarks] == [True]
    with pytest.raises(UserError, match="another model"):
        vocabulary_metadata(folder, size - 1, {})
    content = json.loads((folder / "tokenizer.json").read_text())
    del content["model"]["merges"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises((UserError, CorruptFile)):
        vocabulary_metadata(folder, size, {})
