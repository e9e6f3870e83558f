"""Gemma 2: Gemma with norms behind the sublayers too, soft-capped scores and logits, every other layer windowed."""

from typing import Any

from lalia.model.config import ModelConfig
from lalia.model.families.family import (
    COMMON_WEIGHTS,
    FULL,
    GEMMA_SANDWICH_WEIGHTS,
    SLIDING,
    Family,
    activation_from_hf,
    activation_to_hf,
    layer_types_from_hf,
    layer_types_to_hf,
    refuse,
    scalar_from_hf,
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
        "hidden_activation": activation_to_hf(config),
        "query_pre_attn_scalar": round((config.attention_scale or config.head_dim**-0.5) ** -2),
        "sliding_window": config.sliding_window or config.max_position_embeddings,
        "layer_types": layer_types_to_hf(config),
        "attn_logit_softcapping": config.attention_softcap or None,
        "final_logit_softcapping": config.logit_softcap or None,
    }


def from_hf(values: dict[str, Any]) -> ModelConfig:
    """Config of a config.json; UserError names what is not implemented."""
    shape = shape_from_hf(values, tied=True, head_dim=256)
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0} | values
    refuse(values, attn_logit_softcapping=caps["attn_logit_softcapping"])
    alternating = [SLIDING if (layer + 1) % 2 else FULL for layer in range(shape["num_hidden_layers"])]
    scalar = scalar_from_hf(values)
    settings = {
        "family": FAMILY.model_type,
        **shape,
        **rope_from_hf(values),
        "norm_weight": "offset",
        "norm_order": "sandwich",
        "embedding_multiplier": shape["hidden_size"] ** 0.5,
        "attention_scale": None if scalar == shape["head_dim"] else scalar**-0.5,
        "attention_softcap": caps["attn_logit_softcapping"] or 0.0,
        "logit_softcap": caps["final_logit_softcapping"] or 0.0,
        "sliding_window": values.get("sliding_window", 4096),
        "layer_types": layer_types_from_hf(values, alternating),
        "activation": activation_from_hf(values, "hidden_activation", "gelu_pytorch_tanh"),
    }
    return ModelConfig.parse(settings, "model")


WEIGHTS = {**COMMON_WEIGHTS, **GEMMA_SANDWICH_WEIGHTS}

FAMILY = Family("gemma2", {"Gemma2ForCausalLM": "language_model"}, to_hf, from_hf, WEIGHTS)
