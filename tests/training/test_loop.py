"""What the loop does about bad steps, signals and averages, and that it prefetches what it would have made itself."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lalia.data.loader import Batch
from lalia.errors import UserError
from lalia.model.transformer import Transformer
from lalia.training.objectives import Metrics, next_token
from lalia.training.prefetch import Prefetcher
from tests.training.conftest import RandomBatches, make_trainer, tiny_model
from tests.training.test_trainer import largest_difference, weights


class Poisoned(RandomBatches):
    """Batches of some steps bring a loss that is not a number; asking for one step fails."""

    def __init__(self, steps: range, dies_at: int | None = None) -> None:
        super().__init__()
        self.steps, self.dies_at = steps, dies_at

    def batch(self, step: int) -> Batch:
        if step == self.dies_at:
            raise KeyError("killed")
        batch = super().batch(step)
        mark = -1 if step in self.steps else 0  # for the objective
        return replace(batch, positions=batch.positions + mark)


LOOKING_BACK: dict[str, Any] = {
    "max_skipped": 4,
    "checkpoint_seconds": 1e6,
    "evaluation_steps": frozenset({8}),
    "evaluate": lambda step: {},
}
"""Four bad steps send the run back; the one checkpoint is that before the evaluation at step 8."""


def poisonable(model: Transformer, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, Metrics]:
    loss, weight, metrics = next_token(model, batch)
    return loss * (float("nan") if batch.positions[0, 0] < 0 else 1.0), weight, metrics


def test_a_bad_stretch_is_passed_over(tmp_path: Path) -> None:
    """Steps 10 to 16 are bad: after 4 in a row training goes back to the checkpoint of step 8 or later and on."""

    trainer = make_trainer(
        tmp_path,
        24,
        batches=Poisoned(range(10, 17)),
        objective=poisonable,
        **LOOKING_BACK,
    )
    happened = trainer.train()
    assert happened["rewinds"] == 1
    assert happened["steps"] == 24
    assert trainer.passed_over == 8  # from step 16, where it was noticed, to the checkpoint at 8
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(e["step"], e["from_step"]) for e in events if e["event"] == "rewind"] == [(8, 16)]
    assert all(torch.isfinite(value).all() for value in weights(trainer).values())


def test_going_back_is_repeated_exactly_after_a_kill(tmp_path: Path) -> None:
    ends = []
    for name, dies_at in (("whole", 99), ("killed", 27)):
        folder = tmp_path / name
        folder.mkdir()
        settings: dict[str, Any] = {
            **LOOKING_BACK,
            "objective": poisonable,
            "evaluation_steps": frozenset({8, 18}),
        }
        if dies_at < 99:
            with pytest.raises(KeyError):
                make_trainer(folder, 24, batches=Poisoned(range(10, 17), dies_at), **settings).train()
        trainer = make_trainer(folder, 24, batches=Poisoned(range(10, 17)), **settings)
        trainer.train()
        ends.append(weights(trainer))
    assert largest_difference(*ends) == 0.0


def test_a_run_that_stays_bad_stops_with_advice(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lower the learning rates"):
        make_trainer(
            tmp_path,
            60,
            batches=Poisoned(range(10, 99)),
            objective=poisonable,
            max_rewinds=2,
            **LOOKING_BACK,
        ).train()


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_saves_and_ends(
    tmp_path: Path, trained: dict[str, torch.Tensor], number: signal.Signals, error: type[BaseException]
) -> None:
    class Signals(RandomBatches):
        def batch(self, step: int) -> Batch:
            if step == 5:
                os.kill(os.getpid(), number)
            return super().batch(step)

    trainer = make_trainer(tmp_path, batches=Signals(), checkpoint_seconds=1e6)
    before = signal.getsignal(number)  # whoever started the tests may ignore it
    with pytest.raises(error):
        trainer.train()
    assert 4 <= trainer.step < 12
    assert signal.getsignal(number) == before
    resumed = make_trainer(tmp_path, checkpoint_seconds=1e6)
    said: list[str] = []
    resumed.progress.say = said.append  # type: ignore[method-assign]
    resumed.train()
    assert any(f"continuing at step {trainer.step}" in line for line in said)
    assert largest_difference(weights(resumed), trained) == 0.0


def test_the_average_is_that_of_the_weights_after_each_step(tmp_path: Path) -> None:
    averaged = make_trainer(tmp_path, 6, average_decay=0.5)
    averaged.train()
    expected = {name: p.detach().clone() for name, p in tiny_model().named_parameters()}
    model = tiny_model()
    for steps in range(1, 7):
        folder = tmp_path / str(steps)
        folder.mkdir()
        model = tiny_model()
        trainer = make_trainer(folder, 6, model=model)
        trainer.num_steps = 6
        for step in range(steps):
            trainer._train_step(RandomBatches().batch(step))
            trainer.step += 1
        decay = min(0.5, steps / (9 + steps))
        for name, p in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach()
    assert largest_difference(weights(averaged), expected) < 1e-6
    assert largest_difference(weights(averaged), {n: p.detach() for n, p in model.named_parameters()}) > 1e-4


def test_z_loss_and_entropy_are_logged_apart(tmp_path: Path) -> None:
    model = tiny_model()
    batch = RandomBatches().batch(0)
    with torch.no_grad():
        logits = model.logits(model(batch.tokens))
        counted = batch.targets != -100
        squares = float(logits.logsumexp(-1).square()[counted].sum())
    plain, *_ = next_token(model.train(), batch)
    loss, _, metrics = next_token(model, batch, z_loss=0.1)
    assert loss.item() == pytest.approx(plain.item() + 0.1 * squares, rel=1e-5)
    assert metrics["cross_entropy"].item() == pytest.approx(plain.item(), rel=1e-6)
    ours = torch.autograd.grad(loss, model.head_weight)[0]
    logits = model.logits(model(batch.tokens))[counted]
    reference = torch.nn.functional.cross_entropy(logits, batch.targets[counted], reduction="sum")
    reference = reference + 0.1 * logits.logsumexp(-1).square().sum()
    torch.testing.assert_close(ours, torch.autograd.grad(reference, model.head_weight)[0], rtol=1e-4, atol=1e-5)
    assert next_token(model.eval(), batch, z_loss=0.1)[0].item() == pytest.approx(plain.item(), rel=1e-6)


def test_prefetching_keeps_the_order_and_the_error() -> None:
    def make(number: int) -> int:
        if number == 5:
            raise ValueError("five")
        return number * number

    ahead = Prefetcher(make, 2, 9)
    assert [ahead.take() for _ in range(3)] == [4, 9, 16]
    with pytest.raises(ValueError, match="five"):
        ahead.take()
    ahead.stop()
    unused = Prefetcher(make, 0, 4)
    unused.stop()  # ends though nobody takes what was made
    assert not unused._thread.is_alive()


def test_a_batch_that_cannot_be_divided(tmp_path: Path) -> None:
    from lalia.training.parallel.layout import ParallelConfig
    from lalia.training.parallel.world import World

    trainer = make_trainer(tmp_path)
    trainer.world = replace(World.alone(), layout=ParallelConfig(replicate=4))
    with pytest.raises(UserError, match="6 rows cannot be divided among 4"):
        trainer._prepared(0)


class Corrupting(RandomBatches):
    """A fault of the machine: when the batch of a step is asked for, for the first time, a weight is no number."""

    def __init__(self, trainer: Any, step: int) -> None:
        super().__init__()
        self.trainer, self.at = trainer, step

    def batch(self, step: int) -> Batch:
        if step == self.at:
            self.at = -1
            with torch.no_grad():
                self.trainer.model.head_weight[0, 0] = float("nan")
        return super().batch(step)


@pytest.mark.parametrize(("checkpoint_seconds", "at"), [(1e6, 10), (0.0, 10), (0.0, 23)])
def test_weights_that_are_no_numbers_are_replaced_by_the_last_good_ones(
    tmp_path: Path, checkpoint_seconds: float, at: int
) -> None:
    """Without going back no later step would be applied; a checkpoint of them would push out the good ones."""
    trainer = make_trainer(tmp_path, 24, **{**LOOKING_BACK, "checkpoint_seconds": checkpoint_seconds})
    trainer.batches = Corrupting(trainer, at)
    happened = trainer.train()
    assert (happened["rewinds"], happened["steps"]) == (1, 24)
    assert all(torch.isfinite(value).all() for value in weights(trainer).values())


def test_without_a_look_at_the_weights_they_would_be_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    monkeypatch.setattr("lalia.training.trainer.Trainer._finite", lambda self, state: True)
    trainer = make_trainer(tmp_path, 24, **{**LOOKING_BACK, "checkpoint_seconds": 0.0})
    trainer.batches = Corrupting(trainer, 23)
    assert trainer.train()["rewinds"] == 0
    assert not all(torch.isfinite(value).all() for value in weights(trainer).values())


def test_an_optimizer_whose_state_is_no_number_is_not_saved_either(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, 24, **{**LOOKING_BACK, "checkpoint_seconds": 0.0})
    state = next(iter(trainer.optimizers[0].state.values()))
    momentum = next(value for value in state.values() if value.is_floating_point() and value.ndim)
    assert trainer.save()
    momentum.view(-1)[0] = float("nan")
    assert not trainer.save()


def test_no_checkpoint_is_written_while_steps_are_skipped(tmp_path: Path) -> None:
    """All 4 of the bad steps are passed over, as the last checkpoint is from before them."""
    settings = {**LOOKING_BACK, "checkpoint_seconds": 0.0}
    trainer = make_trainer(tmp_path, 24, batches=Poisoned(range(12, 16)), objective=poisonable, **settings)
    assert trainer.train()["rewinds"] == 1
    assert trainer.passed_over == 4


def test_a_signal_in_the_last_step_ends_the_stage_too(tmp_path: Path, trained: dict[str, torch.Tensor]) -> None:
    def evaluate(step: int) -> dict[str, Any]:
        evaluated.append(step)
        return {}

    def last_step(batch: Batch) -> None:
        step(batch)
        if trainer.step == 11:
            os.kill(os.getpid(), signal.SIGTERM)

    evaluated: list[int] = []
    trainer = make_trainer(tmp_path, evaluate=evaluate)
    step, trainer._train_step = trainer._train_step, last_step  # type: ignore[method-assign]
    with pytest.raises(SystemExit):
        trainer.train()
    assert evaluated == []
    resumed = make_trainer(tmp_path, evaluate=evaluate)
    resumed.train()
    assert evaluated == [12]
    assert largest_difference(weights(resumed), trained) == 0.0


def test_a_short_run_of_bad_steps_only_does_not_count_as_trained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lower the learning rates"):
        make_trainer(tmp_path, 5, batches=Poisoned(range(99)), objective=poisonable).train()
