"""The loop: micro-batches equal one batch, resuming equals never stopping, bad steps do no harm."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lalia.data.loader import Batch
from lalia.errors import UserError
from lalia.model.transformer import Transformer
from lalia.training.objectives import Metrics, next_token
from lalia.training.trainer import Trainer
from tests.training.conftest import RandomBatches, make_trainer, tiny_model


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in trainer.model.state_dict().items()}


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[key] - b[key]).abs().max()) for key in a)


def gradients(model: Transformer, batch: Batch, micro_batch_size: int | None) -> dict[str, torch.Tensor]:
    total = 0
    for part in batch.split(micro_batch_size):
        loss, weight, _ = next_token(model, part)
        loss.backward()
        total += int(weight)
    return {name: p.grad / total for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_micro_batches_equal_one_batch(micro_batch_size: int) -> None:
    batch = RandomBatches().batch(0)
    whole = gradients(tiny_model(), batch, None)
    parts = gradients(tiny_model(), batch, micro_batch_size)
    assert largest_difference(whole, parts) < 1e-6


def test_mean_of_means_would_be_wrong() -> None:
    """Negative control: dividing each micro-batch by its own weight, the field's usual bug, is far outside 1e-6."""
    batch = RandomBatches().batch(0)
    whole = gradients(tiny_model(), batch, None)
    model = tiny_model()
    parts = batch.split(1)
    for part in parts:
        loss, weight, _ = next_token(model, part)
        (loss / weight / len(parts)).backward()
    wrong = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert largest_difference(whole, wrong) > 1e-4


class Killed(Exception):
    pass


class DyingBatches(RandomBatches):
    def __init__(self, dies_at: int) -> None:
        super().__init__()
        self.dies_at = dies_at

    def batch(self, step: int) -> Batch:
        if step == self.dies_at:
            raise Killed
        return super().batch(step)


@pytest.mark.parametrize("dies_at", [1, 5, 11])
def test_resuming_equals_never_stopping(tmp_path: Path, trained: dict[str, torch.Tensor], dies_at: int) -> None:
    with pytest.raises(Killed):
        make_trainer(tmp_path, batches=DyingBatches(dies_at), checkpoint_seconds=0.0).train()
    resumed = make_trainer(tmp_path)
    resumed.train()
    assert resumed.step == 12
    assert largest_difference(weights(resumed), trained) == 0.0


def test_forgotten_momentum_would_show(tmp_path: Path, trained: dict[str, torch.Tensor]) -> None:
    """Negative control: a checkpoint without the optimizers' state does not give the same weights."""
    with pytest.raises(Killed):
        make_trainer(tmp_path, batches=DyingBatches(5), checkpoint_seconds=0.0).train()
    resumed = make_trainer(tmp_path)
    load = resumed.checkpoints.load

    def load_and_forget(tensors: dict[str, torch.Tensor]) -> Any:
        loaded = load(tensors)
        for optimizer in resumed.optimizers:
            for state in optimizer.state.values():
                for value in state.values():
                    value.zero_()
        return loaded

    resumed.checkpoints.load = load_and_forget  # type: ignore[method-assign]
    resumed.train()
    assert largest_difference(weights(resumed), trained) > 1e-4


def test_damaged_newest_checkpoint_falls_back(tmp_path: Path, trained: dict[str, torch.Tensor]) -> None:
    with pytest.raises(Killed):
        make_trainer(tmp_path, batches=DyingBatches(6), checkpoint_seconds=0.0).train()
    newest = max(tmp_path.glob("step-*/*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-100])
    said: list[str] = []
    trainer = make_trainer(tmp_path)
    trainer.progress.say = said.append  # type: ignore[method-assign]
    trainer.train()
    assert any("damaged" in line and "falling back" in line for line in said)
    assert largest_difference(weights(trainer), trained) == 0.0


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path, steps=2).train()
    with pytest.raises(UserError, match="other settings"):
        make_trainer(tmp_path, steps=2, run_fingerprint="another").train()


def test_metrics_hold_every_step_once_after_a_resume(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        make_trainer(tmp_path, batches=DyingBatches(7), checkpoint_seconds=0.0).train()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "st')  # the line being written when the process died
    make_trainer(tmp_path, evaluate=lambda step: {"bits_per_byte": 1.0}).train()
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "step"] == list(range(1, 13))


def test_non_finite_step_is_skipped_and_counted(tmp_path: Path) -> None:
    def objective(model: Transformer, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, Metrics]:
        loss, weight, metrics = next_token(model, batch)
        calls.append(1)
        return (loss * float("nan") if len(calls) == 3 else loss), weight, metrics

    calls: list[int] = []
    trainer = make_trainer(tmp_path, objective=objective)
    happened = trainer.train()
    assert happened["skipped_steps"] == 1
    assert all(torch.isfinite(value).all() for value in weights(trainer).values())


def test_hopeless_loss_stops_with_the_last_good_checkpoint(tmp_path: Path) -> None:
    def objective(model: Transformer, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, Metrics]:
        loss, weight, metrics = next_token(model, batch)
        return loss * float("inf"), weight, metrics

    make_trainer(tmp_path, steps=1).train()
    trainer = make_trainer(tmp_path, steps=100, objective=objective)
    with pytest.raises(UserError, match="20 steps in a row"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000001"]


def test_training_learns_what_repeats(tmp_path: Path) -> None:
    class Same(RandomBatches):
        def batch(self, step: int) -> Batch:
            return super().batch(0)

    trainer = make_trainer(tmp_path, steps=60, batches=Same())
    before, weight, _ = next_token(trainer.model, RandomBatches().batch(0))
    trainer.train()
    after, *_ = next_token(trainer.model, RandomBatches().batch(0))
    assert float(before) / weight > 3.9  # log(61) = 4.11
    assert float(after) / weight < 1.0


def test_bfloat16_activations_train_too(tmp_path: Path) -> None:
    model = tiny_model()
    model.compute_dtype = torch.bfloat16
    trainer = make_trainer(tmp_path, model=model)
    trainer.train()
    assert all(value.dtype == torch.float32 for value in weights(trainer).values())


def test_meters_count_a_step_that_was_lost_once(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        make_trainer(tmp_path, batches=DyingBatches(7), checkpoint_seconds=1e9, evaluation_steps=frozenset({4})).train()
    happened = make_trainer(tmp_path, evaluate=lambda step: {"bits_per_byte": 1.0}).train()
    assert happened["tokens"] == sum(RandomBatches().batch(step).num_targets for step in range(12))
    assert happened["processed_tokens"] == 12 * 6 * 16
    assert happened["flops"] == happened["processed_tokens"] * tiny_model().config.flops_per_token(16)
    assert 0 < happened["goodput"] < 1
    assert happened["training_seconds"] > 0 and happened["checkpoint_seconds"] > 0
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events].count("start") == 2
    tokens = [e["tokens"] for e in events if e["event"] == "step"]
    assert tokens == sorted(tokens) and tokens[-1] == happened["tokens"]
