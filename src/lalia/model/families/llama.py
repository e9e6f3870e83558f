"""Llama 2 and 3 (without rope scaling): pre-norm, SwiGLU, rotary positions."""

from typing import Any

from lalia.model.config import ModelConfig
from lalia.model.families.family import (
    COMMON_WEIGHTS,
    Family,
    activation_from_hf,
    activation_to_hf,
    full_attention_only,
    refuse,
    rope_from_hf,
    rope_to_hf,
    shape_from_hf,
    shape_to_hf,
    whole_heads,
)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Content of config.json."""
    whole_heads(config)
    return {
        **shape_to_hf(config, FAMILY.architecture),
        **rope_to_hf(config.rope_theta),
        "hidden_act": activation_to_hf(config),
        "mlp_bias": False,
    }


def from_hf(values: dict[str, Any]) -> ModelConfig:
    """Config of a config.json; UserError names what is not implemented."""
    shape = shape_from_hf(values, tied=False)
    refuse(values)
    full_attention_only(values)
    settings = {
        "family": FAMILY.model_type,
        **shape,
        "rope_theta": rope_from_hf(values),
        "activation": activation_from_hf(values, "hidden_act", "silu"),
    }
    return ModelConfig.parse(settings, "model")


FAMILY = Family("llama", "LlamaForCausalLM", to_hf, from_hf, COMMON_WEIGHTS)
