"""Qwen 3 with experts: all layers, every k-th, or all but some."""

from typing import Any

from lalia.errors import UserError
from lalia.model.config import ModelConfig
from lalia.model.families import qwen3
from lalia.model.families.family import (
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
        "attention_bias": config.qkv_bias and config.attention_output_bias,
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        # transformers 5 writes the second name, transformers 4 the first.
        "num_experts": config.num_experts,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_token,
        "moe_intermediate_size": config.expert_size or config.intermediate_size,
        "norm_topk_prob": config.normalize_expert_weights,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(config.dense_layers),
        "router_aux_loss_coef": config.router_aux_loss_coef,
        "router_z_loss_coef": config.router_z_loss_coef,
    }


def from_hf(values: dict[str, Any]) -> ModelConfig:
    """Config of a config.json; UserError names what is not implemented."""
    defaults = {"num_experts_per_tok": 8, "moe_intermediate_size": 768, "decoder_sparse_step": 1}
    values = {**defaults, "num_experts": values.get("num_local_experts", 128), **values}
    # transformers derives an absent head_dim here, unlike in the dense family.
    shape = shape_from_hf(values, tied=False)
    biased = bool(values.get("attention_bias"))
    refuse(
        values,
        use_sliding_window=values.get("use_sliding_window"),
        attention_bias=biased,
        layer_types=None,
    )
    experts = {
        "num_experts": "num_experts",
        "num_experts_per_token": "num_experts_per_tok",
        "expert_size": "moe_intermediate_size",
        "step": "decoder_sparse_step",
    }
    sizes = sizes_from_hf(values, experts)
    step, dense = sizes.pop("step"), values.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise UserError(f"mlp_only_layers = {dense!r}; expected a list of layer numbers")
    dense_layers = [layer for layer in range(shape["num_hidden_layers"]) if layer in dense or (layer + 1) % step]
    settings = {
        "family": FAMILY.model_type,
        **shape,
        **rope_from_hf(values),
        **sizes,
        "sliding_window": values.get("sliding_window", 4096) if values.get("use_sliding_window") else None,
        "dense_layers": dense_layers,
        "normalize_expert_weights": bool(values.get("norm_topk_prob", False)),
        "router_aux_loss_coef": values.get("router_aux_loss_coef", 0.001),
        "router_z_loss_coef": values.get("router_z_loss_coef", 0.0),
        "qkv_bias": biased,
        "attention_output_bias": biased,
        "qk_norm": "before_rope",
        "activation": activation_from_hf(values, "hidden_act", "silu"),
    }
    return ModelConfig.parse(settings, "model")


EXPERT = "model.layers.#.mlp.experts.@"
WEIGHTS = {
    **qwen3.WEIGHTS,
    "layers.#.feed_forward.router": ("model.layers.#.mlp.gate.weight",),
    "layers.#.feed_forward.up": (f"{EXPERT}.gate_proj.weight", f"{EXPERT}.up_proj.weight"),
    "layers.#.feed_forward.down": (f"{EXPERT}.down_proj.weight",),
}

FAMILY = Family("qwen3_moe", {"Qwen3MoeForCausalLM": "language_model"}, to_hf, from_hf, WEIGHTS)
