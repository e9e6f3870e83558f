"""Grok-1: norms before and after each sublayer, soft-capped scores, experts whose weights are not renormalised.

The keys and weight names are those of the community's conversion of the release (model_type "grok-1"). The release
itself is read by `lalia.formats.grok`.
"""

from typing import Any

from lalia.model.config import ModelConfig
from lalia.model.families.family import Family, refuse, shape_from_hf, shape_to_hf, sizes_from_hf
from lalia.model.families.rope import rope_from_hf, rope_to_hf


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Content of config.json."""
    return {
        **shape_to_hf(config),
        **rope_to_hf(config),
        "embedding_multiplier_scale": config.embedding_multiplier,
        "output_multiplier_scale": config.output_multiplier,
        "max_attn_value": config.attention_softcap,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_token,
        "router_aux_loss_coef": config.router_aux_loss_coef,
    }


def from_hf(values: dict[str, Any]) -> ModelConfig:
    """Config of a config.json; UserError names what is not implemented."""
    shape = shape_from_hf(values, tied=True, eps=1e-5)
    refuse(values, hidden_act="gelu_pytorch_tanh")
    experts = {"num_experts": "num_experts", "num_experts_per_token": "num_experts_per_tok"}
    settings = {
        "family": FAMILY.model_type,
        **shape,
        **rope_from_hf(values),
        **sizes_from_hf({"num_experts": 8, "num_experts_per_tok": 2, **values}, experts),
        "norm_order": "sandwich",
        "embedding_multiplier": values.get("embedding_multiplier_scale", shape["hidden_size"] ** 0.5),
        "output_multiplier": values.get("output_multiplier_scale", 3**-0.5),
        "attention_softcap": values.get("max_attn_value", 30.0),
        "normalize_expert_weights": False,
        "router_aux_loss_coef": values.get("router_aux_loss_coef", 0.001),
        "activation": "gelu_tanh",
    }
    return ModelConfig.parse(settings, "model")


LAYER = "model.layers.#"
EXPERT = f"{LAYER}.moe_block.experts.@"
WEIGHTS = {
    "embedding.weight": ("model.embed_tokens.weight",),
    "layers.#.attention_norm.weight": (f"{LAYER}.pre_attn_norm.scale",),
    "layers.#.post_attention_norm.weight": (f"{LAYER}.post_attn_norm.scale",),
    "layers.#.feed_forward_norm.weight": (f"{LAYER}.pre_moe_norm.scale",),
    "layers.#.post_feed_forward_norm.weight": (f"{LAYER}.post_moe_norm.scale",),
    "layers.#.attention.qkv.weight": tuple(f"{LAYER}.attn.{name}_proj.weight" for name in "qkv"),
    "layers.#.attention.output.weight": (f"{LAYER}.attn.o_proj.weight",),
    "layers.#.feed_forward.router": (f"{LAYER}.moe_block.gate.weight",),
    "layers.#.feed_forward.up": (f"{EXPERT}.linear.weight", f"{EXPERT}.linear_v.weight"),
    "layers.#.feed_forward.down": (f"{EXPERT}.linear_1.weight",),
    "norm.weight": ("model.norm.scale",),
    "head.weight": ("lm_head.weight",),
}


def _canonical(config: ModelConfig, name: str) -> str | None:
    """The two conversions in circulation call a norm's weight .scale and .weight."""
    return name.removesuffix(".weight") + ".scale" if name.endswith("norm.weight") else name


FAMILY = Family("grok-1", {"Grok1ModelForCausalLM": "language_model"}, to_hf, from_hf, WEIGHTS, canonical=_canonical)
