"""Tiny random encoders of transformers, with a WordPiece tokenizer, as folders on disk."""

from pathlib import Path
from typing import Any

import torch
import transformers

from lalia.files import write_json
from lalia.tokenizer.tokenizer import Tokenizer
from lalia.tokenizer.wordpiece import train_wordpiece

TEXTS = [
    "Shall I compare thee to a summer's day?",
    "Thou art more lovely",
    "",
    "rough winds do shake the darling buds of may, and summer's lease hath all too short a date",
    "and every fair from fair sometime declines",
    "day",
    "\u00e9t\u00e9, \u041b\u0435\u0442\u043e \u2665",
]
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 48,
}
DISTIL_SIZES: dict[str, Any] = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 48}
LABELS = {0: "calm", 1: "windy", 2: "dark"}


def make_tokenizer() -> Tokenizer:
    return train_wordpiece(TEXTS * 3, 200)


def make_folder(folder: Path, kind: str, **settings: Any) -> Path:
    """Save a random model of a class of transformers, weights large enough to tell texts apart."""
    tokenizer = make_tokenizer()
    sizes = DISTIL_SIZES if kind.startswith("Distil") else SIZES
    config_class = transformers.DistilBertConfig if kind.startswith("Distil") else transformers.BertConfig
    torch.manual_seed(1)
    config = config_class(vocab_size=tokenizer.vocab_size, **sizes, **settings)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape) * 0.1)
    model.save_pretrained(folder)
    tokenizer.save(folder, max_length=48)
    return folder


def add_modules(folder: Path, pooling: dict[str, Any], normalize: bool, max_length: int | None = 12) -> Path:
    """Make a sentence-transformers folder of a model folder."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": number, "name": str(number), "path": paths[number], "type": f"sentence_transformers.models.{kind}"}
        for number, kind in enumerate(kinds)
    ]
    write_json(folder / "modules.json", modules)
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 32, **pooling})
    if max_length is not None:
        write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    return folder
