"""Bar and line charts as inline SVG: no scripts, no fonts, colours from the page's style sheet."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from markupsafe import Markup, escape

BAR_HEIGHT = 14
BAR_PITCH = 46  # label line, bar, gap
MAX_POINTS = 240


class Bar(NamedTuple):
    """One bar: its label, length, the value as text, a hover title and whether it is ours."""

    label: str
    value: float
    text: str
    title: str = ""
    ours: bool = False


class Point(NamedTuple):
    """One point of a line, with what the reader sees when hovering over it."""

    x: float
    y: float
    title: str


class Line(NamedTuple):
    """One of several lines of a chart: whose it is, and its points in order of x."""

    name: str
    points: Sequence[Point]


class Reference(NamedTuple):
    """A horizontal dashed line to compare with; the text around the chart says what it is."""

    y: float
    title: str


def bar_chart(bars: Sequence[Bar], description: str) -> Markup:
    """Horizontal bars from zero; widths are percentages, so that the text keeps its size on a phone."""
    longest = max((bar.value for bar in bars), default=0.0) or 1.0
    height = BAR_PITCH * len(bars)
    parts = [
        Markup('<svg class="bars" role="img" width="100%" height="{}" aria-label="{}">').format(height, description)
    ]
    for row, bar in enumerate(bars):
        top = row * BAR_PITCH
        kind = "ours" if bar.ours else "other"
        parts.append(
            Markup(
                '<g class="{kind}"><title>{title}</title>'
                '<text class="label" x="0" y="{text_y}">{label}</text>'
                '<text class="value" x="100%" y="{text_y}" text-anchor="end">{text}</text>'
                '<rect class="track" x="0" y="{bar_y}" width="100%" height="{bar_height}" rx="2"/>'
                '<rect class="bar" x="0" y="{bar_y}" width="{width}%" height="{bar_height}" rx="2"/></g>'
            ).format(
                kind=kind,
                title=bar.title or f"{bar.label}: {bar.text}",
                text_y=top + 14,
                label=bar.label,
                text=bar.text,
                bar_y=top + 21,
                bar_height=BAR_HEIGHT,
                width=f"{100 * max(bar.value, 0) / longest:.2f}",
            )
        )
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def line_chart(
    points: Sequence[Point], x_label: str, y_label: str, references: Sequence[Reference] = (), width: int = 680
) -> Markup:
    """One line with axes, units and hover titles: `lines_chart` of a single line."""
    return lines_chart([Line("", points)], x_label, y_label, references, width)


def lines_chart(
    lines: Sequence[Line], x_label: str, y_label: str, references: Sequence[Reference] = (), width: int = 680
) -> Markup:
    """Lines with axes, units and hover titles; at most 240 points of each are drawn, each the mean of its neighbours.

    `points` come in order of x, which begins at 0. Points that are not finite are left out. The vertical axis does not
    begin at zero: it spans the values. The number of a line stands in its class (line-0, line-1, ...), for its colour.
    """
    drawn = [thin([p for p in line.points if math.isfinite(p.x) and math.isfinite(p.y)]) for line in lines]
    points = [point for some in drawn for point in some]
    if not points:
        return Markup("")
    height, left, right, top, bottom = 280, 46, 14, 30, 46
    last = max(point.x for point in points)
    x_ticks = ticks(0, last, 5 if width < 500 else 8)
    lowest = min([point.y for point in points] + [reference.y for reference in references])
    highest = max([point.y for point in points] + [reference.y for reference in references])
    y_ticks = ticks(lowest, highest, 5)
    x_low, x_high = 0.0, last or 1.0
    y_low, y_high = min(y_ticks[0], lowest), max(y_ticks[-1], highest)

    def x_at(x: float) -> float:
        return round(left + (x - x_low) / (x_high - x_low) * (width - left - right), 1)

    def y_at(y: float) -> float:
        return round(top + (y_high - y) / ((y_high - y_low) or 1) * (height - top - bottom), 1)

    parts = [
        Markup('<svg class="lines" role="img" viewBox="0 0 {} {}" aria-label="{}">').format(
            width, height, f"{y_label} against {x_label}"
        ),
        Markup('<text class="axis" x="0" y="12">{}</text>').format(y_label),
        Markup('<text class="axis" x="{}" y="{}" text-anchor="end">{}</text>').format(
            width - right, height - 6, x_label
        ),
    ]
    for value in y_ticks:
        parts.append(
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{y}" y2="{y}"/>'
                '<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>'
            ).format(left, width - right, left - 8, y_at(value) + 4, _tick_text(value, y_ticks), y=y_at(value))
        )
    for value in (value for value in x_ticks if x_low <= value <= x_high):
        parts.append(
            Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(
                x_at(value), height - bottom + 18, _tick_text(value, x_ticks)
            )
        )
    for reference in references:
        parts.append(
            Markup('<line class="reference" x1="{}" x2="{}" y1="{y}" y2="{y}"><title>{}</title></line>').format(
                left, width - right, reference.title, y=y_at(reference.y)
            )
        )
    for number, (line, some) in enumerate(zip(lines, drawn, strict=True)):
        path = " ".join(f"{x_at(point.x)},{y_at(point.y)}" for point in some)
        parts.append(Markup('<g class="line-{}"><polyline class="line" points="{}"/>').format(number, path))
        dots = "dot" if len(some) <= 40 else "dot hidden"
        for point in some:  # the wide invisible circle is what a pointer can hit
            title = f"{line.name}: {point.title}" if line.name else point.title
            parts.append(
                Markup(
                    '<g class="point"><title>{}</title><circle class="hit" cx="{x}" cy="{y}" r="8"/>'
                    '<circle class="{}" cx="{x}" cy="{y}" r="3"/></g>'
                ).format(title, dots, x=x_at(point.x), y=y_at(point.y))
            )
        parts.append(Markup("</g>"))
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` points: means over runs of neighbours, each under the title of its last one."""
    if len(points) <= limit:
        return list(points)
    bounds = [round(i * len(points) / limit) for i in range(limit + 1)]
    groups = [points[start:end] for start, end in pairwise(bounds)]
    return [
        Point(
            sum(point.x for point in group) / len(group),
            sum(point.y for point in group) / len(group),
            f"{group[-1].title} (mean of {len(group)} drawn)",
        )
        for group in groups
    ]


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten) that enclose low .. high, about `most` of them."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _tick_text(value: float, among: Sequence[float]) -> str:
    step = among[1] - among[0] if len(among) > 1 else 1.0
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return str(escape(f"{value:,.{decimals}f}"))
