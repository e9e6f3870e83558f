"""A model of Lalia's, written to GGUF and run by llama.cpp; and what a file holds, read by the gguf package."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from torch import Tensor

from lalia.errors import UserError
from lalia.formats.gguf import GGUFFile, convert_folder, save_gguf
from lalia.formats.gguf.quantize import quantize
from lalia.formats.hf_folder import load_model, save_model
from lalia.model.config import ModelConfig
from lalia.model.transformer import Transformer
from lalia.tokenizer.bpe import Tokenizer
from lalia.tokenizer.chat import CHAT_TEMPLATE, render
from tests.formats.gguf.llama_cpp import ask, needs_llama_cpp
from tests.formats.gguf.models import VOCAB, tiny

PROMPT = "The quick brown fox. \u00dcber 12 \u00c4pfel; \u4e16\u754c \U0001f642\n\tx = [1, 2]"
TOLERANCES = {"F32": 1e-5, "F16": 0.02, "BF16": 0.1, "Q8_0": 0.25, "Q4_0": 0.35, "Q4_1": 0.35}
"""Largest difference of a log probability between llama.cpp and float32 on the same (dequantized) weights. llama.cpp
rounds activations to the weights' kind: to float16 for F16, to 8 bits for the quantized ones. Measured: 3e-6, 0.003,
0.02, 0.10, 0.08, 0.06."""


@pytest.fixture(params=["qwen3", "llama"])
def model(request: pytest.FixtureRequest) -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(
        family=request.param,
        vocab_size=VOCAB,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=96,
        max_position_embeddings=128,
        qk_norm="before_rope" if request.param == "qwen3" else "none",
    )
    model = Transformer(config).eval()
    for name, parameter in model.named_parameters():
        parameter.data.normal_(0.8 if name.endswith("norm.weight") else 0.0, 0.15)
    return model


@torch.no_grad()
def logits_of(model: Transformer, tokens: list[int]) -> Tensor:
    """(seq, vocab_size)"""
    return model.logits(model(torch.tensor([tokens])))[0]


@needs_llama_cpp
@pytest.mark.parametrize("kind", TOLERANCES)
def test_llama_cpp_runs_what_was_written(
    kind: str, model: Transformer, tmp_path: Path, tokenizer_folder: Path, tokenizer: Tokenizer
) -> None:
    """Ids, probabilities, greedy tokens and rendered chat are the same."""
    folder = tmp_path / "folder"
    save_model(model, folder, {"eos_token_id": tokenizer.turn_end_id})
    shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
    saved = convert_folder(folder, tmp_path / "model.gguf", kind)
    tensors = load_file(folder / "model.safetensors")
    tokens = tokenizer.encode(PROMPT)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
    ids, got, greedy, prompt = ask(
        saved.path,
        [
            ("tokenize", {"content": PROMPT, "add_special": True}),
            ("log_probs", {"tokens": tokens, "vocab_size": VOCAB}),
            ("greedy", {"prompt": tokens, "n_predict": 16}),
            ("template", {"messages": messages}),
        ],
    )
    assert ids == tokens
    (rendered,) = ask(saved.path, [("tokenize", {"content": prompt, "parse_special": True})])
    assert rendered == render(tokenizer, messages, add_generation_prompt=True)
    # The same model on the weights that the file holds.
    file = GGUFFile(saved.path)
    assert file.metadata["tokenizer.ggml.eos_token_id"] == tokenizer.turn_end_id
    for name, tensor in tensors.items():
        tensor.copy_(file.tensor(name))
    _replace_weights(model, tensors)
    expected = torch.log_softmax(logits_of(model, tokens)[-1], -1)
    difference = float((torch.tensor(got) - expected).abs().max())
    print(kind, model.config.family, difference)
    assert difference < TOLERANCES[kind]
    # Each greedy token is our best, or as good up to the tolerance.
    scores = logits_of(model, tokens + greedy)[len(tokens) - 1 : -1]
    behind = scores.amax(1) - scores.gather(1, torch.tensor(greedy)[:, None])[:, 0]
    assert len(greedy) == 16 and behind.max() < TOLERANCES[kind]


def _replace_weights(model: Transformer, tensors: dict[str, Tensor]) -> None:
    """Put the tensors of a model folder in the place of the model's weights."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(model, folder)
        save_file(tensors, folder / "model.safetensors")
        model.load_state_dict(load_model(folder).state_dict())


def test_the_gguf_package_reads_what_was_written(tmp_path: Path, tokenizer_folder: Path) -> None:
    case = tiny("llama-untied")
    saved = save_gguf(tmp_path / "model.gguf", case.values, case.tensors, tokenizer_folder, "Q4_1", name="tiny")
    reader, ours = GGUFReader(saved.path), GGUFFile(saved.path)
    theirs = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert set(theirs) == set(ours.metadata)
    for key, value in theirs.items():
        mine = ours.metadata[key]
        assert (mine.tolist() if isinstance(mine, np.ndarray) else mine) == value, key
    assert theirs["general.name"] == "tiny" and theirs["tokenizer.chat_template"] == CHAT_TEMPLATE == ours.chat_template
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds == {name: kind for kind, names in saved.kinds.items() for name in names}
    assert kinds["output.weight"] == "Q8_0" and kinds["token_embd.weight"] == "Q4_1"
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert saved.num_bytes == saved.path.stat().st_size and not list(tmp_path.glob(".*"))
    # Raw blocks come in the model folder's order of rows, and are what quantizing the model folder's rows gives.
    name = "model.layers.1.self_attn.k_proj.weight"
    kind, blocks = ours.blocks(name)
    assert kind == "Q4_1" == ours.kind(name)
    assert torch.equal(blocks, quantize("Q4_1", case.tensors[name]))


def test_rows_that_blocks_do_not_divide_are_said(tmp_path: Path) -> None:
    case = tiny("llama")
    tensors = {
        name: tensor[:, :80] if name.endswith("down_proj.weight") else tensor[:80] if ".mlp." in name else tensor
        for name, tensor in case.tensors.items()
    }
    saved = save_gguf(tmp_path / "model.gguf", case.values | {"intermediate_size": 80}, tensors, None, "Q8_0")
    said = [remark for remark in saved.remarks if "ffn_down" in remark]
    assert len(said) == 3 and "F16" in said[0] and len(saved.kinds["F16"]) == 3


def test_bad_models_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    case = tiny("llama")
    path = tmp_path / "model.gguf"

    def refuse(
        match: str,
        values: dict[str, Any] | None = None,
        tensors: dict[str, Tensor | None] | None = None,
        kind: str = "F16",
    ) -> None:
        changed = {name: tensor for name, tensor in (case.tensors | (tensors or {})).items() if tensor is not None}
        with pytest.raises(UserError, match=match):
            save_gguf(path, case.values | (values or {}), changed, None, kind)
        assert list(tmp_path.iterdir()) == []

    name = "model.layers.1.mlp.up_proj.weight"
    refuse("Q6_K.*choose one of F32", kind="Q6_K")
    refuse("no GGUF architecture", {"model_type": "nanochat"})
    refuse("blk.1.ffn_up.weight", tensors={name: None})
    refuse("no place for model.extra", tensors={"model.extra": torch.zeros(3)})
    refuse(f"NaN or infinity in {name}", tensors={name: torch.full_like(case.tensors[name], torch.nan)})
    refuse(f"{name}: a value is too large", tensors={name: torch.full_like(case.tensors[name], 1e6)})
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 8.0}
    refuse("llama3 scaling", {"rope_parameters": rope | {"original_max_position_embeddings": 1024}})
