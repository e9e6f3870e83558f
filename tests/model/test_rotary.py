"""Rotary frequencies and their scalings against transformers', up to the last position of a 131,072-token context."""

import math
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lalia.errors import UserError
from lalia.model.config import RopeScaling
from lalia.model.families.registry import from_hf
from lalia.model.functions import rotate
from lalia.model.rotary import rotary_frequencies, rotary_table, yarn_attention_factor

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 131_072,
}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "original_max_position_embeddings": 4096}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "a million": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "Llama 3.1": {**LLAMA3, "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 8192},
    "Llama 3.2": {**LLAMA3, "rope_theta": 5e5, "factor": 32.0, "original_max_position_embeddings": 8192},
    "YaRN": {**YARN, "rope_theta": 1e4, "factor": 32.0},
    "YaRN, by the context": {**YARN, "rope_theta": 1e4, "factor": 32.0, "beta_fast": 16.0, "beta_slow": 2.0},
    "YaRN, untruncated": {**YARN, "rope_theta": 1.5e5, "factor": 32.0, "truncate": False},
    "YaRN, given factor": {**YARN, "rope_theta": 1e6, "factor": 4.0, "attention_factor": 1.25},
    "YaRN, two scales": {**YARN, "rope_theta": 1e4, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.8},
    "YaRN, below one": {**YARN, "rope_theta": 1e4, "factor": 0.5},
}
POSITIONS = torch.tensor([0, 1, 100, 8_191, 8_192, 8_193, 20_000, 65_537, 131_071])


def both(parameters: dict[str, Any]) -> tuple[Any, torch.nn.Module]:
    """Our config and transformers' rotary module of the same config.json."""
    values: dict[str, Any] = {**SIZES, "rope_parameters": parameters}
    theirs = transformers.LlamaConfig(**values)
    module = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
    return from_hf({"model_type": "llama", **values}), module


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_transformers(name: str) -> None:
    config, module = both(dict(SCALINGS[name]))
    theta, scaling = config.rope_of_layer(0)
    ours = rotary_frequencies(config.rotary_size, theta, scaling)
    inverse: Any = module.inv_freq
    assert ours.dtype == torch.float32
    if SCALINGS[name]["rope_type"] == "yarn":  # the blend is rounded in another order: the last bit of float32
        torch.testing.assert_close(ours, inverse, rtol=2.4e-7, atol=0)
    else:
        assert torch.equal(ours, inverse)
    kind = SCALINGS[name]["rope_type"]
    if kind != "default":
        direct, factor = ROPE_INIT_FUNCTIONS[kind](module.config, torch.device("cpu"))  # pyright: ignore
        torch.testing.assert_close(ours, direct, rtol=2.4e-7, atol=0)
        assert (1.0 if scaling is None else scaling.attention_factor) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("name", SCALINGS)
def test_tables_far_beyond_8192(name: str) -> None:
    """cos and sin at positions up to 131,071, where the last bit of a YaRN frequency has grown to 0.001."""
    config, module = both(dict(SCALINGS[name]))
    cos, sin = rotary_table(POSITIONS, config, 0)
    their_cos, their_sin = module(torch.zeros(1, 1), POSITIONS[None])
    half = cos.shape[-1] // 2
    tolerance = 1e-3 if SCALINGS[name]["rope_type"] == "yarn" else 0
    assert (cos - their_cos[0]).abs().max() <= tolerance
    assert (sin[:, half:] - their_sin[0, :, half:]).abs().max() <= tolerance
    assert torch.equal(sin[:, :half], -sin[:, half:])


