"""Mistral: Llama with grouped key-value heads and, in version 0.1, a sliding window in every layer."""

from typing import Any

from lalia.model.config import ModelConfig
from lalia.model.families.family import (
    COMMON_WEIGHTS,
    Family,
    activation_from_hf,
    activation_to_hf,
    refuse,
    shape_from_hf,
    shape_to_hf,
)
from lalia.model.families.rope import rope_from_hf, rope_to_hf


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Content of config.json."""
    return {
        **shape_to_hf(config),
        **rope_to_hf(config),
        "hidden_act": activation_to_hf(config),
        "sliding_window": config.sliding_window,
    }


def from_hf(values: dict[str, Any]) -> ModelConfig:
    """Config of a config.json; UserError names what is not implemented."""
    shape = shape_from_hf(values, tied=False)
    refuse(values, layer_types=None)
    settings = {
        "family": FAMILY.model_type,
        **shape,
        **rope_from_hf(values),
        # Absent means 4096, as in transformers; null means no window.
        "sliding_window": values.get("sliding_window", 4096),
        "activation": activation_from_hf(values, "hidden_act", "silu"),
    }
    return ModelConfig.parse(settings, "model")


FAMILY = Family("mistral", {"MistralForCausalLM": "language_model"}, to_hf, from_hf, COMMON_WEIGHTS)
