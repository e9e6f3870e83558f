"""BERT: bidirectional, norms behind the sums, learned positions and segments, erf GELU; sentence encoders too."""

import re
from typing import Any

from lalia.errors import UserError
from lalia.model.config import ModelConfig
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
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
}
ENCODER: dict[str, Any] = {
    "norm": "layer",
    "norm_order": "post",
    "embedding_norm": True,
    "qkv_bias": True,
    "attention_output_bias": True,
    "feed_forward_bias": True,
    "causal": False,
    "positions": "learned",
    "gated": False,
}
"""Switches of BERT and DistilBERT alike."""


def labels_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The classes of a classifier."""
    if config.head != "classifier":
        return {}
    return {
        "id2label": {str(number): label for number, label in enumerate(config.labels)},
        "label2id": {label: number for number, label in enumerate(config.labels)},
        "problem_type": "single_label_classification",
    }


def labels_from_hf(values: dict[str, Any]) -> tuple[str, ...]:
    """Names of the classes, in order; id2label has them, or num_labels their number (two by default).

    Raises:
        UserError: if id2label does not number its labels 0, 1, 2, ...
    """
    names = values.get("id2label")
    if names is None:
        count = values.get("num_labels", values.get("_num_labels", 2))
        if type(count) is not int or not 2 <= count <= 100_000:
            raise UserError(f"num_labels = {count!r}; expected an integer from 2 to 100000")
        return tuple(f"LABEL_{number}" for number in range(count))
    if not isinstance(names, dict) or sorted(map(str, names)) != sorted(map(str, range(len(names)))):
        raise UserError(f"id2label = {names!r}; expected an object that numbers its labels 0, 1, 2, ...")
    numbered = {int(number): str(label) for number, label in names.items()}
    return tuple(numbered[number] for number in range(len(numbered)))


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Content of config.json."""
    derived_head_dim(config)
    return {
        "model_type": config.family,
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
        "type_vocab_size": config.type_vocab_size,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": activation_to_hf(config),
        "tie_word_embeddings": config.tie_word_embeddings,
        **labels_to_hf(config),
    }


def from_hf(values: dict[str, Any]) -> ModelConfig:
    """Config of a config.json; UserError names what is not implemented."""
    refuse(
        values,
        is_decoder=False,
        add_cross_attention=False,
        position_embedding_type="absolute",
        problem_type="single_label_classification",
        tie_word_embeddings=True,
    )
    head = FAMILY.head_of(values)
    sizes = sizes_from_hf({"type_vocab_size": 2, **values}, SIZES | {"type_vocab_size": "type_vocab_size"})
    settings = {
        "family": FAMILY.model_type,
        **sizes,
        **ENCODER,
        "num_key_value_heads": sizes["num_attention_heads"],
        "head_dim": sizes["hidden_size"] // sizes["num_attention_heads"],
        "norm_eps": values.get("layer_norm_eps", 1e-12),
        "activation": activation_from_hf(values, "hidden_act", "gelu"),
        "head": head,
        "head_bias": head == "language_model",
        "head_transform": head == "language_model",
        "pooler": "none" if head == "language_model" else "tanh",
        "labels": labels_from_hf(values) if head == "classifier" else (),
    }
    return ModelConfig.parse(settings, "model")


def both(ours: str, theirs: str) -> dict[str, tuple[str, ...]]:
    """Weight and bias of a layer that has both."""
    return {f"{ours}.{part}": (f"{theirs}.{part}",) for part in ("weight", "bias")}


LAYER = "bert.encoder.layer.#"
WEIGHTS = {
    "embedding.weight": ("bert.embeddings.word_embeddings.weight",),
    "position_embedding.weight": ("bert.embeddings.position_embeddings.weight",),
    "type_embedding.weight": ("bert.embeddings.token_type_embeddings.weight",),
    **both("embedding_norm", "bert.embeddings.LayerNorm"),
    **{
        f"layers.#.attention.qkv.{part}": tuple(
            f"{LAYER}.attention.self.{name}.{part}" for name in ("query", "key", "value")
        )
        for part in ("weight", "bias")
    },
    **both("layers.#.attention.output", f"{LAYER}.attention.output.dense"),
    **both("layers.#.attention_norm", f"{LAYER}.attention.output.LayerNorm"),
    **both("layers.#.feed_forward.up", f"{LAYER}.intermediate.dense"),
    **both("layers.#.feed_forward.down", f"{LAYER}.output.dense"),
    **both("layers.#.feed_forward_norm", f"{LAYER}.output.LayerNorm"),
    **both("pooler", "bert.pooler.dense"),
    **both("head_transform", "cls.predictions.transform.dense"),
    **both("head_norm", "cls.predictions.transform.LayerNorm"),
    "head_bias": ("cls.predictions.bias",),
    **both("classifier", "classifier"),
}


def _canonical(config: ModelConfig, name: str) -> str | None:
    """Old files say gamma and beta; pretraining files carry heads that the model at hand does not have."""
    name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))
    if not name.startswith(("bert.", "cls.", "classifier.")):
        name = f"bert.{name}"
    if name in ("bert.embeddings.position_ids", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"):
        return None
    if name.startswith("cls.seq_relationship."):
        return None
    if name.startswith("cls.") and config.head != "language_model":
        return None
    return None if name.startswith("bert.pooler.") and config.pooler == "none" else name


def _stored(config: ModelConfig, name: str) -> str:
    return name.removeprefix("bert.") if config.head == "none" else name


FAMILY = Family(
    "bert",
    {
        "BertForMaskedLM": "language_model",
        "BertForPreTraining": "language_model",
        "BertModel": "none",
        "BertForSequenceClassification": "classifier",
    },
    to_hf,
    from_hf,
    WEIGHTS,
    canonical=_canonical,
    stored=_stored,
)
