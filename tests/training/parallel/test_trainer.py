"""The whole Trainer in several processes: the weights of one process, and a run that changes its layout on the way.

In float64: AdamW's first steps turn the rounding of a gradient near zero into a step of its own, in float32 up to 4e-4.
"""

import contextlib
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from lalia.data.loader import Batch
from lalia.model.transformer import Transformer
from lalia.training.config import LoopConfig
from lalia.training.parallel.apply import gradient_norm
from lalia.training.parallel.layout import ParallelConfig
from lalia.training.parallel.state import full_state
from lalia.training.parallel.world import World, start
from tests.training.conftest import RandomBatches, make_trainer, tiny_model
from tests.training.parallel.ranks import run

STEPS = 9
TOLERANCE = 1e-6


class Stopping(RandomBatches):
    """Eight rows; fails when asked for a step, and remembers what it was asked for."""

    def __init__(self, stop_at: int | None) -> None:
        super().__init__(rows=8)
        self.stop_at = stop_at
        self.asked: list[int] = []

    def batch(self, step: int) -> Batch:
        if step == self.stop_at:
            raise InterruptedError
        self.asked.append(step)
        return super().batch(step)


def double_model() -> Transformer:
    model = tiny_model().double()
    model.compute_dtype = torch.float64
    return model


def train(folder: str, layout: dict[str, int], stop_at: int | None = None, **loop: Any) -> dict[str, Any]:
    """Train (on) in this layout; the whole weights, and which batches this process took."""
    world = start(ParallelConfig(**layout))
    path = Path(folder)
    batches = Stopping(stop_at)
    values: dict[str, Any] = {"average_decay": 0.5, "checkpoint_seconds": 0.0, "spike_deviations": 3.0, **loop}
    trainer = make_trainer(path, STEPS, model=double_model(), batches=batches, world=world, loop=LoopConfig(**values))
    if not world.is_main:
        trainer.progress.log_path = None
    with contextlib.suppress(InterruptedError):
        trainer.train()
    return {"weights": full_state(trainer.model), "asked": batches.asked, "tokens": trainer.meters.total.trained}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train(str(tmp_path_factory.mktemp("alone")), {})


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def train_all(folder: str, layouts: list[tuple[dict[str, int], dict[str, Any]]]) -> list[dict[str, Any]]:
    ends = []
    for number, (layout, loop) in enumerate(layouts):
        path = Path(folder, str(number))
        path.mkdir(exist_ok=True)
        ends.append(train(str(path), layout, **loop))
    return ends


TWO: list[tuple[dict[str, int], dict[str, Any]]] = [
    ({"replicate": 2}, {}),
    ({"replicate": 2}, {"micro_batch_size": 3}),
    ({"shard": 2}, {"micro_batch_size": 2}),
    ({"tensor": 2}, {}),
    ({"context": 2}, {"micro_batch_size": 4}),
]


def test_two_processes_end_with_the_weights_of_one(tmp_path: Path, alone: dict[str, Any]) -> None:
    ends = run(train_all, 2, str(tmp_path), TWO)[0]
    for (layout, loop), end in zip(TWO, ends, strict=True):
        assert largest_difference(end["weights"], alone["weights"]) < TOLERANCE, (layout, loop)
        assert end["tokens"] == alone["tokens"]


def test_processes_that_share_rows_drop_the_same(tmp_path: Path, alone: dict[str, Any]) -> None:
    """Tensor parallel gives the weights of one process; processes with rows of their own drop others than it."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    loop: dict[str, Any] = {"dropout": 0.3}
    expected = train(str(one), {}, **loop)["weights"]
    tensor, replicate = run(train_all, 2, str(two), [({"tensor": 2}, loop), ({"replicate": 2}, loop)])[0]
    assert largest_difference(tensor["weights"], expected) < TOLERANCE
    assert largest_difference(replicate["weights"], expected) > 1e-3
    assert largest_difference(alone["weights"], expected) > 1e-3


def test_a_run_goes_on_in_other_layouts(tmp_path: Path, alone: dict[str, Any]) -> None:
    """One process, then two, then four, then one: the same weights, and every batch was taken once, in order."""
    folder = str(tmp_path)
    asked = train(folder, {}, stop_at=2)["asked"]
    asked += run(train, 2, folder, {"shard": 2}, 4)[0]["asked"]
    asked += run(train, 4, folder, {"replicate": 2, "tensor": 2}, 7)[0]["asked"]
    last = train(folder, {})
    assert asked + last["asked"] == list(range(STEPS))
    assert largest_difference(last["weights"], alone["weights"]) < TOLERANCE


def train_with_a_norm_of_its_own(folder: str, alike: bool) -> dict[str, torch.Tensor]:
    """The weights of this process's copy, where the second process computes another norm in one step."""
    world = start(ParallelConfig(replicate=2))
    model, path = double_model(), Path(folder, str(alike))
    path.mkdir(exist_ok=True)
    trainer = make_trainer(path, STEPS, model=model, batches=RandomBatches(rows=8), world=world)
    trainer.progress.log_path = None
    if not alike:
        object.__setattr__(world, "from_main", lambda value: value)

    def norm(model: Transformer, world: World) -> torch.Tensor:
        return gradient_norm(model, world) * (float("inf") if world.rank == 1 and trainer.step == 4 else 1.0)

    with mock.patch("lalia.training.trainer.gradient_norm", norm):
        trainer.train()
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def test_processes_judge_a_step_alike(tmp_path: Path) -> None:
    """With a negative control: left to themselves, copies that differ in one norm are no copies any more."""
    for alike in (True, False):
        first, second = run(train_with_a_norm_of_its_own, 2, str(tmp_path), alike)
        assert (largest_difference(first, second) == 0.0) == alike


def test_a_batch_left_out_would_show(tmp_path: Path, alone: dict[str, Any]) -> None:
    """Negative control."""

    class Skipping(Stopping):
        def batch(self, step: int) -> Batch:
            return super().batch(step + (step > 4))

    model = double_model()
    trainer = make_trainer(tmp_path, STEPS, model=model, batches=Skipping(None), loop=LoopConfig(average_decay=0.5))
    trainer.train()
    assert largest_difference(full_state(trainer.model), alone["weights"]) > 100 * TOLERANCE
