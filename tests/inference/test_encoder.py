"""Encoders against transformers on the same folders, and the same comparisons with one thing wrong."""

import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModel, AutoTokenizer

import lalia
from lalia.errors import CorruptFile, UserError
from lalia.files import write_json
from lalia.formats.sentence_transformers import Pooling
from lalia.inference.encoder import BATCH_TOKENS, Encoder, _batches
from tests.inference.encoders import LABELS, TEXTS, add_modules, make_folder

TOLERANCE = 1e-5
VISIBLE = 1e-3


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "bert", "BertModel")


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "masked", "BertForMaskedLM")


def their_states(folder: Path, max_length: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    """Final hidden states (texts, seq, hidden) and mask (texts, seq, 1) of TEXTS, padded together."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(TEXTS, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    with torch.no_grad():
        return model(**batch).last_hidden_state, batch["attention_mask"][..., None].float()


def difference(one: Any, other: Any) -> float:
    return float(np.abs(np.asarray(one) - np.asarray(other)).max())


@pytest.mark.parametrize("kind", ["BertModel", "DistilBertModel", "BertForMaskedLM"])
def test_plain_folder_is_the_normalized_mean(tmp_path: Path, kind: str) -> None:
    folder = make_folder(tmp_path / "model", kind)
    hidden, mask = their_states(folder)
    mean = (hidden * mask).sum(1) / mask.sum(1)
    ours = lalia.load(folder).embed(TEXTS)
    assert ours.dtype == np.float32 and ours.shape == (len(TEXTS), 32)
    assert difference(ours, torch.nn.functional.normalize(mean, dim=-1)) < TOLERANCE
    # The comparison sees what could be wrong.
    assert difference(ours, mean) > VISIBLE
    assert difference(ours, torch.nn.functional.normalize(hidden.mean(1), dim=-1)) > VISIBLE


@pytest.mark.parametrize(
    ("pooling", "normalize"),
    [
        ({"pooling_mode_mean_tokens": True}, False),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, True),
        ({"pooling_mode_max_tokens": True}, True),
        ({"pooling_mode": ["cls", "mean"]}, False),
        ({"pooling_mode": "lasttoken"}, True),
    ],
)
def test_pooling_of_sentence_transformers_folders(tmp_path: Path, pooling: dict[str, Any], normalize: bool) -> None:
    folder = add_modules(make_folder(tmp_path / "model", "BertModel"), pooling, normalize)
    hidden, mask = their_states(folder, 12)
    last = mask.squeeze(-1).sum(1).long() - 1
    vectors = {
        "mean": (hidden * mask).sum(1) / mask.sum(1),
        "cls": hidden[:, 0],
        "max": hidden.masked_fill(mask == 0, -1e9).amax(1),
        "lasttoken": hidden[torch.arange(len(TEXTS)), last],
    }
    modes = [name for name in vectors if any(value is True and name in key for key, value in pooling.items())]
    named = pooling.get("pooling_mode", modes)
    modes = [named] if isinstance(named, str) else named
    expected = torch.cat([vectors[mode] for mode in modes], -1)
    expected = torch.nn.functional.normalize(expected, dim=-1) if normalize else expected
    encoder = lalia.load(folder)
    assert encoder.max_length == 12 and encoder.dim == 32 * len(modes)
    with pytest.warns(UserWarning, match=r"\d of 7 texts have more than 12 tokens"):
        ours = encoder.embed(TEXTS, batch_size=3)
    assert difference(ours, expected) < TOLERANCE
    others = [vector for name, vector in vectors.items() if name not in modes]
    assert len(modes) > 1 or all(difference(ours, other) > VISIBLE for other in others)


def test_no_difference_between_batches_orders_and_alone(bert: Path) -> None:
    encoder = lalia.load(bert)
    together = encoder.embed(TEXTS)
    assert difference(together, np.concatenate([encoder.embed([text]) for text in TEXTS])) < TOLERANCE
    assert difference(together[::-1], encoder.embed(TEXTS[::-1], batch_size=2)) < TOLERANCE
    assert encoder.embed([]).shape == (0, 32)


def test_batches_hold_every_row_once_within_the_limits() -> None:
    rng = random.Random(0)
    lengths = [rng.choice([1, 7, 300, 5000, 20_000]) for _ in range(200)]
    batches = list(_batches(lengths, 32))
    assert sorted(i for rows in batches for i in rows) == list(range(200))
    for rows in batches:
        assert len(rows) <= 32
        assert len(rows) == 1 or len(rows) * max(lengths[i] for i in rows) <= BATCH_TOKENS
    padding = sum(max(lengths[i] for i in rows) * len(rows) for rows in batches) / sum(lengths)
    unsorted = sum(max(lengths[i : i + 8]) * 8 for i in range(0, 200, 8)) / sum(lengths)
    assert padding < 1.1 < 2 < unsorted


def test_long_texts_are_cut_with_a_warning_or_refused(bert: Path) -> None:
    encoder = lalia.load(bert)
    long = "summer " * 100
    with pytest.warns(UserWarning, match="2 of 3 texts have more than 48 tokens and were cut there"):
        vectors = encoder.embed([long, "day", long + "day"])
    assert difference(vectors[0], vectors[2]) == 0
    assert difference(vectors[0], encoder.embed(["summer " * 46])[0]) < TOLERANCE
    assert difference(vectors[0], encoder.embed(["summer " * 45])[0]) > 1e-4
    with pytest.raises(UserError, match=r"text 1 has 102 tokens, this model reads 48 .*split them"):
        encoder.embed(["day", long], truncate=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.embed(TEXTS)


def test_special_literals_in_texts_are_text(bert: Path) -> None:
    encoder = lalia.load(bert)
    (ids,) = encoder.encode(["day [SEP] day"])
    assert ids.count(encoder.tokenizer.sep_token_id or -1) == 1
    assert difference(encoder.embed(["day [SEP] day"]), encoder.embed(["day day"])) > VISIBLE


@pytest.mark.parametrize(
    ("texts", "message"),
    [("one text", r"got one string; write \[text\]"), (["a", 5], "text 1 is int"), (["\ud800"], "surrogate")],
)
def test_what_is_no_list_of_texts(bert: Path, texts: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        lalia.load(bert).embed(texts)


def test_default_prompt(tmp_path: Path) -> None:
    folder = add_modules(make_folder(tmp_path / "model", "BertModel"), {"pooling_mode": "mean"}, True)
    plain = lalia.load(folder)
    expected = plain.embed(["query: lovely"])
    write_json(folder / "config_sentence_transformers.json", {"prompts": {"query": "query: "}})
    assert difference(lalia.embed(folder, ["lovely"]), plain.embed(["lovely"])) == 0
    write_json(
        folder / "config_sentence_transformers.json",
        {"prompts": {"query": "query: "}, "default_prompt_name": "query"},
    )
    assert difference(lalia.embed(folder, ["lovely"]), expected) == 0
    write_json(folder / "config_sentence_transformers.json", {"default_prompt_name": "other"})
    with pytest.raises(CorruptFile, match="'other' is none of its prompts"):
        lalia.load(folder)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("modules.json", {}, "is not a list of objects"),
        ("modules.json", [{"type": "x.Transformer"}, {"type": "x.Pooling"}, {"type": "x.Dense"}], "Pooling, Dense"),
        ("modules.json", [{"type": "x.Transformer", "path": "0_T"}, {"type": "x.Pooling"}], "subfolder '0_T'"),
        ("1_Pooling/config.json", {"pooling_mode": "weightedmean"}, "pooling weightedmean; known modes: mean"),
        ("1_Pooling/config.json", {}, "by no mode"),
        ("1_Pooling/config.json", {"pooling_mode": "mean", "include_prompt": False}, "include_prompt"),
        ("1_Pooling/config.json", [], "no JSON object"),
        ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case"),
        ("sentence_bert_config.json", {"max_seq_length": -1}, "max_seq_length = -1"),
    ],
)
def test_folders_that_ask_for_more(tmp_path: Path, bert: Path, file: str, content: Any, message: str) -> None:
    import shutil

    folder = add_modules(Path(shutil.copytree(bert, tmp_path / "model")), {"pooling_mode": "mean"}, True)
    lalia.load(folder)
    write_json(folder / file, content)
    with pytest.raises(UserError, match=message):
        lalia.load(folder)


def test_causal_models_embed_by_the_mean_of_their_states(tmp_path: Path) -> None:
    from lalia.formats.hf_folder import save_model
    from tests.serving.stub import make_tokenizer, make_transformer

    tokenizer = make_tokenizer()
    save_model(make_transformer(tokenizer), tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    model = lalia.load(tmp_path / "model")
    texts = ["Thou art more lovely", "day", "And summer's lease"]
    ours = lalia.embed(model, texts)
    peer = AutoModel.from_pretrained(tmp_path / "model").eval()
    for text, vector in zip(texts, ours, strict=True):
        with torch.no_grad():
            states = peer(torch.tensor([model.encode(text)])).last_hidden_state[0]
        assert difference(vector, torch.nn.functional.normalize(states.mean(0), dim=-1)) < TOLERANCE
        assert difference(vector, torch.nn.functional.normalize(states[-1], dim=-1)) > VISIBLE
    assert difference(lalia.embed(tmp_path / "model", texts), ours) == 0
    model.engine.stop()


def test_fill_equals_the_pipeline_of_transformers(masked: Path) -> None:
    pipeline: Any = transformers.pipeline("fill-mask", model=str(masked))
    encoder = lalia.load(masked)
    for text in ("thou art more [MASK]", "[MASK] winds do shake", "a summer's [MASK]-day?"):
        theirs = pipeline(text, top_k=7)
        ours = encoder.fill(text, top_k=7)
        assert [filling.token for filling in ours] == [
            pipeline.tokenizer.convert_ids_to_tokens(entry["token"]) for entry in theirs
        ]
        assert difference([f.probability for f in ours], [entry["score"] for entry in theirs]) < TOLERANCE
    every = {filling.token for filling in encoder.fill("[MASK]", top_k=encoder.config.vocab_size)}
    assert every == set(pipeline.tokenizer.get_vocab())
    assert encoder.fill("thou art more [MASK]") != encoder.fill("thou art [MASK] more")


def test_fill_refuses(masked: Path, bert: Path) -> None:
    encoder = lalia.load(masked)
    with pytest.raises(UserError, match=r"has 0 masks; write \[MASK\] once"):
        encoder.fill("no mask")
    with pytest.raises(UserError, match="has 2 masks"):
        encoder.fill("[MASK] [MASK]")
    with pytest.raises(UserError, match="103 tokens, this model reads 48"):
        encoder.fill("summer " * 100 + "[MASK]")
    with pytest.raises(UserError, match="top_k = 0"):
        encoder.fill("[MASK]", top_k=0)
    with pytest.raises(UserError, match="fills in no masks; it makes vectors: use embed"):
        lalia.load(bert).fill("[MASK]")
    with pytest.raises(UserError, match="classifies nothing; it is a masked language model"):
        encoder.classify(["day"])


@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "DistilBertForSequenceClassification"])
def test_classify_equals_the_pipeline_of_transformers(tmp_path: Path, kind: str) -> None:
    settings = {"id2label": LABELS, "label2id": {name: number for number, name in LABELS.items()}}
    folder = make_folder(tmp_path / "model", kind, **settings)
    pipeline: Any = transformers.pipeline("text-classification", model=str(folder))
    encoder = lalia.load(folder)
    ours = encoder.classify(TEXTS)
    for theirs, result in zip(pipeline(TEXTS, top_k=None), ours, strict=True):
        assert list(result.probabilities) == [entry["label"] for entry in theirs]
        assert difference(list(result.probabilities.values()), [entry["score"] for entry in theirs]) < TOLERANCE
        assert (result.label, result.probability) == next(iter(result.probabilities.items()))
    assert difference([r.probability for r in ours], [1 / 3] * len(TEXTS)) > VISIBLE
    with pytest.raises(UserError, match="fills in no masks; it is a classifier of the labels calm, windy, dark"):
        encoder.fill("[MASK]")


def test_a_single_output_is_no_classifier(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "BertForSequenceClassification", num_labels=1)
    with pytest.raises(UserError, match="at least two labels, got 1|num_labels"):
        lalia.load(folder)


def test_options_for_generation_are_refused(bert: Path) -> None:
    with pytest.raises(UserError, match="does not generate text, so it takes no max_batch"):
        lalia.load(bert, max_batch=3)
    with pytest.raises(UserError, match="str is no encoder"):
        from lalia.inference.loading import as_encoder

        as_encoder("bert")


def test_pooling_is_said(bert: Path) -> None:
    encoder = lalia.load(bert)
    assert isinstance(encoder, Encoder) and encoder.pooling == Pooling(("mean",), True, None, "")
    assert encoder.name == "bert" and encoder.max_length == 48


@pytest.mark.parametrize(("pooling_type", "mode"), [(None, "mean"), (1, "mean"), (2, "cls"), (4, None)])
def test_gguf_of_bert(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch, pooling_type: int | None, mode: Any
) -> None:
    from lalia.formats.gguf import export

    def vocabulary(folder: Path, vocab_size: int, ids: Any) -> tuple[dict[str, Any], list[str]]:
        """WordPiece as GGUF has it: U+2581 before the tokens that begin a word, others without ##."""
        tokenizer = lalia.load(folder).tokenizer
        tokens = [tokenizer.token(i) for i in range(vocab_size)]
        is_special = [token in tokenizer.special for token in tokens]
        written = [
            token if special else token[2:] if token.startswith("##") else "\u2581" + token
            for token, special in zip(tokens, is_special, strict=True)
        ]
        return {
            "tokenizer.ggml.model": "bert",
            "tokenizer.ggml.tokens": written,
            "tokenizer.ggml.token_type": np.array([3 if special else 1 for special in is_special], dtype=np.int32),
            **({} if pooling_type is None else {"bert.pooling_type": pooling_type}),
        }, []

    monkeypatch.setattr(export, "vocabulary_metadata", vocabulary)
    export.convert_folder(bert, tmp_path / "bert.gguf", "F32")
    if mode is None:
        with pytest.raises(UserError, match="pooling_type = 4"):
            lalia.load(tmp_path / "bert.gguf")
        return
    ours = lalia.load(tmp_path / "bert.gguf")
    assert ours.name == "bert" and ours.pooling == Pooling((mode,))
    folder = lalia.load(bert)
    folder.pooling = Pooling((mode,))
    assert difference(ours.embed(TEXTS), folder.embed(TEXTS)) < TOLERANCE
    folder.pooling = Pooling(("max",))
    assert difference(ours.embed(TEXTS), folder.embed(TEXTS)) > VISIBLE
