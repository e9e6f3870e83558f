"""Damaged tokenizer files end in an error that names what is wrong, never in a crash."""

import base64
import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lalia.errors import CorruptFile, UserError
from lalia.tokenizer.importers import tokenizer_from_sentencepiece, tokenizer_from_tiktoken
from lalia.tokenizer.tokenizer import Tokenizer

FLAGS = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
UNIGRAM = {
    "version": "1.0", "truncation": None, "padding": None,
    "added_tokens": [{"id": 0, "content": "<unk>", **FLAGS}, {"id": 1, "content": "</s>", **FLAGS}],
    "normalizer": None, "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always"},
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
    },
    "decoder": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always"},
    "model": {
        "type": "Unigram", "unk_id": 0, "byte_fallback": False,
        "vocab": [["<unk>", 0.0], ["</s>", 0.0], ["\u2581", -1.0], ["a", -2.0], ["b", -3.0], ["\u2581a", -4.0]],
    },
}  # fmt: skip
WORDPIECE = {
    **UNIGRAM,
    "added_tokens": [{"id": 0, "content": "[UNK]", **FLAGS}],
    "post_processor": None, "pre_tokenizer": {"type": "WhitespaceSplit"},
    "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
    "model": {
        "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
        "vocab": {"[UNK]": 0, "a": 1, "##b": 2, "b": 3},
    },
}  # fmt: skip


def content_of(tokenizer: Tokenizer) -> dict[str, Any]:
    return json.loads(tokenizer._json)


def set_at(content: Any, *path: Any, value: Any) -> None:
    for step in path[:-1]:
        content = content[step]
    content[path[-1]] = value


