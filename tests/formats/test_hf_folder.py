"""Model folders that are not as they should be: every one is refused with what is wrong and what to do."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lalia.errors import CorruptFile, UserError
from lalia.formats.hf_folder import load_model, read_config, save_model
from lalia.formats.loading import load_folder
from lalia.model.config import ModelConfig
from lalia.model.transformer import Transformer
from lalia.tokenizer.bpe import Tokenizer, train_tokenizer
from lalia.tokenizer.config import TokenizerConfig

VOCAB_SIZE = 384  # padded: the tokenizer has 320
CONFIG = ModelConfig(
    family="qwen3",
    vocab_size=VOCAB_SIZE,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=40,
    max_position_embeddings=32,
    qk_norm="before_rope",
)


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = Transformer(CONFIG)
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        weight.data.normal_(generator=generator)
    return model


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = "every family of models that this folder can hold is written, read back and held against the reference"
    return train_tokenizer([text], TokenizerConfig(vocab_size=320))


@pytest.fixture(scope="module")
def good(model: Transformer, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "good"
    save_model(model, folder, {"eos_token_id": 304})
    tokenizer.save(folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy of the good folder, to spoil."""
    return shutil.copytree(good, tmp_path / "model")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path)


def test_round_trip(model: Transformer, tokenizer: Tokenizer, folder: Path) -> None:
    again, its_tokenizer = load_folder(folder)
    assert again.config == model.config
    assert its_tokenizer.sha256 == tokenizer.sha256
    assert not again.training and not any(weight.requires_grad for weight in again.parameters())
    assert all(weight.requires_grad for weight in load_model(folder, trainable=True).parameters())
    for name, weight in model.named_parameters():
        assert torch.equal(weight, again.get_parameter(name)), name
    assert not list(folder.glob(".*")), "a temporary file is left"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(model: Transformer, tmp_path: Path, dtype: torch.dtype) -> None:
    save_model(model, tmp_path, dtype=dtype)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["dtype"] == values["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert not (tmp_path / "generation_config.json").exists()
    again = load_model(tmp_path, dtype)
    assert again.compute_dtype == dtype
    assert torch.equal(again.embedding.weight, model.embedding.weight.to(dtype))
    assert load_model(tmp_path).embedding.weight.dtype == torch.float32


def test_a_loaded_model_outlives_its_file(folder: Path) -> None:
    """Weights are views of the mapped file; files are replaced by renaming, which leaves the mapped one alone."""
    again = load_model(folder)
    before = again.embedding.weight.clone()
    (folder / "other").write_bytes(b"")
    (folder / "other").replace(folder / "model.safetensors")
    assert torch.equal(again.embedding.weight, before)


def test_changing_a_loaded_model_does_not_change_its_file(folder: Path) -> None:
    again = load_model(folder, trainable=True)
    with torch.no_grad():
        again.embedding.weight.add_(1.0)
    assert not torch.equal(again.embedding.weight, load_model(folder).embedding.weight)


def test_save_keeps_the_old_file_when_interrupted(folder: Path, model: Transformer, monkeypatch: Any) -> None:
    def interrupted(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("lalia.formats.hf_folder.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_model(model, folder)
    assert not list(folder.glob(".*"))
    load_model(folder)


def test_sharded(folder: Path, model: Transformer) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"part-{number}.safetensors")
    index = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    again = load_model(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    (folder / "part-1.safetensors").unlink()
    with pytest.raises(CorruptFile, match=r"lacks part-1\.safetensors"):
        load_model(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../part-0.safetensors"}}))
    with pytest.raises(UserError, match=r"names \.\./part-0\.safetensors; expected .* beside it"):
        load_model(folder)


def test_no_folder(good: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder .*gooood; did you mean .*good\?"):
        load_model(good.parent / "gooood")
    with pytest.raises(UserError, match="lalia pull NAME fetches one"):
        load_model(tmp_path / "Qwen" / "Qwen3-0.6B")
    with pytest.raises(UserError, match="is a file; give the folder"):
        load_model(good / "config.json")
    with pytest.raises(UserError, match=r"has no config\.json; it holds the model folders good"):
        load_model(good.parent)
    with pytest.raises(UserError, match=r"has no config\.json; a model folder has one"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["", '{"a": 1', "\x00" * 100, "[" * 100_000, "[1, 2]", '"text"'],
    ids=["empty", "half", "zeros", "deep", "list", "string"],
)
def test_config_is_no_object(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(CorruptFile, match=r"config\.json"):
        read_config(folder)


def test_config_is_refused_with_its_path(folder: Path) -> None:
    edit_config(folder, model_type="gpt_neox")
    with pytest.raises(UserError, match=r"config\.json: model_type = 'gpt_neox' .* gpt2, llama, mistral"):
        load_model(folder)


def header_longer_than_file(content: bytes) -> bytes:
    return struct.pack("<Q", len(content) * 10) + content[8:]


def enormous_header(content: bytes) -> bytes:
    return struct.pack("<Q", 2**63) + content[8:]


def offset_past_the_end(content: bytes) -> bytes:
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"][1])
    header[last]["data_offsets"][1] += 4096
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + content[8 + size :]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: b"",
        lambda content: content[:4],
        lambda content: content[:100],
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        lambda content: content + b"more",
        lambda content: b"\x80\x04" + content,
        header_longer_than_file,
        enormous_header,
        offset_past_the_end,
    ],
    ids=["empty", "4-bytes", "in-header", "last-byte", "half", "longer", "pickle", "header", "enormous", "offset"],
)
def test_weights_cut_short(folder: Path, spoil: Callable[[bytes], bytes]) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(CorruptFile, match=r"model\.safetensors \(\d+ bytes\) is cut short or no safetensors file"):
        load_model(folder)


def test_weights_absent(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
        load_model(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match=r"only as pytorch_model\.bin, a pickle.*save_pretrained"):
        load_model(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"missing weights: model\.norm\.weight"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}), r"unknown .*q_proj\.bias"),
        (
            lambda t: t.update({"model.layers.1.self_attn.k_proj.weight": torch.zeros(32, 24)}),
            r"k_proj\.weight has shape \[32, 24\], expected \[16, 24\]",
        ),
        (lambda t: t.update({"model.norm.weight": torch.zeros(24, dtype=torch.int8)}), r"norm\.weight is I8, expected"),
        (lambda t: t["model.layers.1.mlp.up_proj.weight"].fill_(float("nan")), r"NaN or infinity in .*layers\.1\.mlp"),
        (lambda t: t["model.norm.weight"].fill_(float("inf")), r"NaN or infinity in model\.norm\.weight"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(VOCAB_SIZE, 24)}), "lm_head.weight differs"),
    ],
    ids=["missing", "extra", "shape", "int8", "nan", "inf", "head"],
)
def test_weights_disagree(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any], message: str) -> None:
    edit_tensors(folder, edit)
    with pytest.raises(UserError, match=message):
        load_model(folder)


def test_all_disagreements_in_one_message(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=3, intermediate_size=48, layer_types=None)
    with pytest.raises(
        CorruptFile, match=r"missing weights: model\.layers\.2.* and 3 more; wrong weights: .*\[40, 24\]"
    ):
        load_model(folder)


def test_redundant_weights_are_accepted(folder: Path, model: Transformer) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    edit_tensors(folder, edit)
    assert torch.equal(load_model(folder).embedding.weight, model.embedding.weight)


def test_tokenizer_of_another_model(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    edit_config(folder, vocab_size=300, eos_token_id=None)
    with pytest.raises(UserError, match=r"tokenizer has 320 tokens but .* vocab_size = 300"):
        load_folder(folder)
    edit_config(folder, vocab_size=319)  # a special without an embedding is allowed, as Gemma 3 has one
    with pytest.raises(CorruptFile, match="weights and config disagree"):
        load_folder(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        load_folder(folder)
