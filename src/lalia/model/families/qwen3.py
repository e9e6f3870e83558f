"""Qwen 3 (dense): Llama with QK-norm before the rotation and a head_dim of its own."""

from typing import Any

from lalia.model.config import ModelConfig
from lalia.model.families.family import (
    BIASES,
    COMMON_WEIGHTS,
    QK_NORM_WEIGHTS,
    Family,
    activation_from_hf,
    activation_to_hf,
    refuse,
    shape_from_hf,
    shape_to_hf,
)
from lalia.model.families.qwen2 import windows_from_hf, windows_to_hf
from lalia.model.families.rope import rope_from_hf, rope_to_hf


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Content of config.json."""
    return {
        **shape_to_hf(config),
        **rope_to_hf(config),
        "hidden_act": activation_to_hf(config),
        "attention_bias": config.qkv_bias and config.attention_output_bias,
        **windows_to_hf(config),
    }


def from_hf(values: dict[str, Any]) -> ModelConfig:
    """Config of a config.json; UserError names what is not implemented."""
    shape = shape_from_hf(values, tied=False, head_dim=128)
    biased = bool(values.get("attention_bias"))
    refuse(values, use_sliding_window=values.get("use_sliding_window"), attention_bias=biased)
    settings = {
        "family": FAMILY.model_type,
        **shape,
        **rope_from_hf(values),
        **windows_from_hf(values, shape["num_hidden_layers"]),
        "qkv_bias": biased,
        "attention_output_bias": biased,
        "qk_norm": "before_rope",
        "activation": activation_from_hf(values, "hidden_act", "silu"),
    }
    return ModelConfig.parse(settings, "model")


WEIGHTS = {**COMMON_WEIGHTS, **QK_NORM_WEIGHTS, **BIASES}

FAMILY = Family("qwen3", {"Qwen3ForCausalLM": "language_model"}, to_hf, from_hf, WEIGHTS)
