"""What a family states, and the words it states it with.

A family maps between `ModelConfig` and config.json, and between our fused weights and the separate ones of a model
folder. The keys of config.json are those of transformers 4 and 5; both are read, and where they differ both are
written.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lalia.errors import UserError
from lalia.model.config import ModelConfig

SIZE_KEYS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
"""Positive integers that every config.json has."""

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "relu2": "relu_squared"}
"""Names of activations in config.json, and ours. Plain "gelu" is the erf form, which is not implemented."""

COMMON_WEIGHTS: Mapping[str, tuple[str, ...]] = {
    "embedding.weight": ("model.embed_tokens.weight",),
    "layers.#.attention_norm.weight": ("model.layers.#.input_layernorm.weight",),
    "layers.#.attention.qkv.weight": (
        "model.layers.#.self_attn.q_proj.weight",
        "model.layers.#.self_attn.k_proj.weight",
        "model.layers.#.self_attn.v_proj.weight",
    ),
    "layers.#.attention.output.weight": ("model.layers.#.self_attn.o_proj.weight",),
    "layers.#.feed_forward_norm.weight": ("model.layers.#.post_attention_layernorm.weight",),
    "layers.#.feed_forward.up.weight": ("model.layers.#.mlp.gate_proj.weight", "model.layers.#.mlp.up_proj.weight"),
    "layers.#.feed_forward.down.weight": ("model.layers.#.mlp.down_proj.weight",),
    "norm.weight": ("model.norm.weight",),
    "head.weight": ("lm_head.weight",),
}
"""Our weight -> the weights of the model folder whose rows it stacks; # is the layer's number. Llama's names."""

QK_NORM_WEIGHTS: Mapping[str, tuple[str, ...]] = {
    "layers.#.attention.query_norm.weight": ("model.layers.#.self_attn.q_norm.weight",),
    "layers.#.attention.key_norm.weight": ("model.layers.#.self_attn.k_norm.weight",),
}


class Piece(NamedTuple):
    """Rows `start:end` of one of our weights, which the model folder stores under `name`."""

    name: str
    start: int
    end: int


@dataclass(frozen=True)
class Family:
    """One architecture of the model folder.

    Attributes:
        model_type: its name in config.json and in `ModelConfig.family`.
        architecture: its class in transformers.
        to_hf: content of config.json for a config; may drop what the family cannot express (`registry.to_hf` checks).
        from_hf: the config of a config.json; UserError for what is not implemented.
        weights: our weight -> names in the model folder, as in `COMMON_WEIGHTS`.
    """

    model_type: str
    architecture: str
    to_hf: Callable[[ModelConfig], dict[str, Any]]
    from_hf: Callable[[dict[str, Any]], ModelConfig]
    weights: Mapping[str, tuple[str, ...]]

    def pieces(self, config: ModelConfig, parameter: str, num_rows: int) -> list[Piece]:
        """Where the rows of one of our parameters are in the model folder.

        Args:
            parameter: name in `Transformer.named_parameters()`, such as layers.3.attention.qkv.weight.
            num_rows: its first dimension.
        """
        parts = parameter.split(".")
        layer = parts[1] if parts[0] == "layers" else ""
        names = self.weights[".".join(["layers", "#", *parts[2:]]) if layer else parameter]
        if len(names) == 3:
            sizes = [config.query_size, config.key_value_size, config.key_value_size]
        else:
            sizes = [num_rows // len(names)] * len(names)
        assert sum(sizes) == num_rows, (parameter, num_rows, sizes)
        pieces, start = [], 0
        for name, size in zip(names, sizes, strict=True):
            pieces.append(Piece(name.replace("#", layer), start, start + size))
            start += size
        return pieces


def shape_to_hf(config: ModelConfig, architecture: str) -> dict[str, Any]:
    """The part of config.json that all families share."""
    return {
        "architectures": [architecture],
        "model_type": config.family,
        **{key: getattr(config, key) for key in SIZE_KEYS},
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": False,
    }


def whole_heads(config: ModelConfig) -> None:
    """Refuse what the family's config class in transformers refuses, whatever head_dim is."""
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"hidden_size = {config.hidden_size} must be a multiple of num_attention_heads = "
            f"{config.num_attention_heads} in a model folder of family {config.family!r}"
        )


