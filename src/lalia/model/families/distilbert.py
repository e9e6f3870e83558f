"""DistilBERT: BERT with half the layers, without segments and without a pooler."""

from typing import Any

from lalia.model.config import ModelConfig
from lalia.model.families.bert import ENCODER, both, labels_from_hf, labels_to_hf
from lalia.model.families.family import (
    Family,
    activation_from_hf,
    activation_to_hf,
    derived_head_dim,
    refuse,
    sizes_from_hf,
)

SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "max_position_embeddings": "max_position_embeddings",
}
EPS = 1e-12
"""A constant of the architecture; no key of config.json says it."""


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Content of config.json."""
    derived_head_dim(config)
    return {
        "model_type": config.family,
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
        "activation": activation_to_hf(config),
        "sinusoidal_pos_embds": False,
        "tie_word_embeddings": config.tie_word_embeddings,
        **labels_to_hf(config),
    }


def from_hf(values: dict[str, Any]) -> ModelConfig:
    """Config of a config.json; UserError names what is not implemented."""
    # Sinusoidal positions are stored like learned ones, so that key changes nothing here.
    refuse(values, problem_type="single_label_classification", tie_word_embeddings=True)
    head = FAMILY.head_of(values)
    sizes = sizes_from_hf(values, SIZES)
    settings = {
        "family": FAMILY.model_type,
        **sizes,
        **ENCODER,
        "num_key_value_heads": sizes["num_attention_heads"],
        "head_dim": sizes["hidden_size"] // sizes["num_attention_heads"],
        "norm_eps": EPS,
        "activation": activation_from_hf(values, "activation", "gelu"),
        "head": head,
        "head_bias": head == "language_model",
        "head_transform": head == "language_model",
        "pooler": "relu" if head == "classifier" else "none",
        "labels": labels_from_hf(values) if head == "classifier" else (),
    }
    return ModelConfig.parse(settings, "model")


LAYER = "distilbert.transformer.layer.#"
WEIGHTS = {
    "embedding.weight": ("distilbert.embeddings.word_embeddings.weight",),
    "position_embedding.weight": ("distilbert.embeddings.position_embeddings.weight",),
    **both("embedding_norm", "distilbert.embeddings.LayerNorm"),
    **{
        f"layers.#.attention.qkv.{part}": tuple(f"{LAYER}.attention.{name}_lin.{part}" for name in "qkv")
        for part in ("weight", "bias")
    },
    **both("layers.#.attention.output", f"{LAYER}.attention.out_lin"),
    **both("layers.#.attention_norm", f"{LAYER}.sa_layer_norm"),
    **both("layers.#.feed_forward.up", f"{LAYER}.ffn.lin1"),
    **both("layers.#.feed_forward.down", f"{LAYER}.ffn.lin2"),
    **both("layers.#.feed_forward_norm", f"{LAYER}.output_layer_norm"),
    **both("pooler", "pre_classifier"),
    **both("head_transform", "vocab_transform"),
    **both("head_norm", "vocab_layer_norm"),
    "head_bias": ("vocab_projector.bias",),
    **both("classifier", "classifier"),
}
HEADS = {
    "language_model": ("vocab_transform.", "vocab_layer_norm.", "vocab_projector."),
    "classifier": ("pre_classifier.", "classifier."),
}


def _canonical(config: ModelConfig, name: str) -> str | None:
    """Files of one head are read for another: the other's weights are left out."""
    if name in ("vocab_projector.weight", "distilbert.embeddings.position_ids", "embeddings.position_ids"):
        return None
    for head, prefixes in HEADS.items():
        if name.startswith(prefixes):
            return name if config.head == head else None
    return name if name.startswith("distilbert.") else f"distilbert.{name}"


def _stored(config: ModelConfig, name: str) -> str:
    return name.removeprefix("distilbert.") if config.head == "none" else name


FAMILY = Family(
    "distilbert",
    {
        "DistilBertForMaskedLM": "language_model",
        "DistilBertModel": "none",
        "DistilBertForSequenceClassification": "classifier",
    },
    to_hf,
    from_hf,
    WEIGHTS,
    canonical=_canonical,
    stored=_stored,
)
