"""From the content of a config.json to the metadata of a GGUF file: `config_in` the other way round."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lalia.errors import UserError
from lalia.formats.gguf.architectures import Architecture
from lalia.formats.gguf.config_in import FULL, SLIDING, llama3_divisors

GPT2_SPELLING = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "n_inner": "intermediate_size",
    "layer_norm_epsilon": "layer_norm_eps",
}


def config_metadata(values: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """Metadata of a config.json, under full keys.

    What an architecture cannot say is left out here; the caller reads the metadata back and compares.

    Args:
        values: as `registry.to_hf` writes them, so that nothing is left to a default.
    """
    values = {GPT2_SPELLING.get(key, key): value for key, value in values.items()}
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    head_dim = values.get("head_dim") or hidden // heads
    keys: dict[str, Any] = {
        "vocab_size": values["vocab_size"],
        "context_length": values["max_position_embeddings"],
        "embedding_length": hidden,
        "block_count": values["num_hidden_layers"],
        "feed_forward_length": values["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": values.get("num_key_value_heads") or heads,
    }
    if "rms_norm_eps" in values:
        keys |= {
            "attention.layer_norm_rms_epsilon": float(values["rms_norm_eps"]),
            "attention.key_length": head_dim,
            "attention.value_length": head_dim,
        }
    else:
        keys["attention.layer_norm_epsilon"] = float(values["layer_norm_eps"])
    rope = values.get("rope_parameters")
    if rope:
        if SLIDING in rope:  # by layer type
            keys["rope.freq_base_swa"] = float(rope[SLIDING]["rope_theta"])
            rope = rope[FULL]
        fraction = rope.get("partial_rotary_factor", values.get("partial_rotary_factor")) or 1.0
        keys |= {"rope.dimension_count": int(head_dim * fraction), "rope.freq_base": float(rope["rope_theta"])}
        keys |= _scaling(rope)
    experts = values.get("num_local_experts") or values.get("num_experts")
    if experts:
        keys |= {"expert_count": experts, "expert_used_count": values["num_experts_per_tok"]}
        if "moe_intermediate_size" in values:
            keys["expert_feed_forward_length"] = values["moe_intermediate_size"]
    if values.get("sliding_window") and values.get("use_sliding_window", True):
        keys["attention.sliding_window"] = values["sliding_window"]
        types = values.get("layer_types") or []
        if architecture.name == "gemma3" and FULL in types:
            keys["attention.sliding_window_pattern"] = types.index(FULL) + 1
    for theirs, ours in (
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
        ("max_attn_value", "attn_logit_softcapping"),
        ("embedding_multiplier_scale", "embedding_scale"),
        ("output_multiplier_scale", "logit_scale"),
    ):
        if values.get(theirs):
            keys[ours] = float(values[theirs])
    if architecture.name == "grok":
        keys["attention.output_scale"] = head_dim**-0.5
    if architecture.name == "bert":
        keys |= {"attention.causal": False, "pooling_type": 1}  # mean; 2 would be the first token
    return {f"{architecture.name}.{key}": value for key, value in keys.items()}


def _scaling(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of linear scaling and of YaRN; llama3's is a tensor (`rope_divisors`)."""
    kind = rope.get("rope_type", "default")
    if kind not in ("linear", "yarn"):
        return {}
    factor = float(rope["factor"])
    keys: dict[str, Any] = {"rope.scaling.type": kind, "rope.scaling.factor": factor}
    if kind == "yarn":
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        natural = 0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0
        attention = rope.get("attention_factor")
        if attention is not None and not math.isclose(attention, natural, rel_tol=1e-6):
            keys["rope.scaling.attn_factor"] = attention / natural
        for key in ("beta_fast", "beta_slow"):
            if rope.get(key) is not None:
                keys[f"rope.scaling.yarn_{key}"] = float(rope[key])
    return keys


def rope_divisors(values: Mapping[str, Any], architecture: Architecture) -> np.ndarray | None:
    """The tensor rope_freqs.weight, float32 (head_dim / 2,), None where nothing is scaled by llama3's rule.

    Raises:
        UserError: if the architecture has no such tensor.
    """
    rope = values.get("rope_parameters") or {}
    if rope.get("rope_type") != "llama3":
        return None
    if architecture.name != "llama":
        raise UserError(f"llama3 rope scaling cannot be said in a GGUF file of architecture {architecture.name!r}")
    return llama3_divisors(
        values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"],
        rope["rope_theta"],
        rope["factor"],
        rope["low_freq_factor"],
        rope["high_freq_factor"],
        rope["original_max_position_embeddings"],
    ).astype(np.float32)
