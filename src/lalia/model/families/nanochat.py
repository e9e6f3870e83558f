"""nanochat: norms without weights (one on the embedding), QK-norm after a rotation the other way, squared ReLU."""

from typing import Any

from lalia.model.config import ModelConfig
from lalia.model.families.family import (
    COMMON_WEIGHTS,
    Family,
    activation_from_hf,
    activation_to_hf,
    full_attention_only,
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
        "attention_bias": False,
        "hidden_act": activation_to_hf(config),
        "final_logit_softcapping": config.logit_softcap or None,
    }


def from_hf(values: dict[str, Any]) -> ModelConfig:
    """Config of a config.json; UserError names what is not implemented."""
    shape = shape_from_hf(values, tied=False)
    refuse(values)
    full_attention_only(values)
    settings = {
        "family": FAMILY.model_type,
        **shape,
        **rope_from_hf(values),
        "norm_weight": "none",
        "embedding_norm": True,
        "qk_norm": "after_rope",
        "rope_direction": -1,
        "activation": activation_from_hf(values, "hidden_act", "relu2"),
        "gated": False,
        "logit_softcap": values.get("final_logit_softcapping", 15.0) or 0.0,
    }
    return ModelConfig.parse(settings, "model")


WEIGHTS = {
    **COMMON_WEIGHTS,
    "layers.#.feed_forward.up.weight": ("model.layers.#.mlp.fc1.weight",),
    "layers.#.feed_forward.down.weight": ("model.layers.#.mlp.fc2.weight",),
}

FAMILY = Family("nanochat", {"NanoChatForCausalLM": "language_model"}, to_hf, from_hf, WEIGHTS)
