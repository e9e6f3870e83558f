"""Our model against transformers', in both directions, and the same comparison with one thing wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from lalia.formats.hf_folder import load_model, save_model
from lalia.model.transformer import Transformer

FAMILIES = ["llama", "qwen3", "gemma3_text", "nanochat"]
TOLERANCE = 1e-5
VISIBLE = 1e-4

Reference = Callable[[str], tuple[Any, Path]]
Loaded = Callable[[str], Transformer]


def our_logits(model: Transformer, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.logits(model(tokens))


def their_logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits


def altered(model: Transformer, **changes: Any) -> Transformer:
    """The same weights under another config."""
    other = Transformer(model.config.model_copy(update=changes))
    other.load_state_dict(model.state_dict(), strict=False)
    return other


@pytest.mark.parametrize("family", FAMILIES)
def test_reads_what_transformers_writes(family: str, reference: Reference, loaded: Loaded, tokens: Tensor) -> None:
    theirs, _ = reference(family)
    expected = their_logits(theirs, tokens)
    assert expected.abs().max() > 1.0
    difference = (our_logits(loaded(family), tokens) - expected).abs().max().item()
    print(f"{family}: {difference:.2e} of {expected.abs().max():.1f}")
    assert difference <= TOLERANCE
    assert loaded(family).num_parameters() == theirs.num_parameters()


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_what_we_write(
    family: str, reference: Reference, loaded: Loaded, tokens: Tensor, tmp_path: Path
) -> None:
    ours = loaded(family)
    save_model(ours, tmp_path, {"eos_token_id": [1, 2], "bos_token_id": 0})
    loader: Any = transformers.AutoModelForCausalLM
    theirs, report = loader.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert type(theirs) is type(reference(family)[0])
    assert theirs.dtype == torch.float32
    assert theirs.generation_config.eos_token_id == [1, 2]
    assert (their_logits(theirs.eval(), tokens) - our_logits(ours, tokens)).abs().max() <= TOLERANCE
    again = load_model(tmp_path)
    assert again.config == ours.config
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"rope_theta": 4e5}),
        ("llama", {"norm_eps": 1e-6}),
        ("llama", {"rope_direction": -1}),
        ("llama", {"activation": "gelu_tanh"}),
        ("qwen3", {"rope_theta": 1e4}),
        ("qwen3", {"norm_eps": 1e-6}),
        ("qwen3", {"qk_norm": "none"}),
        ("qwen3", {"qk_norm": "after_rope"}),
        ("qwen3", {"rope_direction": -1}),
        ("qwen3", {"attention_scale": 12**-0.5}),
        ("gemma3_text", {"sliding_window": 7}),
        ("gemma3_text", {"sliding_window": 9}),
        ("gemma3_text", {"full_attention_every": 2}),
        ("gemma3_text", {"rope_theta": 1e4}),
        ("gemma3_text", {"rope_theta_local": 1e6}),
        ("gemma3_text", {"attention_scale": None}),
        ("gemma3_text", {"norm_weight": "plain"}),
        ("gemma3_text", {"norm_order": "pre"}),
        ("gemma3_text", {"embedding_multiplier": 1.0}),
        ("gemma3_text", {"qk_norm": "none"}),
        ("gemma3_text", {"logit_softcap": 0.0}),
        ("gemma3_text", {"activation": "silu"}),
        ("gemma3_text", {"norm_eps": 1e-6}),
        ("nanochat", {"rope_direction": 1}),
        ("nanochat", {"qk_norm": "none"}),
        ("nanochat", {"qk_norm": "before_rope", "rope_theta": 1e3}),
        ("nanochat", {"embedding_norm": False}),
        ("nanochat", {"logit_softcap": 0.0}),
        ("nanochat", {"norm_eps": 1e-6}),
        ("nanochat", {"activation": "silu"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(f"{k}={v}" for k, v in value.items()),
)
def test_one_thing_wrong_is_seen(
    family: str, changes: dict[str, Any], reference: Reference, loaded: Loaded, tokens: Tensor
) -> None:
    expected = their_logits(reference(family)[0], tokens)
    difference = (our_logits(altered(loaded(family), **changes), tokens) - expected).abs().max().item()
    print(f"{family} {changes}: {difference:.1e}")
    assert difference > VISIBLE


def test_norm_without_weights_commutes_with_rotation(reference: Reference, loaded: Loaded, tokens: Tensor) -> None:
    """Why nanochat has no control "QK-norm before the rotation": a rotation keeps the length of a vector."""
    expected = their_logits(reference("nanochat")[0], tokens)
    before = altered(loaded("nanochat"), qk_norm="before_rope")
    assert (our_logits(before, tokens) - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_close_as_theirs(family: str, reference: Reference, loaded: Loaded, tokens: Tensor) -> None:
    theirs, folder = reference(family)
    expected = their_logits(theirs, tokens)
    ours = our_logits(load_model(folder, torch.bfloat16), tokens)
    assert ours.dtype == torch.bfloat16
    low = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    yardstick = (their_logits(low, tokens).float() - expected).pow(2).mean().sqrt()
    assert (ours.float() - expected).pow(2).mean().sqrt() < 1.5 * yardstick