CHANGES: list[tuple[str, Callable[[Any], Any], str]] = [
    ("bpe", lambda c: c.pop("model"), "it has no model"),
    ("bpe", lambda c: set_at(c, "model", "type", value="LSTM"), "its model is 'LSTM', known: BPE"),
    ("bpe", lambda c: c["model"].pop("vocab"), "its vocabulary is empty or of a wrong type"),
    ("bpe", lambda c: c["model"].pop("merges"), "merges is no list"),
    ("bpe", lambda c: set_at(c, "model", "merges", 3, value=["zzz", "t"]), "merge 3 .* needs 'zzz', which is no token"),
    ("bpe", lambda c: set_at(c, "model", "merges", 3, value="a b c"), "merge 3 is 'a b c', expected two tokens"),
    ("bpe", lambda c: set_at(c, "model", "vocab", "!", value=-1), "has the id -1"),
    ("bpe", lambda c: set_at(c, "model", "vocab", "!", value=1 << 40), "has the id 1099511627776"),
    ("bpe", lambda c: set_at(c, "model", "vocab", "!", value="0"), "has the id '0'"),
    ("bpe", lambda c: set_at(c, "model", "vocab", "!", value=7), "have the same id 7"),
    ("bpe", lambda c: set_at(c, "added_tokens", 0, "id", value=500), "which would become 432"),
    ("bpe", lambda c: set_at(c, "added_tokens", 0, "id", value=433), "is a duplicate"),
    ("bpe", lambda c: set_at(c, "added_tokens", 0, "content", value="<|im_end|>"), "is a duplicate"),
    ("bpe", lambda c: set_at(c, "added_tokens", 0, "content", value=""), "has no content"),
    ("bpe", lambda c: set_at(c, "added_tokens", value="x"), "added_tokens is no list"),
    ("bpe", lambda c: set_at(c, "decoder", value=[]), "decoder is no object"),
    ("bpe", lambda c: set_at(c, "pre_tokenizer", "pretokenizers", 0, "pattern", value={"Regex": "("}), "no usable"),
    ("unigram", lambda c: set_at(c, "model", "unk_id", value=99), "unk_id 99 is outside the vocabulary of 6"),
    ("unigram", lambda c: set_at(c, "model", "vocab", 3, value=["a"]), "entry 3 is no pair"),
    ("unigram", lambda c: set_at(c, "model", "vocab", 3, value=["b", -1.0]), "1 pieces of the vocabulary are dup"),
    ("unigram", lambda c: set_at(c, "added_tokens", 1, "id", value=3), "has id 3, but the vocabulary says 1"),
    (
        "unigram",
        lambda c: set_at(c, "post_processor", "special_tokens", "</s>", "ids", value=[77]),
        "puts the id 77 around a text, but the vocabulary has 6 ids",
    ),
    (
        "unigram",
        lambda c: set_at(c, "normalizer", value={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        "no usable tokenizer|precompiled",
    ),
    ("wordpiece", lambda c: set_at(c, "model", "unk_token", value="[X]"), "unknown token '\\[X\\]' is not in"),
]


@pytest.mark.parametrize(("kind", "change", "problem"), CHANGES)
def test_named_damage(
    tokenizer: Tokenizer, tmp_path: Path, kind: str, change: Callable[[Any], Any], problem: str
) -> None:
    contents = {"bpe": content_of(tokenizer), "unigram": UNIGRAM, "wordpiece": WORDPIECE}
    content = copy.deepcopy(contents[kind])
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    assert Tokenizer.load(tmp_path).encode("a b")  # whole, it works
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(CorruptFile, match=problem) as refused:
        Tokenizer.load(tmp_path)
    assert str(path) in str(refused.value) and "fetch it" in str(refused.value)


def test_names_twice_and_holes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = json.dumps(WORDPIECE)
    (tmp_path / "tokenizer.json").write_text(text.replace('"##b": 2', '"##b": 2, "##b": 3'))
    with pytest.raises(CorruptFile, match="'##b' occurs twice"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text.replace('"b": 3', '"b": 9'))  # ids may be missing between
    holes = Tokenizer.load(tmp_path)
    assert holes.vocab_size == 10 and holes.token_bytes(5) == b"" and holes.encode("ab b") == [1, 2, 9]
    assert holes.decode([1, 5, 9]) == "a b" and "##b" not in holes.decode([1, 2])
    (tmp_path / "special_tokens_map.json").write_text("[]")
    with pytest.raises(CorruptFile, match=r"special_tokens_map\.json is no JSON object"):
        Tokenizer.load(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": 7}')
    with pytest.raises(CorruptFile, match="chat template is int, expected text"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(CorruptFile, match="is not valid JSON"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[" * 100_000)
    with pytest.raises(CorruptFile, match="not valid JSON"):
        Tokenizer.load(tmp_path)


def mutate(content: bytes, draw: random.Random) -> bytes:
    """Flip, cut, repeat, or overwrite a few bytes."""
    changed = bytearray(content)
    for _ in range(draw.randrange(1, 4)):
        place = draw.randrange(len(changed) or 1)
        kind = draw.randrange(5)
        if kind == 0 and changed:
            changed[place % len(changed)] = draw.randrange(256)
        elif kind == 1:
            del changed[place : place + draw.randrange(1, 40)]
        elif kind == 2:
            changed[place:place] = changed[place : place + draw.randrange(1, 40)]
        elif kind == 3:
            changed[place : place + 1] = draw.choice([b"-1", b"null", b'"', b"{", b"99999999999", b"\xff\xff", b"[]"])
        else:
            del changed[place:]
    return bytes(changed)


def mutate_json(content: Any, draw: random.Random) -> Any:
    """Replace a value somewhere in a JSON document by one of another kind."""
    content = copy.deepcopy(content)
    holder: Any = None
    key: Any = None
    value = content
    for _ in range(draw.randrange(1, 6)):
        if not isinstance(value, dict | list) or not value:
            break
        key = draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
        holder, value = value, value[key]
    if holder is not None:
        holder[key] = draw.choice([None, -1, 10**12, "", "zz", [], {}, True, 0.5, [[]], {"type": "x"}, value])
    return content


def test_mutated_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Each either loads and then works on any text, or is refused."""
    draw = random.Random(0)
    ranks = b"".join(b"%s %d\n" % (base64.b64encode(bytes([byte])), byte) for byte in range(256))
    sources: list[Any] = [content_of(tokenizer), UNIGRAM, WORDPIECE]
    refused = 0
    for number in range(900):
        folder = tmp_path / "fuzz"
        folder.mkdir(exist_ok=True)
        try:
            if number % 3 == 0:
                changed = mutate_json(draw.choice(sources), draw)
                (folder / "tokenizer.json").write_text(json.dumps(changed))
                loaded = Tokenizer.load(folder)
            elif number % 3 == 1:
                (folder / "tokenizer.json").write_bytes(mutate(json.dumps(draw.choice(sources)).encode(), draw))
                loaded = Tokenizer.load(folder)
            else:
                (folder / "x.tiktoken").write_bytes(mutate(ranks, draw))
                loaded = tokenizer_from_tiktoken(folder / "x.tiktoken", "gpt2")
            ids = loaded.encode("ab \u4f60<unk>\n")
            loaded.decode(ids)
            loaded.encode_with_specials(["a"], ["b"], max_tokens=8)
        except UserError:
            refused += 1
    assert 300 < refused < 900


def test_mutated_sentencepiece_models(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    from tests.tokenizer.corpus import training_lines

    draw = random.Random(1)
    contents = []
    for model_type in ("unigram", "bpe"):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(training_lines()[:300]), model_prefix=str(tmp_path / "m"), vocab_size=200,
            model_type=model_type, hard_vocab_limit=False, minloglevel=2, normalization_rule_name="identity",
        )  # fmt: skip
        contents.append((tmp_path / "m.model").read_bytes())
    # The normalizer's table is most of a file, so one more kind: files with it, damaged in it.
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(training_lines()[:300]), model_prefix=str(tmp_path / "n"), vocab_size=200,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    contents.append((tmp_path / "n.model").read_bytes())
    refused = 0
    for _ in range(300):
        (tmp_path / "x.model").write_bytes(mutate(draw.choice(contents), draw))
        try:
            loaded = tokenizer_from_sentencepiece(tmp_path / "x.model")
            loaded.decode(loaded.encode("ab \u4f60<unk>\n caf\u00e9 \ufb01 e\u0301"))
        except UserError:
            refused += 1
    assert 100 < refused < 300