def test_what_the_scalings_are_for() -> None:
    """Wavelengths: llama3 keeps those below 2048 tokens, divides those above 8192 by the factor; YaRN by turns."""
    config, _ = both(dict(SCALINGS["Llama 3.1"]))
    plain = rotary_frequencies(128, 5e5, None)
    wavelength = 2 * math.pi / plain
    ratio = plain / rotary_frequencies(128, 5e5, config.rope_scaling)
    assert torch.equal(ratio[wavelength < 2048], torch.ones_like(ratio[wavelength < 2048]))
    torch.testing.assert_close(ratio[wavelength > 8192], torch.full_like(ratio[wavelength > 8192], 8.0))
    middle = ratio[(wavelength > 2048) & (wavelength < 8192)]
    assert len(middle) and (middle > 1).all() and (middle < 8).all() and (middle.diff() > 0).all()
    yarn = RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=4096)
    stretched = rotary_frequencies(128, 1e4, None) / rotary_frequencies(128, 1e4, yarn)
    assert stretched[0] == 1.0 and stretched[-1] == pytest.approx(4.0) and (stretched.diff() >= -1e-6).all()


@pytest.mark.parametrize("name", [name for name in SCALINGS if "YaRN" in name or "Llama" in name or name == "linear"])
def test_a_missing_scaling_is_seen(name: str) -> None:
    config, module = both(dict(SCALINGS[name]))
    cos, _ = rotary_table(POSITIONS, config.model_copy(update={"rope_scaling": None}), 0)
    assert (cos - module(torch.zeros(1, 1), POSITIONS[None])[0][0]).abs().max() > 0.1


def test_yarn_attention_factor() -> None:
    assert yarn_attention_factor(1.0) == yarn_attention_factor(0.5) == 1.0
    assert yarn_attention_factor(4.0) == pytest.approx(0.1 * math.log(4) + 1)
    assert yarn_attention_factor(40.0, 1.0, 1.0) == 1.0
    assert yarn_attention_factor(40.0, 0.707, 1.0) < 1.0


def test_the_rotation_keeps_relative_positions_at_the_far_end() -> None:
    """q at p + 5 and k at p give one product whether p is 3 or 131,000, as far as float32 angles allow."""
    config, _ = both(dict(SCALINGS["Llama 3.1"]))
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 128, generator=generator)

    def product(start: int) -> float:
        rotated = [rotate(x, *rotary_table(torch.tensor([p]), config, 0)) for x, p in ((q, start + 5), (k, start))]
        return (rotated[0] * rotated[1]).sum().item()

    assert product(131_000) == pytest.approx(product(3), abs=0.5)
    assert abs(product(131_000) - product(3)) < 0.1 * abs(product(3) - (q * k).sum().item())


def test_partial_rotation_leaves_the_rest_alone() -> None:
    values = {**SIZES, "model_type": "phi", "partial_rotary_factor": 0.4, "max_position_embeddings": 2048}
    config = from_hf({**values, "hidden_size": 160})
    assert config.rotary_size == 32 and config.head_dim == 80
    cos, sin = rotary_table(torch.arange(5), config, 0)
    x = torch.randn(1, 5, 2, 80, generator=torch.Generator().manual_seed(0))
    out = rotate(x, cos, sin)
    assert torch.equal(out[..., 32:], x.transpose(1, 2)[..., 32:])
    assert (out[:, :, 1:, :32] - x.transpose(1, 2)[:, :, 1:, :32]).abs().amax(-1).min() > 0.1
    plain = transformers.PhiConfig(**{**values, "hidden_size": 160})
    theirs = transformers.models.phi.modeling_phi.PhiRotaryEmbedding(plain)
    assert torch.equal(rotary_frequencies(32, 1e4, None), theirs.inv_freq)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factor": None}, "factor"),
        ({"factor": 0}, "greater than 0"),
        ({"low_freq_factor": 4.0, "high_freq_factor": 4.0}, "high_freq_factor = 4.0 must be more than low_freq_factor"),
        ({"original_max_position_embeddings": 0}, "needs original_max_position_embeddings"),
        ({"original_max_position_embeddings": "8k"}, "original_max_position_embeddings"),
        ({"rope_type": "dynamic"}, "implemented are the types default, linear, llama3, yarn"),
    ],
    ids=str,
)
def test_bad_scalings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_hf({"model_type": "llama", **SIZES, "rope_parameters": {**SCALINGS["Llama 3.1"], **changes}})
