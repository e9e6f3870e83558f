"""Phi-1, 1.5 and 2: attention and feed-forward in parallel behind one LayerNorm, 0.4 of each head rotated, biases."""

from typing import Any

from lalia.model.config import ModelConfig
from lalia.model.families.family import (
    BIASES,
    COMMON_WEIGHTS,
    Family,
    activation_from_hf,
    activation_to_hf,
    derived_head_dim,
    refuse,
    shape_from_hf,
    shape_to_hf,
)
from lalia.model.families.rope import rope_from_hf, rope_to_hf


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Content of config.json."""
    derived_head_dim(config)
    values = {**shape_to_hf(config, "layer_norm_eps"), **rope_to_hf(config), "hidden_act": activation_to_hf(config)}
    del values["head_dim"]
    # Named even where all of a head turns: transformers takes 0.5 for an absent key.
    values["partial_rotary_factor"] = values["rope_parameters"]["partial_rotary_factor"] = config.rope_fraction
    return values


def from_hf(values: dict[str, Any]) -> ModelConfig:
    """Config of a config.json; UserError names what is not implemented."""
    shape = shape_from_hf(values, tied=False, eps=1e-5, eps_key="layer_norm_eps")
    refuse(values, qk_layernorm=False)
    settings = {
        "family": FAMILY.model_type,
        **shape,
        **rope_from_hf(values, fraction=0.5),
        "norm": "layer",
        "norm_order": "parallel",
        "qkv_bias": True,
        "attention_output_bias": True,
        "feed_forward_bias": True,
        "head_bias": True,
        "gated": False,
        "activation": activation_from_hf(values, "hidden_act", "gelu_new"),
    }
    return ModelConfig.parse(settings, "model")


LAYER = "model.layers.#"
WEIGHTS = {
    **COMMON_WEIGHTS,
    **BIASES,
    "layers.#.attention_norm.bias": (f"{LAYER}.input_layernorm.bias",),
    **{f"layers.#.attention.output.{part}": (f"{LAYER}.self_attn.dense.{part}",) for part in ("weight", "bias")},
    **{f"layers.#.feed_forward.up.{part}": (f"{LAYER}.mlp.fc1.{part}",) for part in ("weight", "bias")},
    **{f"layers.#.feed_forward.down.{part}": (f"{LAYER}.mlp.fc2.{part}",) for part in ("weight", "bias")},
    **{f"norm.{part}": (f"model.final_layernorm.{part}",) for part in ("weight", "bias")},
    "head_bias": ("lm_head.bias",),
}

FAMILY = Family("phi", {"PhiForCausalLM": "language_model"}, to_hf, from_hf, WEIGHTS)
