"""Qwen 3 (dense): Llama with QK-norm before the rotation and a head_dim of its own."""

from typing import Any

from lalia.model.config import ModelConfig
from lalia.model.families.family import (
    COMMON_WEIGHTS,
    QK_NORM_WEIGHTS,
    Family,
    activation_from_hf,
    activation_to_hf,
    full_attention_only,
    refuse,
    rope_from_hf,
    rope_to_hf,
    shape_from_hf,
    shape_to_hf,
)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Content of config.json."""
    return {
        **shape_to_hf(config, FAMILY.architecture),
        **rope_to_hf(config.rope_theta),
        "hidden_act": activation_to_hf(config),
        "use_sliding_window": False,
        "sliding_window": None,
    }


def from_hf(values: dict[str, Any]) -> ModelConfig:
    """Config of a config.json; UserError names what is not implemented."""
    shape = shape_from_hf(values, tied=False, head_dim=128)
    refuse(values)
    full_attention_only(values)
    settings = {
        "family": FAMILY.model_type,
        **shape,
        "qk_norm": "before_rope",
        "rope_theta": rope_from_hf(values),
        "activation": activation_from_hf(values, "hidden_act", "silu"),
    }
    return ModelConfig.parse(settings, "model")


FAMILY = Family("qwen3", "Qwen3ForCausalLM", to_hf, from_hf, {**COMMON_WEIGHTS, **QK_NORM_WEIGHTS})
