"""What changes over a run as a function of the step: the learning rate, the batch size, the sequence length."""

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Literal

from lalia.errors import UserError

Shape = Literal["stable", "cosine", "linear"]


def learning_rate_scale(
    step: int,
    num_steps: int,
    warmup_fraction: float,
    decay_fraction: float,
    final_fraction: float,
    shape: Shape = "stable",
) -> float:
    """Factor on the learning rates at a step (0-based): linear warm-up, then one of three shapes.

    stable: constant, then linear decay over the last `decay_fraction` of the steps (the trapezoid of Zhai et al. 2022;
    linear decay to zero is the best known end, Bergsma et al. 2025). cosine: half a cosine from the warm-up to the end
    (Loshchilov and Hutter 2017). linear: a straight line from the warm-up to the end. All end at `final_fraction`.
    """
    warmup = round(num_steps * warmup_fraction)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    remaining = num_steps - step
    decay = round(num_steps * decay_fraction) if shape == "stable" else num_steps - warmup
    if remaining >= decay:
        return 1.0
    left = remaining / decay  # from one to zero
    if shape == "cosine":
        left = 0.5 - 0.5 * math.cos(math.pi * left)
    return final_fraction + (1.0 - final_fraction) * left


Stages = Sequence[tuple[float, float]]
"""Pairs (share of the run at which it begins, factor), the first beginning at 0: `[(0, 0.25), (0.2, 1)]`."""


def check_stages(stages: Stages, name: str) -> None:
    """Refuse stages that do not begin at 0, do not ascend, or whose factor is not in (0, 1].

    Raises:
        ValueError: naming the setting.
    """
    if not stages:
        return
    begins = [begin for begin, _ in stages]
    if begins[0] != 0 or any(b <= a for a, b in pairwise(begins)) or begins[-1] >= 1:
        raise ValueError(f"{name} must begin at 0 and ascend below 1, such as [[0, 0.25], [0.2, 1]]; got {begins}")
    if any(not 0 < factor <= 1 for _, factor in stages):
        raise ValueError(f"the factors of {name} must be above 0 and at most 1; got {[f for _, f in stages]}")


def factor_at(stages: Stages, step: int, num_steps: int) -> float:
    """The factor of the stage that a step is in; 1 without stages."""
    factor = 1.0
    for begin, value in stages:
        if step >= begin * num_steps:
            factor = value
    return factor


def rows_of_stages(rows: int, stages: Stages) -> list[int]:
    """Rows that a step takes in each stage: shares of `rows`, at least one."""
    return [max(1, round(rows * share)) for _, share in stages] or [rows]


def mean_rows(rows: int, stages: Stages) -> float:
    """Rows that a step takes in the mean of a run."""
    ends = [*(begin for begin, _ in stages), 1.0] if stages else [0.0, 1.0]
    return sum((b - a) * size for (a, b), size in zip(pairwise(ends), rows_of_stages(rows, stages), strict=True))


class BatchSchedule:
    """How many rows each step takes and how many pieces each row is cut into.

    A smaller batch takes fewer rows of the same stream; a shorter sequence is a row cut into equal pieces. So every
    token is used once in the same order whatever the schedule, and any step's rows are known without the steps before.

    Args:
        rows: of a whole batch.
        length: tokens of a whole row.
        num_steps: of the run.
        batch_stages: shares of `rows`, rounded to at least one row.
        length_stages: shares of `length`; 1 / share must be a whole number that divides the length.

    Raises:
        UserError: if a share of the length is not such a number.
    """

    def __init__(
        self, rows: int, length: int, num_steps: int, batch_stages: Stages = (), length_stages: Stages = ()
    ) -> None:
        for _, share in length_stages:
            cuts = 1.0 / share
            if abs(cuts - round(cuts)) > 1e-6 or length % round(cuts):
                raise UserError(
                    f"pretrain.sequence_stages: rows of {length} tokens cannot be cut into equal rows of {share} times "
                    "that; use shares such as 0.5, 0.25 or 0.125"
                )
        self.length, self.num_steps, self._length_stages = length, num_steps, length_stages
        edges = [round(begin * num_steps) for begin, _ in batch_stages] or [0]
        self._sizes = rows_of_stages(rows, batch_stages)
        # First step of each stage, and the rows taken by all steps before it.
        self._edges = edges
        taken = [(b - a) * size for (a, b), size in zip(pairwise(edges), self._sizes, strict=False)]
        self._first_rows = list(accumulate(taken, initial=0))

    def rows(self, step: int) -> tuple[int, int]:
        """First row and number of rows of a step."""
        stage = max(i for i, edge in enumerate(self._edges) if edge <= step)
        size = self._sizes[stage]
        return self._first_rows[stage] + (step - self._edges[stage]) * size, size

    def cuts(self, step: int) -> int:
        """Into how many equal pieces every row of a step is cut."""
        return round(1.0 / factor_at(self._length_stages, step, self.num_steps))

    def lengths(self) -> list[int]:
        """The different lengths of a row, after cutting, ascending."""
        return sorted({round(self.length * share) for _, share in self._length_stages} or {self.length})

    def sizes(self) -> list[int]:
        """The different numbers of rows of a step, before cutting, ascending."""
        return sorted(set(self._sizes))

    def total_rows(self) -> int:
        """Rows of the whole run."""
        first, size = self.rows(self.num_steps - 1)
        return first + size


def evenly_spaced(steps: int, count: int) -> frozenset[int]:
    """`count` steps strictly inside a run, after equal shares of it."""
    return frozenset(round(steps * (i + 1) / (count + 1)) for i in range(count)) - {0, steps}
