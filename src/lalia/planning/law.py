"""The scaling law: bits per byte from model size and data, fitted to runs, with what the runs leave open."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lalia.errors import CorruptFile, UserError
from lalia.files import read_json, write_json

REPEAT_DECAY_EPOCHS, MOST_EPOCHS = 15.4, 40
"""Data repeated r times is worth U (1 + R (1 - exp(-r / R))) fresh bytes; beyond 40 passes it teaches nothing
(Muennighoff et al. 2023)."""

MEASURED_EPOCHS, OVERFITTING = 5.0, 0.007
"""Passes over a text after the first cost its share of the bits per byte times their square, where the model has a
weight for every token (LOG.md, 2026-12-01: seven runs at three widths, 2 to 4.6 passes). Beyond the first figure,
where nothing was measured, the cost is taken to go on growing as fast as there."""
HARMLESS_TOKENS_PER_WEIGHT = 20.0
"""With so many tokens for each weight, passes are taken to cost nothing."""
MOST_WEIGHTS_PER_TOKEN = 10.0
"""Models with more weights than that for every token of the text are not planned: none was measured beyond 3.5."""

LEAST_RUNS = 5
"""The law has five constants; fewer runs than that leave a line through points."""
SEED_NOISE, SEED_NOISE_WEIGHT = 0.005, 4.0
"""What runs that differ in their seed alone differ by (LOG.md: 0.01 of 2 bits per byte), and how many runs' worth of
evidence that is: with few runs the scatter around the law says little about itself."""
USUAL_EXPONENT, USUAL_EXPONENT_SPREAD = 0.35, 0.5
"""Exponents found elsewhere: 0.34 and 0.28 (Hoffmann et al. 2022), 0.35 and 0.37 (Besiroglu et al. 2024). The spread is
that of the logarithm; it decides only where the runs do not."""
HUBER = 0.01
"""Relative errors beyond this count linearly, so that one bad run cannot bend the law (Hoffmann et al. 2022)."""
NUM_DRAWS = 256


class RunPoint(NamedTuple):
    """One finished run: its name, matrix weights N, effective bytes D and bits per byte on held-out text."""

    name: str
    matrix_parameters: float
    effective_bytes: float
    bits_per_byte: float


@dataclass(frozen=True)
class Law:
    """bits per byte = floor + size / N^size_exponent + data / D^data_exponent (Hoffmann et al. 2022).

    Attributes:
        draws: (laws, 6): floor, size, size_exponent, data, data_exponent and relative noise of laws that explain the
            runs about as well as the best one; intervals are their spread.
        source: where it comes from.
        largest: most matrix weights and effective bytes of the runs it was fitted to.
        points: those runs, where they are known.
    """

    floor: float
    size: float
    size_exponent: float
    data: float
    data_exponent: float
    draws: np.ndarray
    source: str
    largest: tuple[float, float]
    points: tuple[RunPoint, ...] = ()

    def bits_per_byte(self, matrix_parameters: float, effective_bytes: float) -> float:
        """What to expect on held-out text, by the most probable law."""
        size = self.size / matrix_parameters**self.size_exponent
        return self.floor + size + self.data / effective_bytes**self.data_exponent

    def interval(self, matrix_parameters: float, effective_bytes: float) -> tuple[float, float]:
        """Between what nine runs of ten should end: the spread of the laws, and of runs around a law."""
        expected = self._of_draws(matrix_parameters, effective_bytes)
        steps = (np.arange(99) + 1.0) / 100.0
        noise = 1.0 + self.draws[:, 5:] * _normal_quantiles(steps)  # (laws, 99)
        low, high = np.quantile(expected[:, None] * noise, (0.05, 0.95))
        best = self.bits_per_byte(matrix_parameters, effective_bytes)
        return min(float(low), best), max(float(high), best)

    def extrapolation(self, matrix_parameters: float, effective_bytes: float) -> float:
        """How many times as large this is, in weights or in data, as the largest run the law was fitted to; or 1."""
        return max(1.0, matrix_parameters / self.largest[0], effective_bytes / self.largest[1])

    def _of_draws(self, matrix_parameters: float, effective_bytes: float) -> np.ndarray:
        floor, size, size_exponent, data, data_exponent, _ = self.draws.T
        return floor + size * matrix_parameters**-size_exponent + data * effective_bytes**-data_exponent

    def constants(self) -> dict[str, float]:
        """Of the most probable law, to six digits."""
        names = ("floor", "size", "size_exponent", "data", "data_exponent")
        return {name: float(f"{getattr(self, name):.6g}") for name in names}

    def save(self, path: Path) -> None:
        """Write the law file."""
        write_json(
            path,
            {
                "law": "floor + size / N^size_exponent + data / D^data_exponent",
                "source": self.source,
                **self.constants(),
                "largest": list(self.largest),
                "points": [point._asdict() for point in self.points],
                "draws": [[float(f"{value:.5g}") for value in row] for row in self.draws],
            },
        )


def load_law(path: str | Path | None) -> Law:
    """The law in a file that `Law.save` wrote; None means the one that comes with Lalia.

    Raises:
        UserError: if there is no such file, or it is no law file.
    """
    if path is None:
        resource = resources.files("lalia.planning") / "shakespeare.json"
        with resources.as_file(resource) as file:
            return _law(read_json(file), str(file))
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"no law file {str(path)!r}; lalia plan --fit RUN RUN ... writes one")
    return _law(read_json(path), str(path))


def _law(values: Any, where: str) -> Law:
    damaged = CorruptFile(f"{where} is no law file; fit the runs again with lalia plan --fit")
    try:
        draws = np.array(values["draws"], dtype=float)
        constants = [float(values[key]) for key in ("floor", "size", "size_exponent", "data", "data_exponent")]
        points = tuple(RunPoint(**point) for point in values["points"])
        source = str(values["source"])
        weights, num_bytes = values["largest"]
        largest = (float(weights), float(num_bytes))
    except (KeyError, TypeError, ValueError):
        raise damaged from None
    if draws.ndim != 2 or draws.shape[1] != 6 or not len(draws) or not np.isfinite(draws).all() or np.any(draws < 0):
        raise damaged
    return Law(*constants, draws=draws, source=source, largest=largest, points=points)


def effective_bytes(trained_bytes: float, unique_bytes: float) -> float:
    """What repeated data is worth in fresh bytes (Muennighoff et al. 2023, equation 5)."""
    repeats = max(0.0, trained_bytes / unique_bytes - 1.0)
    fresh = min(trained_bytes, unique_bytes)
    return fresh * (1.0 + REPEAT_DECAY_EPOCHS * (1.0 - math.exp(-repeats / REPEAT_DECAY_EPOCHS)))


def overfitting(epochs: float, matrix_parameters: float, unique_tokens: float) -> float:
    """Factor of the bits per byte on held-out text where a model learns repeated text by heart.

    Muennighoff et al. 2023 repeat text up to four times nearly for nothing, with about twenty tokens for each weight.
    The harm is taken to grow with the logarithm of the weights a token has, from none there to all of it at one;
    between one and 3.5 it was the same.
    """
    beyond = max(0.0, epochs - 1.0)
    measured = min(beyond, MEASURED_EPOCHS - 1.0)
    cost = OVERFITTING * (measured**2 + 2.0 * measured * (beyond - measured))
    share = 1.0 - math.log(unique_tokens / matrix_parameters) / math.log(HARMLESS_TOKENS_PER_WEIGHT)
    return 1.0 + cost * min(1.0, max(0.0, share))


def expected_on_text(
    law: Law, matrix_parameters: float, epochs: float, unique_tokens: float, unique_bytes: float
) -> float:
    """Bits per byte on held-out text after so many passes over a text: the law, repeats discounted, and their harm."""
    effective = effective_bytes(epochs * unique_bytes, unique_bytes)
    return law.bits_per_byte(matrix_parameters, effective) * overfitting(epochs, matrix_parameters, unique_tokens)


def useful_epochs(law: Law, matrix_parameters: float, unique_tokens: float, unique_bytes: float) -> float:
    """Passes over a text after which held-out text is expected to get worse, at most MOST_EPOCHS."""
    return min(
        np.arange(1.0, MOST_EPOCHS + 0.05, 0.05).tolist(),
        key=lambda epochs: expected_on_text(law, matrix_parameters, epochs, unique_tokens, unique_bytes),
    )


def fit(points: Sequence[RunPoint], source: str = "") -> Law:
    """The law that explains the runs best, and a sample of those that explain them about as well.

    Over a grid of floors and exponents, size and data factors follow by non-negative least squares of the relative
    error, which is that of the logarithm where it is small, with Huber weights. The sample weighs each law of the grid
    by its probability given the runs, the usual exponents and the usual noise between seeds.

    Raises:
        UserError: if the runs are too few or too alike, with their numbers.
    """
    _check(points)
    numbers = np.array([point[1:] for point in points], dtype=float)
    centre = np.exp(np.log(numbers[:, :2]).mean(0))  # columns of the order of one
    lowest = numbers[:, 2].min()
    floors = np.linspace(0.0, 0.98, 40) * lowest
    exponents = np.geomspace(0.1, 1.0, 24)
    grid = _Grid(numbers, centre, floors, exponents, exponents)
    best = grid.best()
    for _ in range(3):  # each time finer, around the best so far
        width = (best[1] * 0.1, best[2] * 0.1)
        floors = np.clip(np.linspace(best[0] - 0.03 * lowest, best[0] + 0.03 * lowest, 13), 0.0, 0.99 * lowest)
        around = [np.clip(np.linspace(e - w, e + w, 13), 0.1, 1.0) for e, w in zip(best[1:3], width, strict=True)]
        best = _Grid(numbers, centre, floors, *around).best()
    draws = grid.draw(NUM_DRAWS, np.random.default_rng(0))
    for row in (best, *draws):
        row[3] *= centre[0] ** row[1]
        row[4] *= centre[1] ** row[2]
    floor, size_exponent, data_exponent, size, data, _ = best
    order = (0, 3, 1, 4, 2, 5)
    largest = (float(numbers[:, 0].max()), float(numbers[:, 1].max()))
    return Law(floor, size, size_exponent, data, data_exponent, draws[:, order], source, largest, tuple(points))


def _check(points: Sequence[RunPoint]) -> None:
    sizes = sorted({point.matrix_parameters for point in points})
    amounts = sorted({round(point.effective_bytes, -3) for point in points})
    spread_sizes, spread_data = (max(v, default=1) / min(v, default=1) for v in (sizes, amounts))
    if len(points) < LEAST_RUNS or spread_sizes < 1.5 or spread_data < 1.5:
        listed = ", ".join(
            f"{p.name} ({p.matrix_parameters:,.0f} weights, {p.effective_bytes:,.0f} bytes)" for p in points
        )
        raise UserError(
            f"a law needs at least {LEAST_RUNS} finished runs whose sizes and whose amounts of data differ by a factor "
            f"of 1.5 or more; these are {len(points)} of {len(sizes)} sizes ({spread_sizes:.1f}x apart) and "
            f"{len(amounts)} amounts of data ({spread_data:.1f}x apart): {listed or 'none'}; "
            "lalia plan --ladder prints runs that would do"
        )


class _Grid:
    """The best size and data factors at every floor and pair of exponents, and how well they explain the runs."""

    def __init__(
        self,
        numbers: np.ndarray,
        centre: np.ndarray,
        floors: np.ndarray,
        size_exponents: np.ndarray,
        data_exponents: np.ndarray,
    ) -> None:
        mesh = np.meshgrid(floors, size_exponents, data_exponents, indexing="ij")
        self.floor, self.size_exponent, self.data_exponent = (m.reshape(-1, 1) for m in mesh)  # (laws, 1)
        self.score = numbers[:, 2]
        self.num_runs = len(numbers)
        # Relative errors: error = wanted - size * first - data * second, each (laws, runs).
        first = (numbers[:, 0] / centre[0]) ** -self.size_exponent / self.score
        second = (numbers[:, 1] / centre[1]) ** -self.data_exponent / self.score
        wanted = 1.0 - self.floor / self.score
        weight, error = np.ones_like(wanted), wanted
        for _ in range(6):
            self.factors, self.products = _non_negative(first, second, wanted, weight)
            error = wanted - self.factors[:, :1] * first - self.factors[:, 1:] * second
            weight = np.minimum(1.0, HUBER / np.maximum(np.abs(error), 1e-12))
        size = np.abs(error)
        squared = np.where(size <= HUBER, size**2, 2.0 * HUBER * size - HUBER**2).sum(1)
        self.squared = squared + SEED_NOISE_WEIGHT * SEED_NOISE**2
        usual = [
            np.log(e[:, 0] / USUAL_EXPONENT) / USUAL_EXPONENT_SPREAD for e in (self.size_exponent, self.data_exponent)
        ]
        self.prior = -0.5 * (usual[0] ** 2 + usual[1] ** 2)

    def best(self) -> np.ndarray:
        """floor, size_exponent, data_exponent, size, data, noise of the most probable law."""
        index = int(np.argmax(self.prior - 0.5 * (self.num_runs + SEED_NOISE_WEIGHT) * np.log(self.squared)))
        noise = (self.squared[index] / (self.num_runs + SEED_NOISE_WEIGHT)) ** 0.5
        return self._row(index, self.factors[index], noise)

    def draw(self, count: int, random: np.random.Generator) -> np.ndarray:
        """(count, 6) laws drawn by their probability given the runs, with factors and noise drawn too."""
        a, b, c = self.products.T  # of the matrix of the normal equations, [[a, b], [b, c]]
        determinant = np.maximum(a * c - b * b, 1e-12)
        freedom = self.num_runs - 2 + SEED_NOISE_WEIGHT
        log = self.prior - 0.5 * np.log(determinant) - 0.5 * freedom * np.log(self.squared)
        probability = np.exp(log - log.max())
        rows = []
        for index in random.choice(len(log), count, p=probability / probability.sum()):
            noise = (self.squared[index] / random.chisquare(freedom)) ** 0.5
            covariance = np.array([[c[index], -b[index]], [-b[index], a[index]]]) / determinant[index]
            factors = self.factors[index]
            for _ in range(20):  # factors below zero are no laws
                drawn = random.multivariate_normal(factors, covariance * noise**2, check_valid="ignore")
                if (drawn >= 0).all():
                    factors = drawn
                    break
            rows.append(self._row(index, factors, noise))
        return np.array(rows)

    def _row(self, index: int, factors: np.ndarray, noise: float) -> np.ndarray:
        place = (self.floor[index, 0], self.size_exponent[index, 0], self.data_exponent[index, 0])
        return np.array([*place, *factors, noise])


def _non_negative(
    first: np.ndarray, second: np.ndarray, wanted: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted least squares with two factors >= 0, for many problems at once.

    Args:
        first, second, wanted, weight: (problems, runs)

    Returns:
        (problems, 2) factors, and (problems, 3) entries of the symmetric matrix of the normal equations.
    """
    a, b, c = ((weight * x * y).sum(1) for x, y in ((first, first), (first, second), (second, second)))
    p, q = ((weight * x * wanted).sum(1) for x in (first, second))
    determinant = a * c - b * b
    safe = np.where(determinant > 1e-12 * a * c, determinant, np.inf)
    both = np.stack([(c * p - b * q) / safe, (a * q - b * p) / safe], 1)
    zero = np.zeros_like(p)
    only_first = np.stack([np.maximum(p / a, 0.0), zero], 1)
    only_second = np.stack([zero, np.maximum(q / c, 0.0)], 1)
    gain_first, gain_second = np.maximum(p, 0.0) ** 2 / a, np.maximum(q, 0.0) ** 2 / c
    one = np.where((gain_first > gain_second)[:, None], only_first, only_second)
    inside = (both > 0).all(1) & np.isfinite(safe)
    return np.where(inside[:, None], both, one), np.stack([a, b, c], 1)


def _normal_quantiles(shares: np.ndarray) -> np.ndarray:
    from statistics import NormalDist

    return np.array([NormalDist().inv_cdf(share) for share in shares.tolist()])
