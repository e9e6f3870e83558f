"""Gemma 1: Llama with GeGLU, norms scaled by 1 + w and embeddings multiplied by the root of their size."""

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
    activation = activation_to_hf(config)
    return {
        **shape_to_hf(config),
        **rope_to_hf(config),
        "hidden_act": activation,
        "hidden_activation": activation,
    }


def from_hf(values: dict[str, Any]) -> ModelConfig:
    """Config of a config.json; UserError names what is not implemented."""
    shape = shape_from_hf(values, tied=True, head_dim=256)
    refuse(values)
    # The first files say hidden_act "gelu" and were trained with the tanh form; hidden_activation came to correct it.
    key = "hidden_activation" if values.get("hidden_activation") is not None else "hidden_act"
    activation = activation_from_hf(values, key, "gelu_pytorch_tanh")
    settings = {
        "family": FAMILY.model_type,
        **shape,
        **rope_from_hf(values),
        "norm_weight": "offset",
        "embedding_multiplier": shape["hidden_size"] ** 0.5,
        "activation": "gelu_tanh" if activation == "gelu" else activation,
    }
    return ModelConfig.parse(settings, "model")


FAMILY = Family("gemma", {"GemmaForCausalLM": "language_model"}, to_hf, from_hf, COMMON_WEIGHTS)
