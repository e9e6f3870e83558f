"""`lalia convert`: what the new folder holds, what is refused, and that nothing half-made stays."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lalia.formats.convert as convert_module
from lalia.errors import UserError
from lalia.formats.convert import RECORD, TARGETS, convert, report
from lalia.formats.hf_folder import load_model, save_model
from lalia.formats.loading import open_model
from lalia.model.config import ModelConfig
from lalia.model.transformer import Transformer
from lalia.tokenizer.bpe import Tokenizer, train_tokenizer
from lalia.tokenizer.config import TokenizerConfig
from tests.formats.references import make_reference

pytest.importorskip("onnxruntime", reason="pip install 'lalia[onnx]'")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 with a tokenizer and a card."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = train_tokenizer([convert_module.SAMPLE] * 3, TokenizerConfig(vocab_size=320))
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=96,
        max_position_embeddings=128,
        qk_norm="before_rope",
    )
    model = Transformer(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.1 * noise if weight.dim() == 1 else noise * 0.12)
    save_model(model, folder, {"eos_token_id": 1})
    tokenizer.save(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "encoder"
    make_reference("bert, pooled").save_pretrained(folder)
    return folder


def test_onnx(decoder: Path, tmp_path: Path) -> None:
    from lalia.formats.onnx.run import OnnxModel

    facts = convert(decoder, "onnx", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert names == {"model.onnx", "config.json", "generation_config.json", "README.md", RECORD, *tokenizer}
    assert facts["relative_error"] < 1e-5 and facts["top1_agreement"] == 1.0
    assert facts["bits_per_byte"] == pytest.approx(facts["bits_per_byte_before"], rel=1e-5)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: mit\n---\n# Tiny\n") and "lalia convert tiny --to onnx" in card
    assert all(line in card for line in report(facts))
    assert json.loads((tmp_path / "out" / RECORD).read_text())["target"] == "onnx"
    ids = Tokenizer.load(tmp_path / "out").encode("The ferry leaves")
    model = load_model(decoder)
    with torch.no_grad():
        expected = model.logits(model(torch.tensor([ids])))[0, -1].argmax().item()
    assert OnnxModel(tmp_path / "out" / "model.onnx").generate(ids, 1) == [expected]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_int8_tells_its_loss(decoder: Path, tmp_path: Path) -> None:
    facts = convert(decoder, "onnx-int8", tmp_path / "out")
    assert (tmp_path / "out" / "model_quantized.onnx").is_file()
    assert 1e-4 < facts["relative_error"] < 0.1
    told = "\n".join(report(facts))
    assert "bits per byte" in told and "most probable token" in told and "% of the float32" in told
    own = tmp_path / "own.txt"
    own.write_text("Something else, entirely: a text of the user.\n" * 4, encoding="utf-8")
    other = convert(decoder, "onnx-int8", tmp_path / "out", text=own)
    assert other["bits_per_byte_before"] != facts["bits_per_byte_before"]


def test_bits_per_byte_is_that_of_the_text(decoder: Path, tmp_path: Path) -> None:
    """The figure from the definition: bits of each piece's tokens behind its first, over their bytes."""
    facts = convert(decoder, "onnx", tmp_path / "out")
    model, tokenizer = load_model(decoder), Tokenizer.load(decoder)
    ids = tokenizer.encode(convert_module.SAMPLE)
    bits = num_bytes = 0.0
    for start in range(0, len(ids), 128):
        piece = torch.tensor(ids[start : start + 128])
        with torch.no_grad():
            logits = model.logits(model(piece[None]))[0, :-1]
        bits += torch.nn.functional.cross_entropy(logits, piece[1:], reduction="sum").item() / 0.6931471805599453
        num_bytes += sum(len(tokenizer.token_bytes(int(i))) for i in piece[1:])
    assert facts["bits_per_byte_before"] == pytest.approx(bits / num_bytes, rel=1e-5)


