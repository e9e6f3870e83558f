"""The towers of CLIP: a causal text encoder and a vision encoder of patches, each projected into one space."""

from typing import Any

from lalia.errors import UserError
from lalia.model.config import ModelConfig
from lalia.model.families.bert import both
from lalia.model.families.family import (
    Family,
    activation_from_hf,
    activation_to_hf,
    derived_head_dim,
    refuse,
    sizes_from_hf,
)

TEXT, VISION = "clip_text_model", "clip_vision_model"
SIZES = {key: key for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
TOWER: dict[str, Any] = {
    "norm": "layer",
    "positions": "learned",
    "qkv_bias": True,
    "attention_output_bias": True,
    "feed_forward_bias": True,
    "gated": False,
    "head": "none",
}


def tower(values: dict[str, Any], part: str) -> dict[str, Any]:
    """The config.json of one tower ("text" or "vision") from that of a whole CLIP model."""
    inner = values.get(f"{part}_config")
    if not isinstance(inner, dict):
        raise UserError(f"{part}_config = {inner!r}; expected an object")
    projection = values.get("projection_dim", 512)
    model_type = {"text": TEXT, "vision": VISION}[part]
    name = {"text": "CLIPTextModelWithProjection", "vision": "CLIPVisionModelWithProjection"}[part]
    return {**inner, "model_type": model_type, "architectures": [name], "projection_dim": projection}


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    derived_head_dim(config)
    shared = {
        "model_type": config.family,
        **{key: getattr(config, key) for key in SIZES},
        "hidden_act": activation_to_hf(config),
        "layer_norm_eps": config.norm_eps,
        "projection_dim": config.projection_size or config.hidden_size,
        "architectures": [_architecture(config)],
    }
    if config.family == TEXT:
        return shared | {
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.max_position_embeddings,
        }
    return shared | {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": config.num_channels,
    }


def _architecture(config: ModelConfig) -> str:
    kind = "Text" if config.family == TEXT else "Vision"
    return f"CLIP{kind}Model" + ("WithProjection" if config.projection_size else "")


def _from_hf(values: dict[str, Any]) -> ModelConfig:
    is_text = values["model_type"] == TEXT
    refuse(values)
    needed = {"vocab_size": "vocab_size"} if is_text else {"image_size": "image_size", "patch_size": "patch_size"}
    optional = {} if is_text else {"num_channels": "num_channels"}
    if is_text:
        needed["max_position_embeddings"] = "max_position_embeddings"
    defaults = {"vocab_size": 49408, "max_position_embeddings": 77, "image_size": 224, "patch_size": 32}
    sizes = sizes_from_hf({**defaults, **values}, SIZES | needed, optional)
    if not is_text:
        sizes["max_position_embeddings"] = (sizes["image_size"] // sizes["patch_size"]) ** 2 + 1
    projected = (values.get("architectures") or [""])[0].endswith("WithProjection")
    projection = sizes_from_hf({"projection_dim": 512, **values}, {"projection_size": "projection_dim"})
    settings = {
        "family": values["model_type"],
        **sizes,
        **TOWER,
        "num_key_value_heads": sizes["num_attention_heads"],
        "head_dim": sizes["hidden_size"] // sizes["num_attention_heads"],
        "norm_eps": values.get("layer_norm_eps", 1e-5),
        "causal": is_text,
        "embedding_norm": not is_text,
        "activation": activation_from_hf(values, "hidden_act", "quick_gelu"),
        **(projection if projected else {}),
    }
    return ModelConfig.parse(settings, "model")


def _weights(model: str) -> dict[str, tuple[str, ...]]:
    layer = f"{model}.encoder.layers.#"
    return {
        **{
            f"layers.#.attention.qkv.{part}": tuple(f"{layer}.self_attn.{name}_proj.{part}" for name in "qkv")
            for part in ("weight", "bias")
        },
        **both("layers.#.attention.output", f"{layer}.self_attn.out_proj"),
        **both("layers.#.attention_norm", f"{layer}.layer_norm1"),
        **both("layers.#.feed_forward_norm", f"{layer}.layer_norm2"),
        **both("layers.#.feed_forward.up", f"{layer}.mlp.fc1"),
        **both("layers.#.feed_forward.down", f"{layer}.mlp.fc2"),
        "position_embedding.weight": (f"{model}.embeddings.position_embedding.weight",),
    }


TEXT_WEIGHTS = {
    **_weights("text_model"),
    "embedding.weight": ("text_model.embeddings.token_embedding.weight",),
    **both("norm", "text_model.final_layer_norm"),
    "projection.weight": ("text_projection.weight",),
}
VISION_WEIGHTS = {
    **_weights("vision_model"),
    "patch_embedding.weight": ("vision_model.embeddings.patch_embedding.weight",),
    "class_embedding": ("vision_model.embeddings.class_embedding",),
    **both("embedding_norm", "vision_model.pre_layrnorm"),  # so spelled since the first release
    **both("norm", "vision_model.post_layernorm"),
    "projection.weight": ("visual_projection.weight",),
}


def _canonical(config: ModelConfig, name: str) -> str | None:
    """The other tower, the temperature and the numbers of the positions are not needed."""
    own, other = ("text", "vision") if config.family == TEXT else ("vision", "text")
    projection = {"text": "text_projection.weight", "vision": "visual_projection.weight"}
    if name.startswith(f"{other}_model.") or name in (projection[other], "logit_scale"):
        return None
    if name.endswith("embeddings.position_ids") or (name == projection[own] and not config.projection_size):
        return None
    return name if name.startswith(f"{own}_model.") or name == projection[own] else f"{own}_model.{name}"


FAMILIES = [
    Family(
        TEXT,
        {"CLIPTextModelWithProjection": "none", "CLIPTextModel": "none"},
        _to_hf,
        _from_hf,
        TEXT_WEIGHTS,
        canonical=_canonical,
    ),
    Family(
        VISION,
        {"CLIPVisionModelWithProjection": "none", "CLIPVisionModel": "none"},
        _to_hf,
        _from_hf,
        VISION_WEIGHTS,
        canonical=_canonical,
    ),
]
