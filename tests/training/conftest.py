"""A model and batches small enough to train in a test."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lalia.data.loader import Batch
from lalia.model.config import ModelConfig
from lalia.model.transformer import Transformer
from lalia.progress import Progress
from lalia.training.config import LoopConfig, OptimizerConfig
from lalia.training.objectives import next_token
from lalia.training.trainer import Trainer, initialize

VOCAB = 61


def tiny_model(seed: int = 0, **changes: Any) -> Transformer:
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 64,
        "max_position_embeddings": 32,
        "qk_norm": "before_rope",
    }
    model = Transformer(ModelConfig.parse(values | changes))
    initialize(model, seed)
    return model


class RandomBatches:
    """Seeded random tokens with a random share of targets masked out."""

    def __init__(self, rows: int = 6, length: int = 16, masked: float = 0.3) -> None:
        self.rows, self.length, self.masked = rows, length, masked

    def batch(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, VOCAB, (self.rows, self.length + 1), generator=generator)
        targets = tokens[:, 1:].clone()
        targets[torch.rand(targets.shape, generator=generator) < self.masked] = -100
        targets[0] = -100  # a row that counts far less than the others
        targets[0, 0] = tokens[0, 1]
        return Batch(
            tokens=tokens[:, :-1],
            targets=targets,
            document_ids=torch.zeros(self.rows, self.length, dtype=torch.int32),
            positions=torch.arange(self.length).expand(self.rows, -1),
            single_document=True,
            num_targets=int((targets != -100).sum()),
            num_bytes=None,
        )


def make_trainer(folder: Path, steps: int = 12, **changes: Any) -> Trainer:
    """A Trainer; changes whose names are settings of the loop go there."""
    loop = {name: changes.pop(name) for name in list(changes) if name in LoopConfig.model_fields}
    values: dict[str, Any] = {
        "model": tiny_model(),
        "batches": RandomBatches(),
        "objective": next_token,
        "num_steps": steps,
        "optimizer": OptimizerConfig(),
        "folder": folder,
        "run_fingerprint": "test",
        "progress": Progress(folder / "metrics.jsonl", quiet=True),
        "loop": LoopConfig(**loop),
    }
    return Trainer(**(values | changes))


@pytest.fixture
def trained(tmp_path: Path) -> dict[str, torch.Tensor]:
    """Weights after an uninterrupted run."""
    folder = tmp_path / "uninterrupted"
    folder.mkdir()
    trainer = make_trainer(folder)
    trainer.train()
    return {key: value.clone() for key, value in trainer.model.state_dict().items()}
