"""The architectures of GGUF files, and how their tensors map to those of a Hugging Face model folder.

One table serves both directions. A name on the left is the file's, on the right the model folder's; # stands for the
layer's number and % for the expert's. Which values change on the way is said by the flags of `Architecture`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from lalia.errors import UserError

EMBEDDING, HEAD = "token_embd.weight", "output.weight"

_OUTER = {
    EMBEDDING: "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    HEAD: "lm_head.weight",
}
_ATTENTION = {
    f"blk.#.attn_{ours}.{what}": f"model.layers.#.self_attn.{theirs}_proj.{what}"
    for ours, theirs in {"q": "q", "k": "k", "v": "v", "output": "o"}.items()
    for what in ("weight", "bias")
}
_QK_NORM = {
    "blk.#.attn_q_norm.weight": "model.layers.#.self_attn.q_norm.weight",
    "blk.#.attn_k_norm.weight": "model.layers.#.self_attn.k_norm.weight",
}
_PRE_NORMS = {
    "blk.#.attn_norm.weight": "model.layers.#.input_layernorm.weight",
    "blk.#.ffn_norm.weight": "model.layers.#.post_attention_layernorm.weight",
}
_SANDWICH_NORMS = {
    "blk.#.attn_norm.weight": "model.layers.#.input_layernorm.weight",
    "blk.#.post_attention_norm.weight": "model.layers.#.post_attention_layernorm.weight",
    "blk.#.ffn_norm.weight": "model.layers.#.pre_feedforward_layernorm.weight",
    "blk.#.post_ffw_norm.weight": "model.layers.#.post_feedforward_layernorm.weight",
}
_GATED = {f"blk.#.ffn_{part}.weight": f"model.layers.#.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
_LLAMA = _OUTER | _ATTENTION | _PRE_NORMS | _GATED
_MIXTRAL_EXPERTS = {
    "blk.#.ffn_gate_inp.weight": "model.layers.#.block_sparse_moe.gate.weight",
    "blk.#.ffn_gate_exps.weight": "model.layers.#.block_sparse_moe.experts.%.w1.weight",
    "blk.#.ffn_up_exps.weight": "model.layers.#.block_sparse_moe.experts.%.w3.weight",
    "blk.#.ffn_down_exps.weight": "model.layers.#.block_sparse_moe.experts.%.w2.weight",
}
_QWEN_EXPERTS = {"blk.#.ffn_gate_inp.weight": "model.layers.#.mlp.gate.weight"} | {
    f"blk.#.ffn_{part}_exps.weight": f"model.layers.#.mlp.experts.%.{part}_proj.weight"
    for part in ("gate", "up", "down")
}


def _with_biases(names: Mapping[str, str]) -> dict[str, str]:
    """The table of weights, and the same of biases."""
    biases = {ours.replace(".weight", ".bias"): theirs.replace(".weight", ".bias") for ours, theirs in names.items()}
    return {**names, **biases}


_GPT2 = {
    EMBEDDING: "transformer.wte.weight",
    "position_embd.weight": "transformer.wpe.weight",
    HEAD: "lm_head.weight",
    **_with_biases(
        {
            "output_norm.weight": "transformer.ln_f.weight",
            "blk.#.attn_norm.weight": "transformer.h.#.ln_1.weight",
            "blk.#.attn_qkv.weight": "transformer.h.#.attn.c_attn.weight",
            "blk.#.attn_output.weight": "transformer.h.#.attn.c_proj.weight",
            "blk.#.ffn_norm.weight": "transformer.h.#.ln_2.weight",
            "blk.#.ffn_up.weight": "transformer.h.#.mlp.c_fc.weight",
            "blk.#.ffn_down.weight": "transformer.h.#.mlp.c_proj.weight",
        }
    ),
}
_PHI2 = {
    EMBEDDING: "model.embed_tokens.weight",
    **_with_biases(
        {
            HEAD: "lm_head.weight",
            "output_norm.weight": "model.final_layernorm.weight",
            "blk.#.attn_norm.weight": "model.layers.#.input_layernorm.weight",
            **{f"blk.#.attn_{part}.weight": f"model.layers.#.self_attn.{part}_proj.weight" for part in "qkv"},
            "blk.#.attn_output.weight": "model.layers.#.self_attn.dense.weight",
            "blk.#.ffn_up.weight": "model.layers.#.mlp.fc1.weight",
            "blk.#.ffn_down.weight": "model.layers.#.mlp.fc2.weight",
        }
    ),
}
_BERT = {
    EMBEDDING: "embeddings.word_embeddings.weight",
    "position_embd.weight": "embeddings.position_embeddings.weight",
    "token_types.weight": "embeddings.token_type_embeddings.weight",
    **_with_biases(
        {
            "token_embd_norm.weight": "embeddings.LayerNorm.weight",
            "blk.#.attn_q.weight": "encoder.layer.#.attention.self.query.weight",
            "blk.#.attn_k.weight": "encoder.layer.#.attention.self.key.weight",
            "blk.#.attn_v.weight": "encoder.layer.#.attention.self.value.weight",
            "blk.#.attn_output.weight": "encoder.layer.#.attention.output.dense.weight",
            "blk.#.attn_output_norm.weight": "encoder.layer.#.attention.output.LayerNorm.weight",
            "blk.#.ffn_up.weight": "encoder.layer.#.intermediate.dense.weight",
            "blk.#.ffn_down.weight": "encoder.layer.#.output.dense.weight",
            "blk.#.layer_output_norm.weight": "encoder.layer.#.output.LayerNorm.weight",
        }
    ),
}
_GROK = {
    EMBEDDING: "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.scale",
    HEAD: "lm_head.weight",
    "blk.#.attn_norm.weight": "model.layers.#.pre_attn_norm.scale",
    "blk.#.attn_output_norm.weight": "model.layers.#.post_attn_norm.scale",
    "blk.#.ffn_norm.weight": "model.layers.#.pre_moe_norm.scale",
    "blk.#.layer_output_norm.weight": "model.layers.#.post_moe_norm.scale",
    **{
        f"blk.#.attn_{ours}.weight": f"model.layers.#.attn.{theirs}_proj.weight"
        for ours, theirs in {"q": "q", "k": "k", "v": "v", "output": "o"}.items()
    },
    "blk.#.ffn_gate_inp.weight": "model.layers.#.moe_block.gate.weight",
    "blk.#.ffn_gate_exps.weight": "model.layers.#.moe_block.experts.%.linear.weight",
    "blk.#.ffn_up_exps.weight": "model.layers.#.moe_block.experts.%.linear_v.weight",
    "blk.#.ffn_down_exps.weight": "model.layers.#.moe_block.experts.%.linear_1.weight",
}


@dataclass(frozen=True)
class Architecture:
    """One value of general.architecture.

    Attributes:
        name: that value, and the prefix of the metadata keys.
        model_types: of config.json that this architecture covers.
        tensors: the file's name -> the model folder's.
        interleaved: rotary pairs are neighbours (0, 1), (2, 3) in the file and halves in the model folder, so the
            rows of the query and key weights change places.
        norm_offset: the file holds 1 + w where the model folder holds w (Gemma's norms).
        transposed: names of the file whose matrices the model folder stores [in, out].
    """

    name: str
    model_types: tuple[str, ...]
    tensors: Mapping[str, str]
    interleaved: bool = False
    norm_offset: bool = False
    transposed: frozenset[str] = field(default_factory=frozenset)

    def is_norm(self, name: str) -> bool:
        """Whether a name of the file is a norm's weight."""
        return name.endswith("norm.weight")

    def is_rotated(self, name: str) -> bool:
        """Whether a name of the file is a weight or bias whose rows are rotated in pairs."""
        return re.fullmatch(r"blk\.\d+\.attn_[qk]\.(weight|bias)", name) is not None


ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        Architecture("llama", ("llama", "mistral", "mixtral"), _LLAMA | _MIXTRAL_EXPERTS, interleaved=True),
        Architecture(
            "gpt2",
            ("gpt2",),
            _GPT2,
            transposed=frozenset(f"blk.#.{part}.weight" for part in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")),
        ),
        Architecture("phi2", ("phi",), _PHI2),
        Architecture("gemma", ("gemma",), _LLAMA, norm_offset=True),
        Architecture("gemma2", ("gemma2",), _OUTER | _ATTENTION | _SANDWICH_NORMS | _GATED, norm_offset=True),
        Architecture(
            "gemma3",
            ("gemma3_text",),
            _OUTER | _ATTENTION | _QK_NORM | _SANDWICH_NORMS | _GATED,
            norm_offset=True,
        ),
        Architecture("qwen2", ("qwen2",), _LLAMA),
        Architecture("qwen3", ("qwen3",), _LLAMA | _QK_NORM),
        Architecture("qwen3moe", ("qwen3_moe",), _OUTER | _ATTENTION | _QK_NORM | _PRE_NORMS | _GATED | _QWEN_EXPERTS),
        Architecture("bert", ("bert",), _BERT),
        Architecture("grok", ("grok-1",), _GROK),
    )
}