def shape_from_hf(values: dict[str, Any], tied: bool, head_dim: int | None = None) -> dict[str, Any]:
    """Settings of `ModelConfig` from the part of config.json that all families share.

    Args:
        tied: the family's default of tie_word_embeddings.
        head_dim: the family's default; None means hidden_size / num_attention_heads.

    Raises:
        UserError: naming every size that is missing or no positive integer.
    """
    sizes = {key: values.get(key) for key in SIZE_KEYS}
    optional = {key: values[key] for key in ("num_key_value_heads", "head_dim") if values.get(key) is not None}
    bad = [key for key, value in (sizes | optional).items() if type(value) is not int or value <= 0]
    if bad:
        listed = ", ".join(f"{key} = {values[key]!r}" if key in values else f"{key} is missing" for key in bad)
        raise UserError(f"{listed}; expected positive integers")
    defaults = {
        "num_key_value_heads": values["num_attention_heads"],
        "head_dim": head_dim or values["hidden_size"] // values["num_attention_heads"],
    }
    return {
        **sizes,
        **defaults,
        **optional,
        "rms_norm_eps": values.get("rms_norm_eps", 1e-6),
        "tie_word_embeddings": values.get("tie_word_embeddings", tied),
    }


def activation_to_hf(config: ModelConfig) -> str:
    """Name of the activation in config.json."""
    return next(name for name, ours in ACTIVATIONS.items() if ours == config.activation)


def activation_from_hf(values: dict[str, Any], key: str, default: str) -> str:
    """Our name of the activation that config.json has under `key`."""
    name = values.get(key, default)
    if name not in list(ACTIVATIONS):
        raise UserError(f"{key} = {name!r} is not implemented; implemented are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def rope_to_hf(theta: float) -> dict[str, Any]:
    """Rotary positions in both spellings: transformers 4 reads rope_theta, transformers 5 rope_parameters."""
    return {"rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def rope_from_hf(values: dict[str, Any], default: float = 10_000.0) -> float:
    """rope_theta in either spelling.

    Raises:
        UserError: for a scaled or partial rotation, and for two spellings that disagree.
    """
    scaling, parameters = values.get("rope_scaling"), values.get("rope_parameters")
    theta = values.get("rope_theta")
    for key, rope in (("rope_scaling", scaling), ("rope_parameters", parameters)):
        inner = check_rope(key, rope).get("rope_theta")
        if inner is not None:
            if theta is not None and theta != inner:
                raise UserError(f"rope_theta = {theta} but {key} says {inner}; make them equal")
            theta = inner
    return default if theta is None else theta


def check_rope(key: str, rope: Any) -> dict[str, Any]:
    """The given rope_parameters or rope_scaling, {} for null; UserError if they scale or turn a part only."""
    if rope is None:
        return {}
    if not isinstance(rope, dict):
        raise UserError(f"{key} = {rope!r} is no object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{key} = {rope!r} is not implemented; only rope_type 'default' is, without scaling")
    return rope


def refuse(values: dict[str, Any], **implemented: Any) -> None:
    """Refuse a config.json in which a key is neither absent, null nor the one value that is implemented.

    Raises:
        UserError: naming every such key.
    """
    implemented = {
        "attention_bias": False,
        "mlp_bias": False,
        "attn_logit_softcapping": None,
        "use_bidirectional_attention": False,
        "use_sliding_window": False,
        "partial_rotary_factor": 1.0,
        "per_layer_config": None,
        "quantization_config": None,
        **implemented,
    }
    wrong = [key for key, value in implemented.items() if values.get(key) not in (None, value)]
    if wrong:
        listed = ", ".join(f"{key} = {values[key]!r}" for key in wrong)
        raise UserError(f"{listed}: not implemented for model_type {values.get('model_type')!r}")


def full_attention_only(values: dict[str, Any]) -> None:
    """Refuse layer_types other than full attention."""
    refuse(values, layer_types=["full_attention"] * values["num_hidden_layers"])
