"""GPT-2: learned positions, LayerNorm, biases, one fused projection, and every matrix stored (in, out)."""

import re
from typing import Any

from lalia.errors import UserError
from lalia.model.config import ModelConfig
from lalia.model.families.family import (
    Family,
    activation_from_hf,
    derived_head_dim,
    refuse,
    sizes_from_hf,
)

SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
}


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Content of config.json."""
    derived_head_dim(config)
    if config.activation != "gelu_tanh":
        raise UserError(f"activation = {config.activation!r}: a GPT-2 folder is written with 'gelu_tanh' only")
    return {
        "model_type": config.family,
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
        "n_inner": config.intermediate_size,
        "n_positions": config.max_position_embeddings,
        "n_ctx": config.max_position_embeddings,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": "gelu_new",
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def from_hf(values: dict[str, Any]) -> ModelConfig:
    """Config of a config.json; UserError names what is not implemented."""
    refuse(
        values,
        scale_attn_by_inverse_layer_idx=False,
        reorder_and_upcast_attn=False,
        add_cross_attention=False,
        scale_attn_weights=True,
    )
    positions = "n_positions" if values.get("n_positions") is not None else "n_ctx"
    sizes = sizes_from_hf(values, SIZES | {"max_position_embeddings": positions}, {"intermediate_size": "n_inner"})
    settings = {
        "family": FAMILY.model_type,
        "intermediate_size": 4 * sizes["hidden_size"],
        **sizes,
        "num_key_value_heads": sizes["num_attention_heads"],
        "head_dim": sizes["hidden_size"] // sizes["num_attention_heads"],
        "tie_word_embeddings": values.get("tie_word_embeddings", True),
        "norm": "layer",
        "norm_eps": values.get("layer_norm_epsilon", 1e-5),
        "positions": "learned",
        "qkv_bias": True,
        "attention_output_bias": True,
        "feed_forward_bias": True,
        "gated": False,
        "activation": activation_from_hf(values, "activation_function", "gelu_new"),
    }
    return ModelConfig.parse(settings, "model")


_LINEARS = {"attention.qkv": "attn.c_attn", "attention.output": "attn.c_proj"}
_LINEARS |= {"feed_forward.up": "mlp.c_fc", "feed_forward.down": "mlp.c_proj"}
_NORMS = {"attention_norm": "ln_1", "feed_forward_norm": "ln_2"}
WEIGHTS = {
    "embedding.weight": ("transformer.wte.weight",),
    "position_embedding.weight": ("transformer.wpe.weight",),
    **{
        f"layers.#.{ours}.{part}": (f"transformer.h.#.{theirs}.{part}",)
        for ours, theirs in (_LINEARS | _NORMS).items()
        for part in ("weight", "bias")
    },
    **{f"norm.{part}": (f"transformer.ln_f.{part}",) for part in ("weight", "bias")},
    "head.weight": ("lm_head.weight",),
}
TRANSPOSED = frozenset(f"layers.#.{name}.weight" for name in _LINEARS)


def _canonical(config: ModelConfig, name: str) -> str | None:
    """Files of 2019 lack the prefix and carry the causal mask as a buffer."""
    if re.search(r"\.attn\.(bias|masked_bias)$", name):
        return None
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"


FAMILY = Family(
    "gpt2",
    {"GPT2LMHeadModel": "language_model"},
    to_hf,
    from_hf,
    WEIGHTS,
    transposed=TRANSPOSED,
    canonical=_canonical,
)
