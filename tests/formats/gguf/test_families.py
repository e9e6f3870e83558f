"""Every architecture: written, read back, and run by llama.cpp."""

import dataclasses
from pathlib import Path

import pytest
import torch
import transformers

from lalia.formats.gguf import GGUFFile, save_gguf
from lalia.formats.gguf.architectures import ARCHITECTURES, architecture_of_model_type
from lalia.model.families import registry
from tests.formats.gguf.llama_cpp import needs_llama_cpp, next_log_probs
from tests.formats.gguf.models import CASES, VOCAB, tiny

NOT_SQUARE = ("blk.#.attn_qkv.weight", "blk.#.ffn_up.weight", "blk.#.ffn_down.weight")
TOKENS = [(7 * i * i + 3) % VOCAB for i in range(24)]


@pytest.mark.parametrize("name", CASES)
def test_comes_back_as_it_went(name: str, tmp_path: Path) -> None:
    """Names, values and config of a model folder survive the file."""
    case = tiny(name)
    saved = save_gguf(tmp_path / "model.gguf", case.values, case.tensors, None, "F32")
    file = GGUFFile(saved.path)
    expected = {
        key: tensor for key, tensor in case.tensors.items() if key != "lm_head.weight" or not _tied(case.values)
    }
    assert set(file.names()) == set(expected)
    for key, tensor in expected.items():
        assert file.shape(key) == tuple(tensor.shape)
        # Gemma's norms are stored as 1 + w, which rounds.
        tolerance = 1e-6 if name.startswith("gemma") and "norm" in key else 0.0
        torch.testing.assert_close(file.tensor(key), tensor, rtol=0.0, atol=tolerance)
        out = torch.empty(tensor.shape, dtype=torch.float64)
        torch.testing.assert_close(file.tensor(key, out), tensor.double(), rtol=0.0, atol=tolerance)
    # What transformers makes of the config must compute the same.
    values = file.config_values()
    config = transformers.AutoConfig.for_model(**values, attn_implementation="eager")
    again = getattr(transformers, values["architectures"][0])(config).eval()
    again.load_state_dict(case.reference.state_dict())
    with torch.no_grad():
        logits = again(torch.tensor([TOKENS])).logits
        torch.testing.assert_close(logits, case.reference(torch.tensor([TOKENS])).logits, rtol=1e-5, atol=1e-5)


@needs_llama_cpp
@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_the_same(name: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    case = tiny(name)
    saved = save_gguf(tmp_path / "model.gguf", case.values, case.tensors, tokenizer_folder, "F32")
    windowed = name == "mistral-window"
    tokens = TOKENS[:8] if windowed else TOKENS
    difference = next_log_probs(saved.path, tokens, VOCAB) - case.with_half_gelu().log_probs(tokens)
    # Measured: 1e-5; with GELU up to 4e-4, where a rounding to float16 falls the other way.
    assert difference.abs().max() < (1e-3 if name.startswith(("gemma", "phi")) else 5e-5)
    # What llama.cpp does not do is said.
    assert [remark for remark in saved.remarks if "attend to everything" in remark] == (
        saved.remarks if windowed else []
    )


WRONG: dict[str, tuple[str, dict[str, object]]] = {
    "query and key rows not permuted": ("llama", {"interleaved": False}),
    "norms without the added 1": ("gemma", {"norm_offset": False}),
    "norms without the added 1 (Gemma 3)": ("gemma3", {"norm_offset": False}),
    "square matrices not transposed": ("gpt2", {"transposed": frozenset(NOT_SQUARE)}),
    "rows permuted where they should not be": ("qwen3", {"interleaved": True}),
}


@needs_llama_cpp
@pytest.mark.parametrize("mistake", WRONG)
def test_each_change_of_values_is_needed(
    mistake: str, tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative controls: with one change of values left out, llama.cpp computes something else."""
    name, changes = WRONG[mistake]
    case = tiny(name)
    architecture = dataclasses.replace(architecture_of_model_type(case.values["model_type"]), **changes)  # pyright: ignore[reportArgumentType]
    monkeypatch.setitem(ARCHITECTURES, architecture.name, architecture)
    saved = save_gguf(tmp_path / "model.gguf", case.values, case.tensors, tokenizer_folder, "F32")
    difference = next_log_probs(saved.path, TOKENS, VOCAB) - case.log_probs(TOKENS)
    assert difference.abs().max() > 0.1


@needs_llama_cpp
def test_llama3_scaling_is_needed(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Negative control: the file of a scaled model without its divisors computes something else."""
    case = tiny("llama-3.1")
    plain = case.values | {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}
    plain.pop("rope_scaling", None)
    saved = save_gguf(tmp_path / "model.gguf", plain, case.tensors, tokenizer_folder, "F32")
    difference = next_log_probs(saved.path, TOKENS, VOCAB) - case.log_probs(TOKENS)
    assert difference.abs().max() > 0.01


def _tied(values: dict[str, object]) -> bool:
    return registry.from_hf(dict(values)).tie_word_embeddings
