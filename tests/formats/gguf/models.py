"""Tiny random models of transformers, as model folders, with norm weights away from 1 and biases away from 0."""

import copy
import functools
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor

from lalia.model.families import registry

VOCAB = 384
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}
HEAD_DIM = {"head_dim": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-untied": ("Llama", {"tie_word_embeddings": False}),
    "llama-3.1": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "llama-linear": ("Llama", {"rope_parameters": LINEAR}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 8}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt2": ("GPT2", {}),
    "phi": ("Phi", {"num_key_value_heads": 4, "partial_rotary_factor": 0.5}),
    "gemma": ("Gemma", HEAD_DIM),
    "gemma2": ("Gemma2", HEAD_DIM | {"query_pre_attn_scalar": 32, "sliding_window": 8}),
    "gemma3": ("Gemma3Text", HEAD_DIM | {"query_pre_attn_scalar": 32, "sliding_window": 8, "num_hidden_layers": 7}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", HEAD_DIM),
    "qwen3-moe": (
        "Qwen3Moe",
        HEAD_DIM | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True},
    ),
}
"""Name -> the start of transformers' class names, and settings."""


class Case(NamedTuple):
    """A model folder and what transformers computes with it."""

    values: dict[str, Any]
    tensors: dict[str, Tensor]
    reference: Any

    @torch.no_grad()
    def log_probs(self, tokens: list[int]) -> Tensor:
        """Of the token after `tokens`, (vocab_size,)."""
        return torch.log_softmax(self.reference(torch.tensor([tokens])).logits[0, -1].float(), -1)

    def with_half_gelu(self) -> "Case":
        """The same model computing GELU as llama.cpp does on CPUs, by a table from float16 to float16.

        Without this, GELU models differ from llama.cpp by up to 2e-3, which would hide mistakes.
        """
        reference = copy.deepcopy(self.reference)
        for module in reference.modules():
            for attribute in ("act", "act_fn", "activation_fn"):
                if "gelu" in type(getattr(module, attribute, None)).__name__.lower():
                    setattr(module, attribute, _HalfGelu())
        return self._replace(reference=reference)


class _HalfGelu(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        table = F.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, table))


@functools.cache
def tiny(name: str) -> Case:
    """The case of this name; skips the test if the model's family is not among Lalia's."""
    start, settings = CASES[name]
    shape = dict(SHAPE)
    if start == "GPT2":
        shape = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64}
    config = getattr(transformers, f"{start}Config")(**(shape | settings))
    if config.model_type not in registry.FAMILIES:
        pytest.skip(f"Lalia has no family {config.model_type}")
    class_name = f"{start.removesuffix('Text')}{'LMHeadModel' if start == 'GPT2' else 'ForCausalLM'}"
    torch.manual_seed(0)
    reference = getattr(transformers, class_name)(config).eval()
    for parameter_name, parameter in reference.named_parameters():
        parameter.data.normal_(0.0, 0.2)
        if parameter.ndim == 1 and "norm" in parameter_name.lower() + ".ln_" and "bias" not in parameter_name:
            parameter.data += 0.0 if start.startswith("Gemma") else 0.8
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        values = json.loads((Path(folder) / "config.json").read_text())
        tensors = load_file(Path(folder) / "model.safetensors")
    return Case(values, tensors, reference)
