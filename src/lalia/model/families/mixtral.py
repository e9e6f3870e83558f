"""Mixtral: Mistral with experts; the weights of the chosen ones are scaled to sum 1."""

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
    sizes_from_hf,
)
from lalia.model.families.rope import rope_from_hf, rope_to_hf


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Content of config.json."""
    return {
        **shape_to_hf(config),
        **rope_to_hf(config),
        "hidden_act": activation_to_hf(config),
        "sliding_window": config.sliding_window,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_token,
        "router_aux_loss_coef": config.router_aux_loss_coef,
        "router_z_loss_coef": config.router_z_loss_coef,
    }


def from_hf(values: dict[str, Any]) -> ModelConfig:
    """Config of a config.json; UserError names what is not implemented."""
    shape = shape_from_hf(values, tied=False, eps=1e-5)
    refuse(values, layer_types=None, router_jitter_noise=0.0)
    values = {"num_local_experts": values.get("num_experts", 8), "num_experts_per_tok": 2, **values}
    experts = {"num_experts": "num_local_experts", "num_experts_per_token": "num_experts_per_tok"}
    settings = {
        "family": FAMILY.model_type,
        **shape,
        **rope_from_hf(values, default_theta=1_000_000.0),
        **sizes_from_hf(values, experts),
        "router_aux_loss_coef": values.get("router_aux_loss_coef", 0.001),
        "router_z_loss_coef": values.get("router_z_loss_coef", 0.0),
        "sliding_window": values.get("sliding_window"),
        "activation": activation_from_hf(values, "hidden_act", "silu"),
    }
    return ModelConfig.parse(settings, "model")


EXPERT = "model.layers.#.block_sparse_moe.experts.@"
WEIGHTS = {
    **COMMON_WEIGHTS,
    "layers.#.feed_forward.router": ("model.layers.#.block_sparse_moe.gate.weight",),
    "layers.#.feed_forward.up": (f"{EXPERT}.w1.weight", f"{EXPERT}.w3.weight"),
    "layers.#.feed_forward.down": (f"{EXPERT}.w2.weight",),
}

FAMILY = Family("mixtral", {"MixtralForCausalLM": "language_model"}, to_hf, from_hf, WEIGHTS)
