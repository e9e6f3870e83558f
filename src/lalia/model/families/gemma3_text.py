"""Gemma 3 (text): norms before and after each sublayer scaled by 1 + w, GeGLU, windowed and full layers in turn."""

from typing import Any

from lalia.errors import UserError
from lalia.model.config import ModelConfig
from lalia.model.families.family import (
    COMMON_WEIGHTS,
    QK_NORM_WEIGHTS,
    Family,
    activation_from_hf,
    activation_to_hf,
    check_rope,
    refuse,
    shape_from_hf,
    shape_to_hf,
    whole_heads,
)

FULL, SLIDING = "full_attention", "sliding_attention"


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Content of config.json."""
    whole_heads(config)
    local = config.rope_theta if config.rope_theta_local is None else config.rope_theta_local
    windows = [config.window_of_layer(layer) for layer in range(config.num_hidden_layers)]
    return {
        **shape_to_hf(config, FAMILY.architecture),
        "rope_theta": config.rope_theta,
        "rope_local_base_freq": local,
        "rope_parameters": {
            FULL: {"rope_type": "default", "rope_theta": config.rope_theta},
            SLIDING: {"rope_type": "default", "rope_theta": local},
        },
        "hidden_activation": activation_to_hf(config),
        # An integer in the model folder; `registry.to_hf` refuses a scale that is no n ** -0.5.
        "query_pre_attn_scalar": round((config.attention_scale or config.head_dim**-0.5) ** -2),
        "sliding_window": config.sliding_window or config.max_position_embeddings,
        "sliding_window_pattern": config.full_attention_every,
        "layer_types": [FULL if window is None else SLIDING for window in windows],
        "attn_logit_softcapping": None,
        "final_logit_softcapping": config.logit_softcap or None,
    }


def from_hf(values: dict[str, Any]) -> ModelConfig:
    """Config of a config.json; UserError names what is not implemented."""
    shape = shape_from_hf(values, tied=True, head_dim=256)
    refuse(values)
    scalar = values.get("query_pre_attn_scalar", 256)
    if not isinstance(scalar, (int, float)) or not scalar > 0:
        raise UserError(f"query_pre_attn_scalar = {scalar!r}; expected a positive number")
    theta, local = _rope_from_hf(values)
    settings = {
        "family": FAMILY.model_type,
        **shape,
        "norm_weight": "offset",
        "norm_order": "sandwich",
        "embedding_multiplier": shape["hidden_size"] ** 0.5,
        "qk_norm": "before_rope",
        "attention_scale": None if scalar == shape["head_dim"] else scalar**-0.5,
        "rope_theta": theta,
        "rope_theta_local": local,
        "sliding_window": values.get("sliding_window", 4096),
        "full_attention_every": _full_attention_every(values),
        "activation": activation_from_hf(values, "hidden_activation", "gelu_pytorch_tanh"),
        "logit_softcap": values.get("final_logit_softcapping") or 0.0,
    }
    return ModelConfig.parse(settings, "model")


def _rope_from_hf(values: dict[str, Any]) -> tuple[float, float]:
    """rope_theta of full and of windowed layers; transformers 5 nests them by layer type."""
    check_rope("rope_scaling", values.get("rope_scaling"))
    nested = check_rope("rope_parameters", values.get("rope_parameters"))
    if nested and not nested.keys() <= {FULL, SLIDING}:
        raise UserError(f"rope_parameters has {', '.join(nested)}; expected {FULL} and {SLIDING}")
    thetas = []
    for kind, key, default in ((FULL, "rope_theta", 1_000_000.0), (SLIDING, "rope_local_base_freq", 10_000.0)):
        theta, inner = values.get(key), check_rope(f"rope_parameters.{kind}", nested.get(kind)).get("rope_theta")
        if None not in (theta, inner) and theta != inner:
            raise UserError(f"{key} = {theta} but rope_parameters.{kind} says {inner}; make them equal")
        thetas.append(next((value for value in (inner, theta) if value is not None), default))
    return thetas[0], thetas[1]


def _full_attention_every(values: dict[str, Any]) -> int:
    """The k for which every k-th layer attends to everything; layer_types, where given, beats the pattern."""
    num_layers, types = values["num_hidden_layers"], values.get("layer_types")
    pattern = values.get("sliding_window_pattern") or 6
    if type(pattern) is not int or pattern <= 0:
        raise UserError(f"sliding_window_pattern = {pattern!r}; expected a positive integer")
    if types is None:
        return pattern
    every = types.index(FULL) + 1 if isinstance(types, list) and FULL in types else max(pattern, num_layers + 1)
    expected = [SLIDING if (layer + 1) % every else FULL for layer in range(num_layers)]
    if types != expected:
        raise UserError(
            f"layer_types = {types!r} is not implemented; every k-th layer must be {FULL!r} and the others {SLIDING!r}"
        )
    return every


WEIGHTS = {
    **COMMON_WEIGHTS,
    **QK_NORM_WEIGHTS,
    # Gemma calls "post_attention" what stands behind attention, where Llama means the norm before the feed-forward.
    "layers.#.post_attention_norm.weight": ("model.layers.#.post_attention_layernorm.weight",),
    "layers.#.feed_forward_norm.weight": ("model.layers.#.pre_feedforward_layernorm.weight",),
    "layers.#.post_feed_forward_norm.weight": ("model.layers.#.post_feedforward_layernorm.weight",),
}

FAMILY = Family("gemma3_text", "Gemma3ForCausalLM", to_hf, from_hf, WEIGHTS)
