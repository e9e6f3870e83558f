"""Llama 2, 3, 3.1, 3.2: pre-norm, SwiGLU, rotary positions, scaled by parts for 131,072 tokens from 3.1 on."""

from typing import Any

from lalia.model.config import ModelConfig
from lalia.model.families.family import (
    BIASES,
    COMMON_WEIGHTS,
    Family,
    activation_from_hf,
    activation_to_hf,
    full_attention_only,
    refuse,
    shape_from_hf,
    shape_to_hf,
    whole_heads,
)
from lalia.model.families.rope import rope_from_hf, rope_to_hf


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Content of config.json."""
    whole_heads(config)
    return {
        **shape_to_hf(config),
        **rope_to_hf(config),
        "hidden_act": activation_to_hf(config),
        "attention_bias": config.qkv_bias and config.attention_output_bias,
        "mlp_bias": config.feed_forward_bias,
    }


def from_hf(values: dict[str, Any]) -> ModelConfig:
    """Config of a config.json; UserError names what is not implemented."""
    shape = shape_from_hf(values, tied=False)
    biased = bool(values.get("attention_bias"))
    refuse(values, attention_bias=biased, mlp_bias=bool(values.get("mlp_bias")))
    full_attention_only(values)
    settings = {
        "family": FAMILY.model_type,
        **shape,
        **rope_from_hf(values),
        "qkv_bias": biased,
        "attention_output_bias": biased,
        "feed_forward_bias": bool(values.get("mlp_bias")),
        "activation": activation_from_hf(values, "hidden_act", "silu"),
    }
    return ModelConfig.parse(settings, "model")


FAMILY = Family("llama", {"LlamaForCausalLM": "language_model"}, to_hf, from_hf, {**COMMON_WEIGHTS, **BIASES})
