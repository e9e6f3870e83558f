"""What a family states, and the words it states it with.

A family maps between `ModelConfig` and config.json, and between our fused weights and the separate ones of a model
folder. The keys of config.json are those of transformers 4 and 5; both are read, and where they differ both are
written (rotary positions: `lalia.model.families.rope`).
"""

import math
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
"""Positive integers that every config.json of a language model has."""

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu2": "relu_squared",
}
"""Names of activations in config.json, and ours."""

MAX_MODULES = 10_000
"""Largest number of layers or experts that is believed; the largest published models have hundreds."""

FULL, SLIDING = "full_attention", "sliding_attention"

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
"""Our weight -> the weights of the model folder whose rows it stacks; # is the layer's number, @ an expert's. Llama's
names."""

QKV_BIASES: Mapping[str, tuple[str, ...]] = {
    "layers.#.attention.qkv.bias": (
        "model.layers.#.self_attn.q_proj.bias",
        "model.layers.#.self_attn.k_proj.bias",
        "model.layers.#.self_attn.v_proj.bias",
    ),
}
BIASES: Mapping[str, tuple[str, ...]] = {
    **QKV_BIASES,
    "layers.#.attention.output.bias": ("model.layers.#.self_attn.o_proj.bias",),
    "layers.#.feed_forward.up.bias": ("model.layers.#.mlp.gate_proj.bias", "model.layers.#.mlp.up_proj.bias"),
    "layers.#.feed_forward.down.bias": ("model.layers.#.mlp.down_proj.bias",),
}
QK_NORM_WEIGHTS: Mapping[str, tuple[str, ...]] = {
    "layers.#.attention.query_norm.weight": ("model.layers.#.self_attn.q_norm.weight",),
    "layers.#.attention.key_norm.weight": ("model.layers.#.self_attn.k_norm.weight",),
}
GEMMA_SANDWICH_WEIGHTS: Mapping[str, tuple[str, ...]] = {
    # Gemma calls "post_attention" what stands behind attention, where Llama means the norm before the feed-forward.
    "layers.#.post_attention_norm.weight": ("model.layers.#.post_attention_layernorm.weight",),
    "layers.#.feed_forward_norm.weight": ("model.layers.#.pre_feedforward_layernorm.weight",),
    "layers.#.post_feed_forward_norm.weight": ("model.layers.#.post_feedforward_layernorm.weight",),
}


class Piece(NamedTuple):
    """Rows `start:end` of one of our weights, which the model folder stores under `name` (in canonical spelling).

    Our weight counts as a matrix here: experts stand one below the other.

    Attributes:
        shape: of the stored tensor.
        transposed: whether it is stored (in, out), as GPT-2 does.
    """

    name: str
    start: int
    end: int
    shape: tuple[int, ...]
    transposed: bool = False


def _as_stored(config: ModelConfig, name: str) -> str | None:
    return name


