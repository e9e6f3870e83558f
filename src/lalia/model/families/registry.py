"""The known families, and config.json to and from `ModelConfig` through them."""

import math
from typing import Any

from lalia.errors import UserError
from lalia.model.config import ModelConfig
from lalia.model.families import (
    bert,
    clip,
    distilbert,
    gemma,
    gemma2,
    gemma3_text,
    gpt2,
    grok,
    llama,
    mistral,
    mixtral,
    nanochat,
    phi,
    qwen2,
    qwen3,
    qwen3_moe,
)
from lalia.model.families.family import Family

_MODULES = (gpt2, llama, mistral, mixtral, grok, phi, gemma, gemma2, gemma3_text, qwen2, qwen3, qwen3_moe, nanochat)
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (*(module.FAMILY for module in (*_MODULES, bert, distilbert)), *clip.FAMILIES)
}


def from_hf(values: dict[str, Any], part: str | None = None) -> ModelConfig:
    """The config that the content of a config.json describes.

    Args:
        part: "text" or "vision", the tower of a whole CLIP model.

    Raises:
        UserError: for an unknown model_type, for code to run (auto_map), and for anything the family does not
            implement, by name.
    """
    model_type = values.get("model_type")
    if values.get("auto_map"):
        raise UserError(
            f"auto_map = {values['auto_map']!r} asks to run code from the model folder, which Lalia never does; use a "
            f"model of a known type: {', '.join(FAMILIES)}"
        )
    if model_type == "clip":
        if part not in ("text", "vision"):
            raise UserError(f"model_type = 'clip' holds two towers; part = {part!r}, expected 'text' or 'vision'")
        return from_hf(clip.tower(values, part))
    if model_type == "gemma3" and isinstance(values.get("text_config"), dict):
        raise UserError(
            "model_type = 'gemma3' is a multimodal folder; Lalia reads its text model saved by itself "
            "(model_type 'gemma3_text', architecture Gemma3ForCausalLM)"
        )
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise UserError(f"model_type = {model_type!r} is not implemented; known types are {', '.join(FAMILIES)}")
    family.head_of(values)
    return family.from_hf(values)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Content of config.json for `config`. Worth calling before training, so that saving cannot fail.

    Raises:
        UserError: naming the settings that the family's config.json cannot express, and what they would become.
    """
    family = FAMILIES[config.family]
    values = {"architectures": [family.architecture(config)], **family.to_hf(config)}
    before, after = _meaning(config), _meaning(family.from_hf(values))
    lost = [key for key in before if key in after and not _same(before[key], after[key])]
    if lost:
        listed = ", ".join(f"{key} = {before[key]!r} (would become {after[key]!r})" for key in lost)
        raise UserError(f"a model folder of family {config.family!r} cannot express {listed}; choose another family")
    return values


def _meaning(config: ModelConfig) -> dict[str, Any]:
    """The config with its defaults filled in, so that two ways to say the same compare equal."""
    values = config.model_dump(
        exclude={"sliding_window", "layer_types", "rope_theta_local", "rope_theta", "rope_scaling"}
    )
    values["attention_scale"] = config.attention_scale or config.head_dim**-0.5
    layers = range(config.num_hidden_layers)
    values["window of each layer"] = [config.window_of_layer(layer) for layer in layers]
    if config.positions == "rope":
        values["rope of each layer"] = [config.rope_of_layer(layer) for layer in layers]
    if config.num_experts:
        values["expert_size"] = config.expert_size or config.intermediate_size
    else:
        del values["router_aux_loss_coef"], values["router_z_loss_coef"]
    return values


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-9)
    return one == other
