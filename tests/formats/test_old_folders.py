"""Folders that are not as `save_pretrained` writes them today: older names, other heads, doubled weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from lalia.errors import CorruptFile, UserError
from lalia.formats.hf_folder import load_model
from lalia.model.transformer import Transformer
from tests.formats.parity import TOLERANCE, difference
from tests.formats.references import ENCODER, MODELS, make_input, make_reference, our_output, their_output

Reference = Callable[[str], tuple[Any, Path]]
Edit = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def edited(folder: Path, out: Path, edit: Edit, **config: Any) -> Path:
    """A copy of a folder with other weights and config."""
    shutil.copytree(folder, out)
    weights = edit(load_file(out / "model.safetensors"))
    save_file({name: tensor.clone() for name, tensor in weights.items()}, out / "model.safetensors")
    values = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**values, **config}))
    return out


def same(name: str, theirs: Any, ours: Transformer) -> None:
    given = make_input(name)
    assert difference(our_output(name, ours, given), their_output(name, theirs, given)) <= TOLERANCE


def test_gpt2_of_2019(reference: Reference, tmp_path: Path) -> None:
    """No prefix, and the causal mask stored as a buffer of each layer."""

    def edit(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        weights = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
        for layer in range(3):
            weights[f"h.{layer}.attn.bias"] = torch.ones(64, 64, dtype=torch.uint8).tril()[None, None]
            weights[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        return weights

    theirs, folder = reference("gpt2")
    same("gpt2", theirs, load_model(edited(folder, tmp_path / "old", edit)))


def test_gpt2_square_matrices_are_transposed(reference: Reference, tmp_path: Path) -> None:
    """The trap: attn.c_proj is square, so that only the numbers tell (in, out) from (out, in)."""

    def edit(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v.t().contiguous() if k.endswith("attn.c_proj.weight") else v for k, v in weights.items()}

    theirs, folder = reference("gpt2")
    wrong = load_model(edited(folder, tmp_path / "wrong", edit))
    given = make_input("gpt2")
    assert difference(our_output("gpt2", wrong, given), their_output("gpt2", theirs, given)) > 0.01


def test_bert_of_2018(reference: Reference, tmp_path: Path) -> None:
    """gamma and beta, and the numbers of the positions as a buffer."""

    def edit(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        weights = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
            for name, tensor in weights.items()
        }
        return {**weights, "bert.embeddings.position_ids": torch.arange(64)[None]}

    theirs, folder = reference("bert")
    same("bert", theirs, load_model(edited(folder, tmp_path / "old", edit)))


def test_bert_of_both_spellings_at_once_is_refused(reference: Reference, tmp_path: Path) -> None:
    def edit(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        name = "bert.embeddings.LayerNorm.weight"
        return {**weights, name.replace("weight", "gamma"): weights[name]}

    with pytest.raises(CorruptFile, match=r"LayerNorm\.(gamma|weight) .*are the same weight"):
        load_model(edited(reference("bert")[1], tmp_path / "both", edit))


def randomize(model: Any) -> Any:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(0.6 + 0.2 * noise if weight.dim() == 1 else 0.2 * noise)
    return model.eval()


def bert_for_pretraining(folder: Path, architecture: str) -> Any:
    config = transformers.BertConfig(**{key: ENCODER[key] for key in ENCODER if key != "attn_implementation"})
    model = randomize(transformers.BertForPreTraining._from_config(config, attn_implementation="eager"))
    model.save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "architectures": [architecture]}))
    return model


@pytest.mark.parametrize("architecture", ["BertForPreTraining", "BertForMaskedLM"])
def test_bert_with_the_heads_of_pretraining(architecture: str, tmp_path: Path) -> None:
    """As the published files are: the pooler and seq_relationship beside the masked-token head."""
    theirs = bert_for_pretraining(tmp_path, architecture)
    names = load_file(tmp_path / "model.safetensors")
    assert {"bert.pooler.dense.weight", "cls.seq_relationship.weight"} <= names.keys()
    given = make_input("bert")
    with torch.no_grad():
        expected = theirs(given).prediction_logits
    assert difference(our_output("bert", load_model(tmp_path), given), expected) <= TOLERANCE


def test_bert_for_pretraining_as_an_encoder(tmp_path: Path) -> None:
    theirs = bert_for_pretraining(tmp_path, "BertModel").bert
    same("bert, pooled", theirs, load_model(tmp_path))


@pytest.mark.parametrize(
    ("name", "file_of"),
    [("distilbert, encoder", "distilbert"), ("distilbert, encoder", "distilbert, classifier")],
    ids=["masked LM", "classifier"],
)
def test_distilbert_of_another_head(name: str, file_of: str, reference: Reference, tmp_path: Path) -> None:
    theirs, folder = reference(file_of)
    ours = load_model(edited(folder, tmp_path / "other", dict, architectures=[MODELS[name][1]]))
    same(name, theirs.distilbert, ours)


def test_distilbert_without_the_head_it_is_to_have(reference: Reference, tmp_path: Path) -> None:
    _, folder = reference("distilbert, encoder")
    with pytest.raises(CorruptFile, match=r"missing weights: pre_classifier\.weight, .*classifier\.bias"):
        load_model(edited(folder, tmp_path / "x", dict, architectures=["DistilBertForSequenceClassification"]))


def test_a_whole_clip_folder(tmp_path: Path) -> None:
    shared = {key: ENCODER[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    shared |= {"intermediate_size": 80, "layer_norm_eps": 1e-3}
    text = {**shared, "vocab_size": 97, "max_position_embeddings": 64, "eos_token_id": 96, "bos_token_id": 0}
    vision = {**shared, "hidden_size": 32, "image_size": 24, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    theirs: Any = randomize(transformers.CLIPModel._from_config(config, attn_implementation="eager"))
    theirs.save_pretrained(tmp_path)
    for part, name, features in (
        ("text", "clip text", theirs.get_text_features),
        ("vision", "clip vision", theirs.get_image_features),
    ):
        given = make_input(name)
        with torch.no_grad():
            expected = features(given)
        expected = expected if isinstance(expected, Tensor) else expected.pooler_output
        ours = load_model(tmp_path, part=part)
        assert ours.config.projection_size == 24
        assert difference(our_output(name, ours, given), expected) <= TOLERANCE
    with pytest.raises(UserError, match="two towers; part = None, expected 'text' or 'vision'"):
        load_model(tmp_path)


def test_a_tied_head_stored_twice(reference: Reference, tmp_path: Path) -> None:
    """Once equal, which is fine, and once not, which is refused: one of the two would be ignored."""

    def twice(factor: float) -> Edit:
        return lambda weights: {**weights, "lm_head.weight": factor * weights["model.embed_tokens.weight"]}

    theirs, folder = reference("llama")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    same("llama", theirs, load_model(edited(folder, tmp_path / "equal", twice(1.0))))
    with pytest.raises(CorruptFile, match=r"lm_head\.weight differs from the embedding"):
        load_model(edited(folder, tmp_path / "other", twice(1.5)))


def test_a_phi_of_another_rotary_share_is_another_model(tmp_path: Path) -> None:
    """The share is nowhere in the shapes: an absent key means a half, as in transformers."""
    theirs = make_reference("phi", partial_rotary_factor=0.5)
    theirs.save_pretrained(tmp_path / "phi")
    values = json.loads((tmp_path / "phi" / "config.json").read_text())
    values.pop("partial_rotary_factor", None)
    values["rope_parameters"].pop("partial_rotary_factor", None)
    (tmp_path / "phi" / "config.json").write_text(json.dumps(values))
    ours = load_model(tmp_path / "phi")
    assert ours.config.rope_fraction == 0.5
    same("phi", theirs, ours)


def test_frequencies_in_old_llama_files_are_not_needed(reference: Reference, tmp_path: Path) -> None:
    def edit(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**weights, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}

    theirs, folder = reference("llama")
    same("llama", theirs, load_model(edited(folder, tmp_path / "old", edit)))
