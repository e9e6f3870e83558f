"""Byte-level BPE: bytes round trip, specials stay out, transformers agrees."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lalia.errors import CorruptFile, UserError
from lalia.tokenizer.bpe import Tokenizer, train_tokenizer
from lalia.tokenizer.config import SPECIAL_TOKENS, TokenizerConfig

RandomTexts = Callable[..., list[str]]


def test_bytes_of_the_ids_are_the_text(tokenizer: Tokenizer, random_texts: RandomTexts) -> None:
    texts = random_texts(300)
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert b"".join(tokenizer.token_bytes(i) for i in ids) == text.encode("utf-8")
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text) == ids


def test_no_text_yields_a_special(tokenizer: Tokenizer, random_texts: RandomTexts) -> None:
    specials = set(tokenizer.special.values())
    assert len(specials) == len(SPECIAL_TOKENS)
    for ids in tokenizer.encode_batch([*random_texts(300, seed=2), *SPECIAL_TOKENS, "".join(SPECIAL_TOKENS)]):
        assert not specials & set(ids)
    # The control: the same file with specials recognised does yield one, so the test above can fail.
    tokenizer._backend.encode_special_tokens = False
    try:
        assert tokenizer.encode("<|im_end|>") == [tokenizer.turn_end_id]
    finally:
        tokenizer._backend.encode_special_tokens = True


def test_ids_bytes_merges_specials(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 448
    assert sorted(tokenizer.token_bytes(i) for i in range(256)) == [bytes([i]) for i in range(256)]
    assert list(tokenizer.special.values()) == list(range(448 - len(SPECIAL_TOKENS), 448))
    lengths = tokenizer.token_bytes_table()
    assert lengths.dtype == np.int32 and lengths.shape == (448,)
    assert (lengths[:256] == 1).all() and (lengths[256:432] >= 2).all() and (lengths[432:] == 0).all()
    assert tokenizer.decode([tokenizer.end_of_text_id, *tokenizer.encode("hi"), tokenizer.turn_end_id]) == "hi"
    for unknown in (-1, 448):
        with pytest.raises(UserError, match="outside the vocabulary of 448"):
            tokenizer.token_bytes(unknown)


def test_training_is_deterministic(tokenizer: Tokenizer, training_texts: list[str]) -> None:
    again = train_tokenizer(training_texts, TokenizerConfig(vocab_size=448))
    assert again.sha256 == tokenizer.sha256
    other = train_tokenizer(training_texts[:10], TokenizerConfig(vocab_size=384))
    assert other.sha256 != tokenizer.sha256


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path, max_length=128)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.sha256 == tokenizer.sha256
    assert loaded.special == tokenizer.special
    assert loaded.chat_template == tokenizer.chat_template
    text = "<|im_end|> the people"
    assert loaded.encode(text) == tokenizer.encode(text)
    loaded.save(tmp_path / "again", max_length=128)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("model_type", [None, "qwen3", "llama"])
def test_transformers_agrees(
    tokenizer: Tokenizer, tmp_path: Path, random_texts: RandomTexts, model_type: str | None
) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path, max_length=128)
    if model_type:  # beside a model, transformers may prefer the tokenizer class of the model's family
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 448}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.model_max_length == 128
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("<|endoftext|>", "<|endoftext|>", "<|pad|>")
    ordinary = [text for text in random_texts(200, seed=3) if not any(special in text for special in SPECIAL_TOKENS)]
    assert len(ordinary) > 50
    for text in ordinary:
        ids = tokenizer.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text
    # The control: where the literal of a special occurs, transformers makes it one and we do not.
    assert theirs("<|im_end|>")["input_ids"] == [tokenizer.turn_end_id] != tokenizer.encode("<|im_end|>")


def test_chat_tokenizer_ends_at_the_turn(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path, max_length=128, chat=True)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).eos_token_id == tokenizer.turn_end_id


def test_what_transformers_saves_loads(tokenizer: Tokenizer, tmp_path: Path, random_texts: RandomTexts) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path, max_length=128)
    transformers.AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "theirs")
    loaded = Tokenizer.load(tmp_path / "theirs")
    assert loaded.chat_template == tokenizer.chat_template  # transformers 5 moves it to chat_template.jinja
    assert loaded.special == tokenizer.special
    text = random_texts(20)[-1]
    assert loaded.encode(text) == tokenizer.encode(text)


def test_too_little_text_names_the_largest_size(training_texts: list[str]) -> None:
    with pytest.raises(UserError, match="give more text"):
        train_tokenizer(["a"], TokenizerConfig(vocab_size=320))
    with pytest.raises(UserError) as refused:
        train_tokenizer(training_texts, TokenizerConfig(vocab_size=4096))
    largest = int(str(refused.value).split("vocab_size to ")[1].split()[0])
    assert train_tokenizer(training_texts, TokenizerConfig(vocab_size=largest)).vocab_size == largest
    with pytest.raises(UserError):
        train_tokenizer(training_texts, TokenizerConfig(vocab_size=largest + 64))


@pytest.mark.parametrize(("size", "expected"), [(5000, "take 4992 or 5056"), (256, "greater than or equal to 320")])
def test_settings_refuse_odd_sizes(size: int, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        TokenizerConfig.parse({"vocab_size": size})


def test_bad_text_and_bad_folders(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"text 1 has half of a surrogate pair \(U\+D800\) at character 2"):
        tokenizer.encode_batch(["fine", "ab\ud800"])
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CorruptFile, match="not valid JSON"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CorruptFile, match="no usable tokenizer"):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["decoder"] = {"type": "CTC", "pad_token": "x", "word_delimiter_token": "|", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="decoder has the step CTC"):
        Tokenizer.load(tmp_path)
