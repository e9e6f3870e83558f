"""The curve of a scaling law: the best bits per byte at each amount of computation, with the runs behind it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from lalia.evaluation.charts import ticks
from lalia.planning.ladder import FinishedRun
from lalia.planning.law import Law, expected_on_text

WIDTH, HEIGHT = 64, 18  # of the drawing in a terminal, in characters


class Mark(NamedTuple):
    """A point of the chart: FLOPs, bits per byte, its interval (or None) and what it is."""

    flops: float
    bits_per_byte: float
    interval: tuple[float, float] | None
    title: str


def best_at(law: Law, flops: float, unique_bytes: float, bytes_per_token: float) -> float:
    """Bits per byte of the size that makes the most of `flops`, taken as 6 per matrix weight and token."""
    sizes = np.geomspace(1e4, 1e12, 400)
    tokens = flops / (6.0 * sizes)
    unique_tokens = unique_bytes / bytes_per_token
    return min(
        expected_on_text(law, size, count / unique_tokens, unique_tokens, unique_bytes)
        for size, count in zip(sizes.tolist(), tokens.tolist(), strict=True)
    )


class Curve:
    """The law's curve over the runs and up to a prediction.

    Args:
        law: what is drawn.
        runs: the runs it was fitted to.
        prediction: where it was asked for, if it was.
    """

    def __init__(self, law: Law, runs: Sequence[FinishedRun], prediction: Mark | None) -> None:
        self.runs = [Mark(run.flops, run.point.bits_per_byte, None, run.point.name) for run in runs]
        self.prediction = prediction
        marks = [*self.runs, *([prediction] if prediction else [])]
        low, high = (f(math.log10(mark.flops) for mark in marks) for f in (min, max))
        self.x_low, self.x_high = low - 0.15, high + 0.15
        self.line = [
            (x, best_at(law, 10**x, runs[0].unique_bytes, runs[0].bytes_per_token))
            for x in np.linspace(self.x_low, self.x_high, WIDTH).tolist()
        ]
        values = [y for _, y in self.line] + [mark.bits_per_byte for mark in marks]
        if prediction and prediction.interval:
            values += prediction.interval
        self.y_ticks = ticks(min(values), max(values), 5)

    def text(self) -> str:
        """For a terminal: the curve as dots, runs as o, the prediction as X with its interval as |."""
        y_low, y_high = self.y_ticks[0], self.y_ticks[-1]
        rows = [[" "] * WIDTH for _ in range(HEIGHT)]

        def put(x: float, y: float, sign: str) -> None:
            column = round((x - self.x_low) / (self.x_high - self.x_low) * (WIDTH - 1))
            row = round((y_high - y) / (y_high - y_low) * (HEIGHT - 1))
            rows[min(max(row, 0), HEIGHT - 1)][column] = sign

        for x, y in self.line:
            put(x, y, ".")
        if self.prediction:
            at = math.log10(self.prediction.flops)
            for y in np.linspace(*(self.prediction.interval or (0, 0)), HEIGHT).tolist():
                put(at, y, "|")
        for mark in self.runs:
            put(math.log10(mark.flops), mark.bits_per_byte, "o")
        if self.prediction:
            put(math.log10(self.prediction.flops), self.prediction.bits_per_byte, "X")
        labels = {round((y_high - y) / (y_high - y_low) * (HEIGHT - 1)): f"{y:.2f}" for y in self.y_ticks}
        lines = [f"{labels.get(number, ''):>6} |{''.join(row)}" for number, row in enumerate(rows)]
        scale = f"{10**self.x_low:.1e} FLOPs"
        lines.append(f"{'':>6} +{'-' * WIDTH}")
        lines.append(f"{'':>8}{scale}{10**self.x_high:.1e}".replace(scale, scale.ljust(WIDTH - 7)))
        signs = "bits per byte: o a run, . the best size at each amount of computation"
        return "\n".join([*lines, signs + (", X the prediction" if self.prediction else "")])

    def svg(self, width: int = 680, height: int = 300) -> str:
        """A file of its own: an SVG with its colours, hover titles on the runs."""
        left, right, top, bottom = 46, 14, 30, 46
        y_low, y_high = self.y_ticks[0], self.y_ticks[-1]

        def x_at(x: float) -> float:
            return round(left + (x - self.x_low) / (self.x_high - self.x_low) * (width - left - right), 1)

        def y_at(y: float) -> float:
            return round(top + (y_high - y) / (y_high - y_low) * (height - top - bottom), 1)

        parts = [
            Markup(
                '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" font-family="sans-serif" font-size="12">'
                "<style>.grid{{stroke:#ddd}}.line{{fill:none;stroke:#2a6f97;stroke-width:2}}.run{{fill:#2a6f97}}"
                ".prediction{{fill:#c1440e;stroke:#c1440e}}text{{fill:#444}}</style>"
                '<rect width="100%" height="100%" fill="#fff"/><text x="0" y="12">bits per byte</text>'
                '<text x="{}" y="{}" text-anchor="end">FLOPs of training</text>'
            ).format(width, height, width - right, height - 6)
        ]
        for y in self.y_ticks:
            parts.append(
                Markup(
                    '<line class="grid" x1="{}" x2="{}" y1="{y}" y2="{y}"/>'
                    '<text x="{}" y="{}" text-anchor="end">{}</text>'
                ).format(left, width - right, left - 8, y_at(y) + 4, f"{y:.2f}", y=y_at(y))
            )
        for x in range(math.ceil(self.x_low), math.floor(self.x_high) + 1):
            parts.append(
                Markup('<text x="{}" y="{}" text-anchor="middle">1e{}</text>').format(x_at(x), height - bottom + 18, x)
            )
        path = " ".join(f"{x_at(x)},{y_at(y)}" for x, y in self.line)
        parts.append(Markup('<polyline class="line" points="{}"/>').format(path))
        for mark in self.runs:
            parts.append(
                Markup('<circle class="run" cx="{}" cy="{}" r="4"><title>{}: {} bits per byte</title></circle>').format(
                    x_at(math.log10(mark.flops)), y_at(mark.bits_per_byte), mark.title, f"{mark.bits_per_byte:.3f}"
                )
            )
        if self.prediction:
            low, high = self.prediction.interval or (self.prediction.bits_per_byte,) * 2
            parts.append(
                Markup(
                    '<g class="prediction"><title>{}: {} bits per byte, {} to {}</title>'
                    '<line x1="{x}" x2="{x}" y1="{}" y2="{}"/><circle cx="{x}" cy="{}" r="4"/></g>'
                ).format(
                    self.prediction.title,
                    *(f"{value:.3f}" for value in (self.prediction.bits_per_byte, low, high)),
                    y_at(low),
                    y_at(high),
                    y_at(self.prediction.bits_per_byte),
                    x=x_at(math.log10(self.prediction.flops)),
                )
            )
        return str(Markup("").join([*parts, Markup("</svg>\n")]))
