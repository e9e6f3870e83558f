"""Qwen 2 and 2.5: Llama with biases on query, key and value."""

from typing import Any

from lalia.model.config import ModelConfig
from lalia.model.families.family import (
    COMMON_WEIGHTS,
    FULL,
    QKV_BIASES,
    SLIDING,
    Family,
    activation_from_hf,
    activation_to_hf,
    derived_head_dim,
    layer_types_from_hf,
    layer_types_to_hf,
    refuse,
    shape_from_hf,
    shape_to_hf,
)
from lalia.model.families.rope import rope_from_hf, rope_to_hf


def windows_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The keys of Qwen 2 and 3 for windowed layers."""
    types = layer_types_to_hf(config)
    return {
        "use_sliding_window": SLIDING in types,
        "sliding_window": config.sliding_window if SLIDING in types else None,
        "max_window_layers": types.index(SLIDING) if SLIDING in types else len(types),
        "layer_types": types,
    }


def windows_from_hf(values: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """sliding_window and layer_types; use_sliding_window false overrides a sliding_window that is there."""
    window = values.get("sliding_window", 4096) if values.get("use_sliding_window") else None
    first = values.get("max_window_layers", 28)
    first = first if type(first) is int else 28
    by_depth = [SLIDING if window is not None and layer >= first else FULL for layer in range(num_layers)]
    return {"sliding_window": window, "layer_types": layer_types_from_hf(values, by_depth)}


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Content of config.json."""
    derived_head_dim(config)
    values = {
        **shape_to_hf(config),
        **rope_to_hf(config),
        "hidden_act": activation_to_hf(config),
        **windows_to_hf(config),
    }
    del values["head_dim"]
    return values


def from_hf(values: dict[str, Any]) -> ModelConfig:
    """Config of a config.json; UserError names what is not implemented."""
    shape = shape_from_hf(values, tied=False)
    refuse(values, use_sliding_window=values.get("use_sliding_window"))
    settings = {
        "family": FAMILY.model_type,
        **shape,
        **rope_from_hf(values),
        **windows_from_hf(values, shape["num_hidden_layers"]),
        "qkv_bias": True,
        "activation": activation_from_hf(values, "hidden_act", "silu"),
    }
    return ModelConfig.parse(settings, "model")


FAMILY = Family("qwen2", {"Qwen2ForCausalLM": "language_model"}, to_hf, from_hf, {**COMMON_WEIGHTS, **QKV_BIASES})