def test_encoder(encoder: Path, tmp_path: Path) -> None:
    from lalia.formats.onnx.run import OnnxModel

    facts = convert(encoder, "onnx", tmp_path / "mean")
    assert facts["task"] == "feature-extraction" and facts["cosine"] == pytest.approx(1.0, abs=1e-6)
    other = tmp_path / "pooling"
    shutil.copytree(encoder, other)
    (other / "1_Pooling").mkdir()
    modules = [{"type": "models.Transformer", "path": ""}, {"type": "models.Pooling", "path": "1_Pooling"}]
    (other / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    settings = other / "1_Pooling" / "config.json"
    settings.write_text('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}', encoding="utf-8")
    assert convert(other, "onnx", tmp_path / "cls")["cosine"] == pytest.approx(1.0, abs=1e-6)
    out = OnnxModel(tmp_path / "cls" / "model.onnx").forward(np.array([[5, 6, 7]]))
    assert np.array_equal(out["sentence_embedding"], out["last_hidden_state"][:, 0])  # no Normalize module
    assert (tmp_path / "cls" / "modules.json").is_file() and (tmp_path / "cls" / "1_Pooling" / "config.json").is_file()
    settings.write_text('{"pooling_mode_max_tokens": true}', encoding="utf-8")
    with pytest.raises(UserError, match="pooling by max; ONNX graphs pool by mean or by cls"):
        convert(other, "onnx", tmp_path / "max")
    assert not (tmp_path / "max").exists()


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
def test_gguf(kind: str, decoder: Path, tmp_path: Path) -> None:
    from lalia.formats.gguf import GGUFFile

    facts = convert(decoder, f"gguf-{kind.lower()}", tmp_path / "out")
    assert facts["files"] == [f"tiny.{kind}.gguf"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*facts["files"], "README.md", RECORD}
    file = GGUFFile(tmp_path / "out" / facts["files"][0])
    assert file.config_values()["model_type"] == "qwen3"
    difference = (file.tensor("model.norm.weight") - load_model(decoder).state_dict()["norm.weight"]).abs().max()
    assert difference == 0


def test_from_gguf(decoder: Path, tmp_path: Path) -> None:
    """A GGUF file becomes a model folder, or a graph, with its tokenizer."""
    convert(decoder, "gguf-f16", tmp_path / "gguf")
    facts = convert(tmp_path / "gguf", "onnx", tmp_path / "onnx")
    assert facts["relative_error"] < 1e-5 and "# Tiny" in (tmp_path / "onnx" / "README.md").read_text(encoding="utf-8")
    convert(tmp_path / "gguf" / "tiny.F16.gguf", "hf", tmp_path / "hf")
    one, other = load_model(decoder).state_dict(), load_model(tmp_path / "hf").state_dict()
    assert one.keys() == other.keys()
    assert max((one[name] - other[name]).abs().max().item() for name in one) < 1e-3
    text = "The committee will meet."
    assert Tokenizer.load(tmp_path / "hf").encode(text) == Tokenizer.load(decoder).encode(text)


def test_hf(decoder: Path, tmp_path: Path) -> None:
    convert(decoder, "hf", tmp_path / "out")
    one, other = load_model(decoder), load_model(tmp_path / "out")
    assert one.config == other.config
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert Tokenizer.load(tmp_path / "out").sha256 == Tokenizer.load(decoder).sha256


def test_only_a_folder_of_ours_is_replaced(decoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    convert(decoder, "hf", out)  # an empty one is fine
    convert(decoder, "onnx", out)
    assert not (out / "model.safetensors").exists() and (out / "model.onnx").is_file()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("dear", encoding="utf-8")
    (tmp_path / "file").write_text("dear", encoding="utf-8")
    for name, complaint in (("theirs", "did not write"), ("file", "is a file")):
        with pytest.raises(UserError, match=complaint):
            convert(decoder, "hf", tmp_path / name)
    assert (tmp_path / "theirs" / "thesis.txt").read_text(encoding="utf-8") == "dear"
    for folder in (decoder, decoder.parent):
        with pytest.raises(UserError, match="holds the model that is to be converted"):
            convert(decoder, "hf", folder)
    assert load_model(decoder)


def test_what_fails_leaves_nothing(decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(decoder, "hf", tmp_path / "out")

    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert_module, "_card", fail)
    with pytest.raises(OSError, match="No space"):
        convert(decoder, "onnx", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert load_model(tmp_path / "out")


def test_a_graph_that_computes_something_else_is_refused(
    decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the model used something that the writer of graphs has never heard of."""
    from lalia.formats.onnx.layers import Writer

    monkeypatch.setattr(Writer, "rotate", lambda self, x, cos, sin: x)
    with pytest.raises(UserError, match=r"the graph differs from the qwen3 model by \d"):
        convert(decoder, "onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refusals(decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--to 'tflite' is unknown; choose one of onnx, onnx-int8, gguf-f16"):
        convert(decoder, "tflite", tmp_path / "out")
    with pytest.raises(UserError, match="there is no folder"):
        convert(tmp_path / "nowhere", "onnx", tmp_path / "out")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8"):
        convert(decoder, "onnx", tmp_path / "out", tmp_path / "latin.txt")
    find = convert_module.importlib.util.find_spec
    monkeypatch.setattr(
        convert_module.importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name)
    )
    with pytest.raises(UserError, match=r'onnx needs onnxruntime; install with: pip install "lalia\[onnx\]"'):
        convert(decoder, "onnx", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["latin.txt"]
    assert set(TARGETS) == {"onnx", "onnx-int8", "gguf-f16", "gguf-q8_0", "gguf-q4_0", "hf"}


@pytest.mark.parametrize("with_generation_file", [True, False])
def test_a_converted_folder_ends_its_answers_where_its_source_does(
    decoder: Path, tmp_path: Path, with_generation_file: bool
) -> None:
    source = tmp_path / "source"
    shutil.copytree(decoder, source)
    values = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (source / "config.json").write_text(json.dumps({**values, "eos_token_id": 1}), encoding="utf-8")
    if not with_generation_file:
        (source / "generation_config.json").unlink()
    convert(source, "hf", tmp_path / "hf")
    with open_model(tmp_path / "hf") as opened:
        assert opened.end_ids == {1}


def test_links_out_of_a_model_are_not_followed(decoder: Path, tmp_path: Path) -> None:
    source, secret = tmp_path / "source", tmp_path / "secret"
    secret.write_text("private", encoding="utf-8")
    shutil.copytree(decoder, source)
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").symlink_to(secret)
    with pytest.raises(UserError, match="is a link to"):
        convert(source, "hf", tmp_path / "hf")
    convert(decoder, "gguf-f16", tmp_path / "gguf")
    (tmp_path / "gguf" / "config.json").unlink(missing_ok=True)
    (tmp_path / "gguf" / "LICENSE").symlink_to(secret)
    with pytest.raises(UserError, match="is a link to"):
        convert(tmp_path / "gguf", "hf", tmp_path / "hf")
