"""Learning rates, batch sizes and sequence lengths along a run."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from lalia.data.loader import Batch
from lalia.errors import UserError
from lalia.training.config import TrainingConfig
from lalia.training.schedule import BatchSchedule, learning_rate_scale

VALUES: dict[str, Any] = {"warmup_fraction": 0.1, "decay_fraction": 0.5, "final_fraction": 0.0}


@pytest.mark.parametrize(("step", "expected"), [(0, 0.5), (1, 1.0), (4, 1.0), (5, 1.0), (7, 0.6), (9, 0.2)])
def test_stable(step: int, expected: float) -> None:
    assert learning_rate_scale(step, 10, **VALUES) == pytest.approx(expected)


@pytest.mark.parametrize("step", [10, 11, 40, 70, 99])
def test_cosine_is_torchs(step: int) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=90, eta_min=0.1)
    for _ in range(step - 10):
        optimizer.step()
        theirs.step()
    ours = learning_rate_scale(step, 100, 0.1, 0.5, 0.1, "cosine")
    assert ours == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)


def test_linear_goes_straight_to_the_end() -> None:
    scales = [learning_rate_scale(step, 100, 0.1, 0.5, 0.0, "linear") for step in range(10, 100)]
    assert scales[0] == 1.0
    steps = [a - b for a, b in pairwise(scales)]
    assert max(steps) - min(steps) < 1e-9
    assert not math.isclose(scales[20], learning_rate_scale(30, 100, 0.1, 0.5, 0.0, "cosine"), abs_tol=1e-3)


def test_every_row_is_taken_once_in_order() -> None:
    schedule = BatchSchedule(16, 64, 100, [(0.0, 0.25), (0.2, 0.5), (0.5, 1.0)])
    expected = 0
    for step in range(100):
        first, count = schedule.rows(step)
        assert first == expected
        expected += count
    assert schedule.total_rows() == expected == 20 * 4 + 30 * 8 + 50 * 16
    assert schedule.sizes() == [4, 8, 16]


def test_without_stages_every_step_takes_the_same() -> None:
    schedule = BatchSchedule(8, 64, 10)
    assert [schedule.rows(step) for step in (0, 3, 9)] == [(0, 8), (24, 8), (72, 8)]
    assert schedule.cuts(0) == 1


def test_rows_are_cut_into_equal_pieces() -> None:
    schedule = BatchSchedule(8, 64, 100, length_stages=[(0.0, 0.25), (0.3, 1.0)])
    assert [schedule.cuts(step) for step in (0, 29, 30, 99)] == [4, 4, 1, 1]


def test_cutting_keeps_tokens_and_restarts_positions() -> None:
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0]])
    tokens = torch.arange(8)[None]
    batch = Batch(tokens, tokens + 1, ids, positions, False, 8, None).cut(2)
    assert batch.tokens.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert batch.targets.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 1], [1, 1, 1, 2]]
    assert batch.positions.tolist() == [[0, 1, 2, 0], [0, 1, 2, 0]]


@pytest.mark.parametrize(
    "stages", [[[0.1, 1.0]], [[0.0, 0.5], [0.0, 1.0]], [[0.0, 0.0]], [[0.0, 1.5]], [[0.0, 0.5], [1.0, 1.0]]]
)
def test_stages_that_make_no_sense(stages: list[list[float]]) -> None:
    with pytest.raises(UserError, match="batch_stages"):
        TrainingConfig.parse({"batch_stages": stages})


def test_a_length_that_does_not_divide() -> None:
    with pytest.raises(UserError, match="rows of 100 tokens"):
        BatchSchedule(8, 100, 10, length_stages=[(0.0, 1 / 3)])
