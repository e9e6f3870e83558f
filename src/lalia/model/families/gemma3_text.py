"""Gemma 3 (text): norms before and after each sublayer scaled by 1 + w, GeGLU, windowed and full layers in turn."""

from typing import Any

from lalia.errors import UserError
from lalia.model.config import ModelConfig
from lalia.model.families.family import (
    COMMON_WEIGHTS,
    FULL,
    GEMMA_SANDWICH_WEIGHTS,
    QK_NORM_WEIGHTS,
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
from lalia.model.families.rope import check_rope, parameters_to_hf, scaling_from_hf


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Content of config.json."""
    whole_heads(config)
    local = config.rope_theta if config.rope_theta_local is None else config.rope_theta_local
    scaled = parameters_to_hf(config.rope_theta, config.rope_scaling)
    return {
        **shape_to_hf(config),
        "rope_theta": config.rope_theta,
        "rope_local_base_freq": local,
        "rope_parameters": {FULL: scaled, SLIDING: parameters_to_hf(local, None)},
        "hidden_activation": activation_to_hf(config),
        # An integer in the model folder; `registry.to_hf` refuses a scale that is no n ** -0.5.
        "query_pre_attn_scalar": round((config.attention_scale or config.head_dim**-0.5) ** -2),
        "sliding_window": config.sliding_window or config.max_position_embeddings,
        "layer_types": layer_types_to_hf(config),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": config.logit_softcap or None,
    }


def from_hf(values: dict[str, Any]) -> ModelConfig:
    """Config of a config.json; UserError names what is not implemented."""
    shape = shape_from_hf(values, tied=True, head_dim=256)
    refuse(values)
    scalar = scalar_from_hf(values)
    settings = {
        "family": FAMILY.model_type,
        **shape,
        **_rope_from_hf(values),
        "norm_weight": "offset",
        "norm_order": "sandwich",
        "embedding_multiplier": shape["hidden_size"] ** 0.5,
        "qk_norm": "before_rope",
        "attention_scale": None if scalar == shape["head_dim"] else scalar**-0.5,
        "sliding_window": values.get("sliding_window", 4096),
        "layer_types": layer_types_from_hf(values, _pattern(values, shape["num_hidden_layers"])),
        "activation": activation_from_hf(values, "hidden_activation", "gelu_pytorch_tanh"),
        "logit_softcap": values.get("final_logit_softcapping") or 0.0,
    }
    return ModelConfig.parse(settings, "model")


def _rope_from_hf(values: dict[str, Any]) -> dict[str, Any]:
    """rope_theta of full and of windowed layers and the scaling of the full ones; transformers 5 nests them."""
    scaling = check_rope("rope_scaling", values.get("rope_scaling"))
    nested = values.get("rope_parameters")
    if nested is not None and (not isinstance(nested, dict) or not nested.keys() <= {FULL, SLIDING}):
        found = ", ".join(map(str, nested)) if isinstance(nested, dict) else repr(nested)
        raise UserError(f"rope_parameters has {found}; expected {FULL} and {SLIDING}")
    nested = nested or {}
    thetas = []
    for kind, key, default in ((FULL, "rope_theta", 1_000_000.0), (SLIDING, "rope_local_base_freq", 10_000.0)):
        theta, inner = values.get(key), check_rope(f"rope_parameters.{kind}", nested.get(kind)).get("rope_theta")
        if None not in (theta, inner) and theta != inner:
            raise UserError(f"{key} = {theta} but rope_parameters.{kind} says {inner}; make them equal")
        thetas.append(next((value for value in (inner, theta) if value is not None), default))
    if scaling_from_hf(nested.get(SLIDING), values) is not None:
        raise UserError(f"rope_parameters.{SLIDING} = {nested[SLIDING]!r} is not implemented; only full layers scale")
    return {
        "rope_theta": thetas[0],
        "rope_theta_local": thetas[1],
        "rope_scaling": scaling_from_hf(nested.get(FULL, scaling), values),
    }


def _pattern(values: dict[str, Any], num_layers: int) -> list[str]:
    """Every k-th layer is full."""
    every = values.get("sliding_window_pattern") or values.get("_sliding_window_pattern") or 6
    if type(every) is not int or every <= 0:
        raise UserError(f"sliding_window_pattern = {every!r}; expected a positive integer")
    return [SLIDING if (layer + 1) % every else FULL for layer in range(num_layers)]


WEIGHTS = {**COMMON_WEIGHTS, **QK_NORM_WEIGHTS, **GEMMA_SANDWICH_WEIGHTS}

FAMILY = Family("gemma3_text", {"Gemma3ForCausalLM": "language_model"}, to_hf, from_hf, WEIGHTS)