@dataclass(frozen=True)
class Family:
    """One architecture of the model folder.

    Attributes:
        model_type: its name in config.json and in `ModelConfig.family`.
        architectures: its classes in transformers and the `head` that each has, the one without a choice first.
        to_hf: content of config.json for a config; may drop what the family cannot express (`registry.to_hf` checks).
        from_hf: the config of a config.json; UserError for what is not implemented.
        weights: our weight -> names in the model folder, as in `COMMON_WEIGHTS`.
        transposed: those of our weights that are stored (in, out).
        canonical: (config, a stored name) -> the name in `weights` that it is another spelling of, or None for a
            tensor that nothing needs.
        stored: (config, a name in `weights`) -> the name in a folder that is written for this config.
    """

    model_type: str
    architectures: Mapping[str, str]
    to_hf: Callable[[ModelConfig], dict[str, Any]]
    from_hf: Callable[[dict[str, Any]], ModelConfig]
    weights: Mapping[str, tuple[str, ...]]
    transposed: frozenset[str] = frozenset()
    canonical: Callable[[ModelConfig, str], str | None] = _as_stored
    stored: Callable[[ModelConfig, str], str] = lambda config, name: name

    def pieces(self, config: ModelConfig, parameter: str, shape: tuple[int, ...]) -> list[Piece]:
        """Where the rows of one of our parameters are in the model folder.

        Args:
            parameter: name in `Transformer.named_parameters()`, such as layers.3.attention.qkv.weight.
            shape: its shape.
        """
        parts = parameter.split(".")
        layer = parts[1] if parts[0] == "layers" else ""
        pattern = ".".join(["layers", "#", *parts[2:]]) if layer else parameter
        names = self.weights[pattern]
        num_stacks = shape[0] if len(shape) == 3 else 1
        num_rows = shape[-2] if len(shape) == 3 else shape[0]
        if len(names) == 3:
            sizes = [config.query_size, config.key_value_size, config.key_value_size]
        else:
            sizes = [num_rows // len(names)] * len(names)
        assert sum(sizes) == num_rows, (parameter, shape, sizes)
        transposed = pattern in self.transposed
        pieces, start = [], 0
        for stack in range(num_stacks):
            for name, size in zip(names, sizes, strict=True):
                stored = (size,) if len(shape) == 1 else (size, shape[-1])
                if parameter == "patch_embedding.weight":
                    patch = config.patch_size or 0
                    stored = (size, config.num_channels, patch, patch)
                name = name.replace("#", layer).replace("@", str(stack))
                pieces.append(Piece(name, start, start + size, stored[::-1] if transposed else stored, transposed))
                start += size
        return pieces

    def architecture(self, config: ModelConfig) -> str:
        """The class in transformers for the config's head."""
        for name, head in self.architectures.items():
            if head == config.head:
                return name
        raise UserError(
            f"a model folder of family {self.model_type!r} cannot express head = {config.head!r}; "
            f"it has {', '.join(self.architectures)}"
        )

    def head_of(self, values: dict[str, Any]) -> str:
        """The head that a config.json asks for by its architectures.

        Raises:
            UserError: if it is a class that is not implemented.
        """
        named = values.get("architectures") or [next(iter(self.architectures))]
        if not isinstance(named, list):
            raise UserError(f"architectures = {named!r} is not a list of names")
        for name, head in self.architectures.items():
            if name in named:
                return head
        raise UserError(f"architectures = {named!r} is not implemented; expected {' or '.join(self.architectures)}")


def shape_to_hf(config: ModelConfig, eps_key: str = "rms_norm_eps") -> dict[str, Any]:
    """The part of config.json that the families with Llama's keys share."""
    return {
        "model_type": config.family,
        **{key: getattr(config, key) for key in SIZE_KEYS},
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        eps_key: config.norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def whole_heads(config: ModelConfig) -> None:
    """Refuse what the family's config class in transformers refuses, whatever head_dim is."""
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"hidden_size = {config.hidden_size} must be a multiple of num_attention_heads = "
            f"{config.num_attention_heads} in a model folder of family {config.family!r}"
        )


def derived_head_dim(config: ModelConfig) -> None:
    """Refuse a head_dim of its own where the family has none."""
    whole_heads(config)
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise UserError(
            f"head_dim = {config.head_dim} must be hidden_size / num_attention_heads = "
            f"{config.hidden_size // config.num_attention_heads} in a model folder of family {config.family!r}"
        )


def sizes_from_hf(values: dict[str, Any], keys: Mapping[str, str], optional: Mapping[str, str] = {}) -> dict[str, int]:
    """Positive integers of a config.json.

    Args:
        keys: our name -> key that must be there.
        optional: our name -> key that may be absent or null; then it is left out of the result.

    Raises:
        UserError: naming every size that is missing or no positive integer.
    """
    wanted = {ours: values.get(key) for ours, key in keys.items()}
    wanted |= {ours: values[key] for ours, key in optional.items() if values.get(key) is not None}
    names = {**keys, **optional}
    bad = [names[ours] for ours, value in wanted.items() if type(value) is not int or not 0 < value < 2**31]
    if bad:
        listed = ", ".join(f"{key} = {values[key]!r}" if key in values else f"{key} is missing" for key in bad)
        raise UserError(f"{listed}; expected positive integers")
    for ours in wanted.keys() & {"num_hidden_layers", "num_experts"}:
        if (wanted[ours] or 0) > MAX_MODULES:  # each becomes a module before any file is looked at
            raise UserError(f"{names[ours]} = {wanted[ours]}; expected at most {MAX_MODULES}")
    return {ours: int(value) for ours, value in wanted.items() if value is not None}


def shape_from_hf(
    values: dict[str, Any],
    tied: bool,
    head_dim: int | None = None,
    eps: float = 1e-6,
    eps_key: str = "rms_norm_eps",
) -> dict[str, Any]:
    """Settings of `ModelConfig` from the part of config.json that the families with Llama's keys share.

    Args:
        tied: the family's default of tie_word_embeddings.
        head_dim: the family's default; None means hidden_size / num_attention_heads.
        eps: the family's default under `eps_key`.

    Raises:
        UserError: naming every size that is missing or no positive integer.
    """
    same = {key: key for key in SIZE_KEYS}
    sizes = sizes_from_hf(values, same, {key: key for key in ("num_key_value_heads", "head_dim")})
    return {
        "num_key_value_heads": sizes["num_attention_heads"],
        "head_dim": head_dim or sizes["hidden_size"] // sizes["num_attention_heads"],
        **sizes,
        "norm_eps": values.get(eps_key, eps),
        "tie_word_embeddings": values.get("tie_word_embeddings", tied),
    }


def activation_to_hf(config: ModelConfig) -> str:
    """Name of the activation in config.json."""
    return next(name for name, ours in ACTIVATIONS.items() if ours == config.activation)


def activation_from_hf(values: dict[str, Any], key: str, default: str) -> str:
    """Our name of the activation that config.json has under `key`."""
    name = values.get(key)
    name = default if name is None else name
    if name not in list(ACTIVATIONS):
        raise UserError(f"{key} = {name!r} is not implemented; implemented are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def scalar_from_hf(values: dict[str, Any], default: int = 256) -> float:
    """Gemma's query_pre_attn_scalar, whose root divides the scores."""
    scalar = values.get("query_pre_attn_scalar", default)
    if isinstance(scalar, bool) or not isinstance(scalar, int | float) or not 0 < scalar < math.inf:
        raise UserError(f"query_pre_attn_scalar = {scalar!r}; expected a positive number")
    return float(scalar)


def layer_types_from_hf(values: dict[str, Any], default: list[str] | None) -> list[str] | None:
    """layer_types of a config.json, or the family's pattern where it has none.

    Raises:
        UserError: for anything but a list of full_attention and sliding_attention.
    """
    types = values.get("layer_types")
    if types is None:
        return default
    if not isinstance(types, list) or any(kind not in (FULL, SLIDING) for kind in types):
        raise UserError(f"layer_types = {types!r} is not implemented; expected a list of {FULL!r} and {SLIDING!r}")
    return types


def layer_types_to_hf(config: ModelConfig) -> list[str]:
    """layer_types of a config."""
    windows = [config.window_of_layer(layer) for layer in range(config.num_hidden_layers)]
    return [FULL if window is None else SLIDING for window in windows]


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
    refuse_types = [FULL] * values["num_hidden_layers"]
    if values.get("layer_types") not in (None, refuse_types):
        raise UserError(
            f"layer_types = {values['layer_types']!r}: not implemented for model_type {values.get('model_type')!r}"
        )