SYNONYMS = {"blk.#.post_ffw_norm.weight": "blk.#.layer_output_norm.weight"}
"""Other names of the same tensor, for the architectures that do not use them otherwise (Grok)."""

IGNORED = frozenset({"rope_freqs.weight", "blk.#.attn_rot_embd.weight", "blk.#.rope_freqs.weight"})
"""Tensors that are no weights: `config_values` reads the first, the others repeat what the metadata says."""


def pattern(name: str) -> tuple[str, int | None]:
    """A name of the file with # for the layer's number, and that number."""
    match = re.fullmatch(r"blk\.(0|[1-9]\d{0,5})\.(.+)", name)
    return (f"blk.#.{match[2]}", int(match[1])) if match else (name, None)


def known_architecture(name: object) -> Architecture:
    """The architecture of this name.

    Raises:
        UserError: naming it and those that are known.
    """
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UserError(f"general.architecture = {name!r} is not implemented; known are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def architecture_of_model_type(model_type: object) -> Architecture:
    """The architecture that covers a model_type of config.json.

    Raises:
        UserError: naming it and those that have one.
    """
    for architecture in ARCHITECTURES.values():
        if model_type in architecture.model_types:
            return architecture
    known = [name for architecture in ARCHITECTURES.values() for name in architecture.model_types]
    raise UserError(
        f"model_type = {model_type!r} has no GGUF architecture in llama.cpp, so no GGUF file can be made of it; "
        f"those that have are {', '.join(known)}"
    )
