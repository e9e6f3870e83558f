"""Tiny transformers models with random weights, as the outside reference of the model folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lalia.formats.hf_folder import load_model
from lalia.model.transformer import Transformer

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not 48 / 4
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,  # not the default, and large enough to be seen
    "attn_implementation": "eager",
}
SPECIFIC: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "tie_word_embeddings": True},
    "qwen3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": False},
    "gemma3_text": {
        "query_pre_attn_scalar": 24,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "final_logit_softcapping": 20.0,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "nanochat": {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None},
}
SEQUENCE_LENGTH = 40  # five times gemma3_text's window


def make_reference(family: str, **changes: Any) -> Any:
    """A transformers model in which nothing is at a value that would hide a mistake."""
    config = transformers.AutoConfig.for_model(family, **{**SHAPE, **SPECIFIC[family], **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.dim() == 1:  # norms scale by about 0.6 in every family; Gemma's by 1 + weight
            weight.data.copy_((-0.4 if family == "gemma3_text" else 0.6) + 0.2 * noise)
        elif "embed_tokens" in name:
            weight.data.copy_(0.2 * noise)
        else:
            weight.data.copy_(1.5 * noise * weight.shape[1] ** -0.5)
    return model


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    """(2, SEQUENCE_LENGTH) token ids."""
    return torch.randint(0, SHAPE["vocab_size"], (2, SEQUENCE_LENGTH), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """family -> the transformers model and the folder that its save_pretrained wrote."""
    made: dict[str, tuple[Any, Path]] = {}

    def get(family: str) -> tuple[Any, Path]:
        if family not in made:
            model, folder = make_reference(family), tmp_path_factory.mktemp(family)
            model.save_pretrained(folder)
            made[family] = model, folder
        return made[family]

    return get


@pytest.fixture(scope="session")
def loaded(reference: Callable[[str], tuple[Any, Path]]) -> Callable[[str], Transformer]:
    """family -> our model of the reference's folder. Shared: do not change it."""
    made: dict[str, Transformer] = {}

    def get(family: str) -> Transformer:
        if family not in made:
            made[family] = load_model(reference(family)[1])
        return made[family]

    return get
