"""The known families, and config.json to and from `ModelConfig` through them."""

import math
from typing import Any

from lalia.errors import UserError
from lalia.model.config import ModelConfig
from lalia.model.families import gemma3_text, llama, nanochat, qwen3
from lalia.model.families.family import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (llama.FAMILY, qwen3.FAMILY, gemma3_text.FAMILY, nanochat.FAMILY)
}


def from_hf(values: dict[str, Any]) -> ModelConfig:
    """The config that the content of a config.json describes.

    Raises:
        UserError: for an unknown model_type, for code to run (auto_map), and for anything the family does not
            implement, by name.
    """
    if values.get("auto_map"):
        raise UserError(
            f"auto_map = {values['auto_map']!r} asks to run code from the model folder, which Lalia never does; use a "
            f"model of a known type: {', '.join(FAMILIES)}"
        )
    model_type = values.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise UserError(f"model_type = {model_type!r} is not implemented; known types are {', '.join(FAMILIES)}")
    architectures = values.get("architectures") or [family.architecture]
    if family.architecture not in architectures:
        raise UserError(f"architectures = {architectures!r} is not implemented; expected {family.architecture}")
    return family.from_hf(values)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Content of config.json for `config`. Worth calling before training, so that saving cannot fail.

    Raises:
        UserError: naming the settings that the family's config.json cannot express, and what they would become.
    """
    family = FAMILIES[config.family]
    values = family.to_hf(config)
    before, after = _meaning(config), _meaning(family.from_hf(values))
    lost = [key for key in before if not _same(before[key], after[key])]
    if lost:
        listed = ", ".join(f"{key} = {before[key]!r} (would become {after[key]!r})" for key in lost)
        raise UserError(f"a model folder of family {config.family!r} cannot express {listed}; choose another family")
    return values


def _meaning(config: ModelConfig) -> dict[str, Any]:
    """The config with its defaults filled in, so that two ways to say the same compare equal."""
    values = config.model_dump(exclude={"sliding_window", "full_attention_every", "rope_theta_local", "rope_theta"})
    values["attention_scale"] = config.attention_scale or config.head_dim**-0.5
    windows = [config.window_of_layer(layer) for layer in range(config.num_hidden_layers)]
    local = config.rope_theta if config.rope_theta_local is None else config.rope_theta_local
    values["window of each layer"] = windows
    values["rope_theta of each layer"] = [config.rope_theta if window is None else local for window in windows]
    return values


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-9)
    return one == other
