"""A step asks the device for nothing. The device here is PyTorch's "meta", whose tensors have no values: whatever would
make the host wait, a value or a size that depends on values, raises."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lalia.data.loader import PADDING
from lalia.model.transformer import Transformer
from lalia.training.objectives import Metrics, next_token, router_loss
from lalia.training.parallel.world import World
from tests.training.conftest import RandomBatches, make_trainer, tiny_model


def step(folder: Path, **changes: Any) -> torch.Tensor:
    """Two steps of two micro-batches each; the sum of their losses."""
    world = World.alone("meta")
    trainer = make_trainer(folder, 20, model=tiny_model().to("meta"), world=world, micro_batch_size=3, **changes)
    for number in range(2):
        trainer._train_step(trainer._prepared(number))
        trainer.step += 1
    return trainer._sums["loss"]


@pytest.mark.parametrize(
    "settings",
    [{}, {"average_decay": 0.9}, {"dropout": 0.1}, {"activation_checkpointing": "full"}, {"spike_deviations": 0.0}],
)
def test_a_step_waits_for_nothing(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert step(tmp_path, **settings).is_meta


def test_an_objective_that_looks_at_its_loss_is_noticed(tmp_path: Path) -> None:
    """Negative control."""

    def looking(model: Transformer, batch: Any) -> tuple[torch.Tensor, torch.Tensor, Metrics]:
        loss, weight, metrics = next_token(model, batch)
        return loss * (1.0 if loss.item() > 0 else 0.0), weight, metrics

    with pytest.raises(RuntimeError, match="meta"):
        step(tmp_path, objective=looking)


def test_router_losses_wait_for_nothing() -> None:
    model = tiny_model(family="qwen3_moe", num_experts=4, num_experts_per_token=2, router_aux_loss_coef=0.1)
    logits = [torch.zeros(96, 4, device="meta", requires_grad=True)]
    kept = (RandomBatches().batch(0).document_ids != PADDING).to("meta")
    router_loss(model, logits, kept).backward()
    assert logits[0].grad is not None
    with pytest.raises((RuntimeError, NotImplementedError)):
        kept.reshape(-1).nonzero()  # what it did before
