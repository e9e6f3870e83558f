"""Lalia's own training step on random tokens: that of the Trainer, without its log and checkpoints."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lalia.data.loader import Batch
from lalia.model.transformer import Transformer
from lalia.progress import Progress
from lalia.training.config import LoopConfig, OptimizerConfig
from lalia.training.objectives import next_token
from lalia.training.parallel.world import World
from lalia.training.trainer import Trainer

SCHEDULE_STEPS = 2000
"""Of the learning rates: more than are made here."""


class Pool:
    """Batches that come again and again, one text per row."""

    def __init__(self, tokens: Sequence[Tensor]) -> None:
        """tokens: of each batch, (rows, length + 1)."""
        self.tokens = tokens

    def batch(self, step: int) -> Batch:
        tokens = self.tokens[step % len(self.tokens)]
        rows, length = tokens.shape[0], tokens.shape[1] - 1
        return Batch(
            tokens=tokens[:, :-1].contiguous(),
            targets=tokens[:, 1:].contiguous(),
            document_ids=torch.zeros(rows, length, dtype=torch.int32),
            positions=torch.arange(length).expand(rows, -1),
            single_document=True,
            num_targets=rows * length,
            num_bytes=None,
        )


def make_step(
    model: Transformer, tokens: Sequence[Tensor], loop: LoopConfig, world: World | None = None
) -> Callable[[int], Tensor]:
    """A function of the step's number that trains on its batch and gives the mean loss, without waiting for it."""
    pool = Pool(tokens)
    trainer = Trainer(
        model=model.train(),
        batches=pool,
        objective=next_token,
        num_steps=SCHEDULE_STEPS,
        optimizer=OptimizerConfig(),
        folder=Path(tempfile.mkdtemp()),
        run_fingerprint="",
        progress=Progress(quiet=True),
        loop=loop,
        world=world,
    )

    def step(number: int) -> Tensor:
        trainer._train_step(trainer._prepared(number))
        trainer.step += 1
        sums, trainer._sums = trainer._sums, {}
        return sums["loss"] / sums["weight"]

    return step
