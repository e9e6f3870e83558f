"""Which steps are applied, judged from loss and gradient norm without a look by the host."""

import pytest
import torch

from lalia.training.guard import WINDOW, StepGuard


def judged(guard: StepGuard, losses: list[float], norm: float = 1.0, present: bool = True) -> list[bool]:
    return [bool(guard.judge(torch.tensor(loss), torch.tensor(norm), torch.tensor(present))) for loss in losses]


def noisy(count: int, seed: int = 0) -> list[float]:
    return (3.0 + 0.1 * torch.randn(count, generator=torch.Generator().manual_seed(seed))).tolist()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_skipped_from_the_first_step_on(bad: float) -> None:
    guard = StepGuard(0.0, torch.device("cpu"))
    assert judged(guard, [bad, 3.0, bad, bad]) == [False, True, False, False]
    assert not judged(guard, [3.0], norm=bad)[0]
    assert guard.counts.tolist() == [1, 4, 3]


def test_a_spike_is_skipped_and_usual_noise_is_not() -> None:
    guard = StepGuard(6.0, torch.device("cpu"))
    assert all(judged(guard, noisy(300)))
    assert judged(guard, [3.9, 2.0, 3.2]) == [False, True, True]  # 9 deviations above; below is welcome
    assert guard.counts.tolist()[1:] == [1, 0]


def test_without_deviations_a_spike_passes() -> None:
    """Negative control."""
    guard = StepGuard(0.0, torch.device("cpu"))
    assert all(judged(guard, [*noisy(300), 3.9]))


def test_nothing_is_a_spike_before_half_a_window_was_seen() -> None:
    guard = StepGuard(6.0, torch.device("cpu"))
    assert all(judged(guard, [*noisy(WINDOW // 2 - 1), 9.0]))
    assert not judged(guard, [99.0])[0]


def test_skipped_steps_do_not_become_usual() -> None:
    guard = StepGuard(6.0, torch.device("cpu"))
    judged(guard, noisy(200))
    assert not any(judged(guard, [9.0] * 50))
    assert guard.counts.tolist()[2] == 50
    guard.forget()
    assert all(judged(guard, [9.0] * 50))


def test_a_gradient_that_explodes_is_a_spike_though_the_loss_is_not() -> None:
    guard = StepGuard(6.0, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    for loss in noisy(100):
        guard.judge(torch.tensor(loss), 1.0 + 0.1 * torch.randn((), generator=generator), torch.tensor(True))
    assert not judged(guard, [3.0], norm=2.5)[0]


def test_a_batch_without_targets_is_neither_usual_nor_skipped() -> None:
    guard = StepGuard(6.0, torch.device("cpu"))
    judged(guard, [*noisy(200), 9.0, 9.0])  # a full ring, where whatever is noted replaces something
    before = guard.history.clone()
    assert all(judged(guard, [0.0] * 100, norm=0.0, present=False))
    assert guard.counts.tolist() == [200, 2, 2]
    torch.testing.assert_close(guard.history, before, rtol=0, atol=0)
    assert not judged(guard, [3.9])[0]
