"""SentencePiece .model files encode and decode as the sentencepiece package does."""

from pathlib import Path
from typing import Any

import pytest

from lalia.errors import CorruptFile, UserError
from lalia.tokenizer.importers import tokenizer_from_gguf, tokenizer_from_sentencepiece
from lalia.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.corpus import fuzzed_texts, training_lines

sentencepiece = pytest.importorskip("sentencepiece")

IDENTITY: dict[str, Any] = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "bpe", "byte_fallback": True, "split_digits": True, **IDENTITY},
    "gemma": {
        "model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": False, "control_symbols": ["<pad>"],
        "user_defined_symbols": ["<|im_end|>", "\u2581\u2581", "\u2581\u2581\u2581", "\n", "\n\n"], **IDENTITY,
    },
    "user_defined": {"model_type": "bpe", "byte_fallback": True, "user_defined_symbols": ["[CLS]", "\n"], **IDENTITY},
    "bpe_nfkc": {"model_type": "bpe"},
    "unigram": {"model_type": "unigram", "byte_fallback": True, **IDENTITY},
    "unigram_nfkc": {"model_type": "unigram"},
}  # fmt: skip
LOSSLESS = {"llama", "gemma", "user_defined", "unigram"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, paths = tmp_path_factory.mktemp("sentencepiece"), {}
    for name, options in KINDS.items():
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(training_lines()), model_prefix=str(folder / name), vocab_size=900,
            hard_vocab_limit=False, minloglevel=2, num_threads=1, **options,
        )  # fmt: skip
        paths[name] = folder / f"{name}.model"
    return paths


def same_score(theirs: Any, left: list[int], right: list[int]) -> bool:
    """Whether two ways to cut are as probable, so that rounding decides: the same pieces in another order."""
    return sorted(left) == sorted(right) and theirs.decode(left) == theirs.decode(right)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_text_equal_sentencepiece(models: dict[str, Path], kind: str) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(models[kind]))
    ours = tokenizer_from_sentencepiece(models[kind])
    assert (ours.lossy is None) == (kind in LOSSLESS)
    texts = fuzzed_texts(1500, seed=1)
    if kind == "user_defined":  # a text that is one such symbol and nothing else gets no space before it
        texts = [text for text in texts if text not in KINDS[kind]["user_defined_symbols"]]
    if kind.endswith("nfkc"):
        # The tokenizers library normalizes a character together with the marks behind it, and may lose the marks.
        marks = "\u0301\u0308\ufe0f\u200d\U0001f3fd\u093f\u094d\u0940"
        texts = [text for text in texts if not any(mark in text for mark in marks)]
    expected = theirs.encode(texts)
    ties = 0
    for text, ids, reference in zip(texts, ours.encode_batch(texts), expected, strict=True):
        if ids != reference:
            assert kind.startswith("unigram") and same_score(theirs, ids, reference), ascii(text)
            ties += 1
        if kind in LOSSLESS:
            assert ours.decode(ids) == text
        if theirs.unk_id() not in reference:
            assert ours.decode(reference) == theirs.decode(reference)
    assert ties < 0.05 * len(texts)


def test_controls(models: dict[str, Path]) -> None:
    """The comparison above fails if the space is left out, or if scores do not decide what is joined first."""
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(models["llama"]))
    texts = fuzzed_texts(200, seed=2)
    metadata = gguf_metadata(theirs, "llama", add_space=True)
    assert tokenizer_from_gguf(metadata).encode_batch(texts) == theirs.encode(texts)
    without = {**metadata, "tokenizer.ggml.add_space_prefix": False}
    assert tokenizer_from_gguf(without).encode_batch(texts) != theirs.encode(texts)
    turned = {**metadata, "tokenizer.ggml.scores": [-score for score in metadata["tokenizer.ggml.scores"]]}
    assert tokenizer_from_gguf(turned).encode_batch(texts) != theirs.encode(texts)


def test_specials_and_literals(models: dict[str, Path]) -> None:
    ours = tokenizer_from_sentencepiece(models["llama"], add_bos=True, add_eos=True)
    assert ours.special == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert (ours.bos_token_id, ours.eos_token_id, ours.unk_token_id, ours.pad_token_id) == (1, 2, 0, None)
    for kind in KINDS:
        tokenizer = tokenizer_from_sentencepiece(models[kind])
        for literal in ("a<s>b</s>", "<0x41>", "<s>", "x <unk>"):
            specials = set(tokenizer.special.values()) - {tokenizer.unk_token_id}
            assert not specials & set(tokenizer.encode(literal))
            if kind in LOSSLESS:
                assert tokenizer.decode(tokenizer.encode(literal)) == literal
    ids = ours.encode("Hello")
    assert ours.encode_with_specials(["Hello"])[0].ids == [1, *ids, 2]
    assert tokenizer_from_sentencepiece(models["llama"]).encode_with_specials(["Hello"])[0].ids == ids


