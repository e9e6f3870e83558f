"""Rotary positions in config.json: the spellings of transformers 4 and 5, and the scalings."""

from typing import Any

from lalia.errors import UserError
from lalia.model.config import ModelConfig, RopeScaling
from lalia.model.rotary import yarn_attention_factor

KINDS = ("default", "linear", "llama3", "yarn")


def rope_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Both spellings: transformers 4 reads rope_theta and rope_scaling, transformers 5 rope_parameters."""
    parameters = parameters_to_hf(config.rope_theta, config.rope_scaling)
    partial = {"partial_rotary_factor": config.rope_fraction} if config.rope_fraction != 1.0 else {}
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else {**scaling, "type": scaling["rope_type"]},
        **partial,
        "rope_parameters": {**parameters, **partial},
    }


def parameters_to_hf(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """rope_parameters as transformers 5 has them."""
    if scaling is None:
        return {"rope_type": "default", "rope_theta": theta}
    keys = {
        "linear": (),
        "llama3": ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
        "yarn": ("original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "truncate"),
    }
    given = {key: getattr(scaling, key) for key in ("factor", *keys[scaling.kind])}
    return {"rope_type": scaling.kind, "rope_theta": theta, **given}


def rope_from_hf(values: dict[str, Any], default_theta: float = 10_000.0, fraction: float = 1.0) -> dict[str, Any]:
    """rope_theta, rope_fraction and rope_scaling of `ModelConfig` from either spelling.

    Args:
        fraction: the family's default of partial_rotary_factor.

    Raises:
        UserError: for a scaling that is not implemented, and for two spellings that disagree.
    """
    scaling, parameters = values.get("rope_scaling"), values.get("rope_parameters")
    theta, part = values.get("rope_theta"), values.get("partial_rotary_factor")
    kinds = []
    for key, rope in (("rope_scaling", scaling), ("rope_parameters", parameters)):
        checked = check_rope(key, rope)
        if rope is not None:
            kinds.append((key, checked.get("rope_type", checked.get("type", "default"))))
        theta = _agreed("rope_theta", theta, key, checked.get("rope_theta"))
        part = _agreed("partial_rotary_factor", part, key, checked.get("partial_rotary_factor"))
    if len({kind for _, kind in kinds}) > 1:
        raise UserError(f"{' but '.join(f'{key} says {kind!r}' for key, kind in kinds)}; make them equal")
    return {
        "rope_theta": default_theta if theta is None else theta,
        "rope_fraction": fraction if part is None else part,
        "rope_scaling": scaling_from_hf(parameters if parameters is not None else scaling, values),
    }


def _agreed(name: str, outer: Any, key: str, inner: Any) -> Any:
    if None not in (outer, inner) and outer != inner:
        raise UserError(f"{name} = {outer} but {key} says {inner}; make them equal")
    return outer if inner is None else inner


def check_rope(key: str, rope: Any) -> dict[str, Any]:
    """The given rope_parameters or rope_scaling, {} for null; UserError for a kind that is not implemented."""
    if rope is None:
        return {}
    if not isinstance(rope, dict):
        raise UserError(f"{key} = {rope!r} is no object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in KINDS:
        raise UserError(f"{key} = {rope!r} is not implemented; implemented are the types {', '.join(KINDS)}")
    return rope


def scaling_from_hf(rope: dict[str, Any] | None, values: dict[str, Any]) -> dict[str, Any] | None:
    """Settings of `RopeScaling`, None where nothing is scaled. `values` is the config.json around it."""
    kind = (rope or {}).get("rope_type", (rope or {}).get("type", "default"))
    if not rope or kind == "default":
        return None
    # A folder may give the original context beside the scaling, or mean the whole context.
    original = rope.get("original_max_position_embeddings", values.get("original_max_position_embeddings"))
    longest = values.get("max_position_embeddings", 0)
    settings: dict[str, Any] = {"kind": kind, "factor": rope.get("factor")}
    if kind == "linear":
        return settings
    settings["original_max_position_embeddings"] = longest if original is None else original
    if kind == "llama3":
        return settings | {key: rope[key] for key in ("low_freq_factor", "high_freq_factor") if key in rope}
    if settings["factor"] is None and isinstance(original, int) and original > 0:
        settings["factor"] = longest / original
    for key in ("beta_fast", "beta_slow", "truncate", "attention_factor"):
        if rope.get(key) is not None:
            settings[key] = rope[key]
    numbers = [settings["factor"], *(rope.get(key) or 0.0 for key in ("mscale", "mscale_all_dim"))]
    if "attention_factor" not in settings and all(type(n) in (int, float) for n in numbers):
        settings["attention_factor"] = yarn_attention_factor(*numbers)
    return settings
