"""Packing plans: nothing lost, rows as full as best-fit-decreasing makes them, order by key."""

import random

import numpy as np
import pytest

from lalia.data.packing import best_fit_decreasing, cut_documents, keyed_hash, keyed_permutation, plan_epoch


def reference_best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """Free tokens of each row of the textbook algorithm, one piece at a time."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in free if room >= length]
        if fitting:
            free.remove(min(fitting))
            free.append(min(fitting) - length)
        else:
            free.append(capacity - length)
    return sorted(free)


@pytest.mark.parametrize("seed", range(30))
def test_best_fit_decreasing_equals_the_textbook(seed: int) -> None:
    draw = random.Random(seed)
    capacity = draw.choice([1, 2, 7, 16, 64])
    lengths = [draw.randint(1, draw.choice([capacity, max(1, capacity // 3)])) for _ in range(draw.randrange(0, 200))]
    rows, num_rows = best_fit_decreasing(np.array(lengths, dtype=np.int64), capacity)
    used = np.bincount(rows, weights=lengths, minlength=num_rows) if lengths else np.zeros(0)
    assert sorted(capacity - used) == reference_best_fit_decreasing(lengths, capacity)


def test_best_fit_decreasing_fills_rows_better_than_the_order_given() -> None:
    draw = np.random.default_rng(0)
    lengths = np.minimum(draw.lognormal(6.3, 1.1, 20_000).astype(np.int64) + 1, 2048)
    _, num_rows = best_fit_decreasing(lengths, 2048)
    padding = 1 - lengths.sum() / (num_rows * 2048)
    assert padding < 0.001
    next_fit, room = 1, 2048  # the control: documents in their order, a new row when one does not fit
    for length in lengths.tolist():
        next_fit, room = (next_fit, room - length) if length <= room else (next_fit + 1, 2048 - length)
    assert next_fit > 1.1 * num_rows


def test_cut_documents() -> None:
    starts, lengths, ends = cut_documents(np.array([0, 3, 13]), 14, 4, phases=np.array([2, 1, 4]))
    assert starts.tolist() == [0, 3, 4, 8, 12, 13]
    assert lengths.tolist() == [3, 1, 4, 4, 1, 1]
    assert ends.tolist() == [True, False, False, False, True, True]
    starts, lengths, ends = cut_documents(np.array([0]), 8, 4, phases=np.array([4]))
    assert (starts.tolist(), lengths.tolist(), ends.tolist()) == ([0, 4], [4, 4], [False, True])


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_holds_every_token_once(seed: int) -> None:
    draw = random.Random(seed)
    sequence_length = draw.choice([1, 3, 8, 32])
    document_lengths = [draw.choice([1, 2, 5, 8, 9, 31, 32, 33, 100, 257]) for _ in range(draw.randrange(1, 40))]
    starts = np.cumsum([0, *document_lengths])[:-1]
    plan = plan_epoch(starts, sum(document_lengths), sequence_length, seed=seed, epoch=draw.randrange(5))
    seen = np.zeros(sum(document_lengths), dtype=int)
    for start, length in zip(plan.starts, plan.lengths, strict=True):
        seen[start : start + length] += 1
    assert (seen == 1).all()
    row_lengths = np.add.reduceat(plan.lengths, plan.row_pieces[:-1])
    assert (row_lengths <= sequence_length).all() and (np.diff(plan.row_pieces) > 0).all()
    document_ends = {int(end) for end in np.cumsum(document_lengths)}
    for start, length, ends in zip(plan.starts, plan.lengths, plan.ends_document, strict=True):
        assert bool(ends) == (int(start + length) in document_ends)


def test_epochs_and_seeds_differ_and_repeat() -> None:
    starts = np.arange(0, 5000, 50)

    def plan(seed: int, epoch: int) -> list[int]:
        return plan_epoch(starts, 5000, 16, seed, epoch).starts.tolist()

    assert plan(0, 0) == plan(0, 0)
    assert plan(0, 0) != plan(0, 1) and plan(0, 0) != plan(1, 0)
    assert set(plan(0, 0)) != set(plan(0, 1))  # the cuts move, not only the order
    assert plan(1, 0) != plan(0, 1)


def test_rows_are_shuffled() -> None:
    """One document a row, none cut: without the shuffle every epoch would run from the longest to the shortest."""
    starts = np.cumsum([0, *range(9, 16)])
    orders = [plan_epoch(starts, int(starts[-1]) + 16, 16, seed=0, epoch=epoch).lengths.tolist() for epoch in range(4)]
    assert all(sorted(order) == list(range(9, 17)) for order in orders)
    assert len(set(map(tuple, orders))) == 4
    assert sorted(orders[0], reverse=True) not in orders


def test_keyed_permutation_is_fair_and_fixed() -> None:
    assert sorted(keyed_permutation(1000, 3, 4).tolist()) == list(range(1000))
    counts = np.bincount([int(keyed_permutation(8, seed)[0]) for seed in range(4000)], minlength=8)
    assert counts.min() > 400 and counts.max() < 600  # 500 each expected, standard deviation 21
    # splitmix64's published first outputs for seed 0 pin the hash: an interrupted run must resume on any machine.
    assert int(keyed_hash(np.zeros(1, dtype=np.int64))[0]) == 0xE220A8397B1DCDAF
    assert (
        keyed_permutation(6, 0, 1).tolist()
        == keyed_permutation(6, 0, 1).tolist()
        != keyed_permutation(6, 1, 0).tolist()
    )