@pytest.mark.parametrize("kind", ["llama", "unigram_nfkc"])
def test_transformers_reads_what_is_saved(models: dict[str, Path], tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    ours = tokenizer_from_sentencepiece(models[kind], add_bos=True)
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token, theirs.eos_token, theirs.unk_token) == ("<s>", "</s>", "<unk>")
    texts = fuzzed_texts(300, seed=3, literals=False)
    for text, (ids, _) in zip(texts, ours.encode_with_specials(texts), strict=True):
        reference = theirs(text)["input_ids"]
        assert reference == ids or (kind == "unigram_nfkc" and sorted(reference) == sorted(ids))
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
    again = Tokenizer.load(tmp_path)
    assert again.sha256 == ours.sha256 and again.special == ours.special and again.lossy == ours.lossy


def test_gguf_of_the_same_vocabulary(models: dict[str, Path]) -> None:
    """GGUF's "llama" vocabulary is the .model's pieces, scores and kinds."""
    for kind in ("llama", "gemma", "unigram"):
        theirs = sentencepiece.SentencePieceProcessor(model_file=str(models[kind]))
        metadata = gguf_metadata(theirs, "t5" if kind == "unigram" else "llama", kind != "gemma")
        texts = [text for text in fuzzed_texts(500, seed=4) if text.strip()]
        ours = tokenizer_from_gguf(metadata)
        expected = theirs.encode(texts)
        wrong = [i for i, ids in enumerate(ours.encode_batch(texts)) if ids != expected[i]]
        assert all(kind == "unigram" and same_score(theirs, ours.encode(texts[i]), expected[i]) for i in wrong)
        around = ours.encode_with_specials(["Hello"])[0].ids
        ids = theirs.encode("Hello")
        assert around == ([*ids, 2] if kind == "unigram" else [theirs.bos_id(), *ids])


def gguf_metadata(theirs: Any, model: str, add_space: bool) -> dict[str, Any]:
    def kind(i: int) -> int:
        checks = ((theirs.is_unknown, 2), (theirs.is_control, 3), (theirs.is_unused, 5), (theirs.is_byte, 6))
        user_defined = theirs.id_to_piece(i) in KINDS["gemma"]["user_defined_symbols"] and not add_space
        return next((number for check, number in checks if check(i)), 4 if user_defined else 1)

    ids = range(theirs.get_piece_size())
    return {
        "tokenizer.ggml.model": model,
        "tokenizer.ggml.tokens": [theirs.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [theirs.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": [kind(i) for i in ids],
        "tokenizer.ggml.bos_token_id": theirs.bos_id(),
        "tokenizer.ggml.eos_token_id": theirs.eos_id(),
        "tokenizer.ggml.unknown_token_id": theirs.unk_id(),
        "tokenizer.ggml.add_space_prefix": add_space,
    }


def test_what_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no file"):
        tokenizer_from_sentencepiece(tmp_path / "missing.model")
    content = models["unigram_nfkc"].read_bytes()
    path = tmp_path / "cut.model"
    # Between two fields too: the trainer's settings and the normalizer follow the pieces.
    end_of_pieces = content.rindex(
        b"\x12", 0, content.index(bytes(str(models["unigram_nfkc"].with_suffix("")), "utf-8"))
    )
    for size in (0, 1, 10, 1000, len(content) // 2, *range(end_of_pieces - 40, end_of_pieces + 1), len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(CorruptFile, match="cut short|has no pieces|damaged"):
            tokenizer_from_sentencepiece(path)
    path.write_bytes(b"not a model at all, but text")
    with pytest.raises(CorruptFile):
        tokenizer_from_sentencepiece(path)
    kinds = {"char": "type 4", "word": "type 3"}
    for model_type, problem in kinds.items():
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(training_lines()), model_prefix=str(tmp_path / model_type), vocab_size=300,
            model_type=model_type, hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
        with pytest.raises(UserError, match=problem):
            tokenizer_from_sentencepiece(tmp_path / f"{model_type}.model")
