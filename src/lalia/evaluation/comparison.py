"""Learning curves of several runs over each other, as one SVG drawing or as a page with the runs' differences."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from lalia.errors import UserError
from lalia.evaluation import wording
from lalia.evaluation.charts import Line, Point, lines_chart
from lalia.evaluation.records import Metrics, number
from lalia.files import write_text

WIDTH, HEIGHT, GAP, LEGEND_LINE = 680, 280, 40, 26

COLOURS = (
    ("#0b6e69", "#4fb8ae"),
    ("#a8442a", "#e58a6d"),
    ("#3b5b9d", "#8fabe6"),
    ("#8a6a12", "#d3b35a"),
    ("#75458c", "#c295d9"),
    ("#5d5a54", "#b5b0a5"),
)
"""Of each line, on light and on dark paper."""

DASHES = ("none", "7 3", "2 3", "9 3 2 3", "5 5", "1 5")
"""A second mark of each line, for those who do not tell the colours apart."""


def _style() -> str:
    """Colours and type of the charts, alike in a page and in a drawing by itself."""
    light = "".join(f"--line-{i}: {colour[0]}; " for i, colour in enumerate(COLOURS))
    dark = "".join(f"--line-{i}: {colour[1]}; " for i, colour in enumerate(COLOURS))
    lines = "".join(
        f".line-{i} {{ stroke: var(--line-{i}); fill: var(--line-{i}); }}\n"
        f".line-{i} .line, .line-{i} .swatch {{ stroke-dasharray: {dashes}; }}\n"
        for i, dashes in enumerate(DASHES)
    )
    return (
        f":root {{ --paper: #fbfaf6; --ink: #1d1c1a; --soft: #65615a; --rule: #e2ded5; {light}}}\n"
        "@media (prefers-color-scheme: dark) {\n"
        f":root {{ --paper: #161614; --ink: #ebe8e0; --soft: #a19c91; --rule: #34332f; {dark}}}\n}}\n"
        "svg { font-family: system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif; }\n"
        "svg text { fill: var(--soft); font-size: 13px; stroke: none; }\n"
        ".legend text { fill: var(--ink); font-size: 14px; }\n"
        ".title { fill: var(--ink) !important; font-size: 16px !important; font-weight: 600; }\n"
        f"{lines}"
        ".line, .swatch { fill: none; stroke-width: 2; stroke-linejoin: round; }\n"
        ".dot { stroke: none; }\n"
        ".dot.hidden, .hit { fill: transparent; stroke: none; }\n"
        ".point:hover .dot { fill: inherit; }\n"
        ".grid { stroke: var(--rule); }\n"
    )


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ names | join(" and ") }} - runs compared</title>
<style>
{{ style }}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.6 system-ui, sans-serif; }
main { max-width: 760px; margin: 0 auto; padding: 56px 24px 80px; }
h1, h2 { font-family: Georgia, serif; font-weight: 500; line-height: 1.2; overflow-wrap: anywhere; }
h1 { font-size: 32px; margin: 0 0 16px; } h2 { font-size: 22px; margin: 48px 0 12px; }
.note { color: var(--soft); font-size: 14px; max-width: 66ch; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; line-height: 1.45; }
th, td { text-align: right; padding: 7px 0 7px 20px; border-bottom: 1px solid var(--rule); vertical-align: top;
  overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
th { font-weight: 400; color: var(--soft); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
.narrow { display: none; }
@media (max-width: 600px) { .wide { display: none; } .narrow { display: block; } }
</style>
</head>
<body>
<main>
<h1>{{ names | join(", ") }}</h1>
{{ legend }}
{% for title, rows in tables %}
<h2>{{ title }}</h2>
<div class="scroll"><table>
<thead><tr><th></th>{% for name in names %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endfor %}
{% for title, wide, narrow in charts %}
<h2>{{ title }}</h2>
<div class="wide">{{ wide }}</div>
<div class="narrow">{{ narrow }}</div>
{% endfor %}
<p class="note">Bits per byte are of held-out text and can be compared between tokenizers; the training loss, in nats
per token, only where the tokenizer is the same. Time is that of training, without evaluations and checkpoints.</p>
</main>
</body>
</html>
"""


def write_comparison(out: Path, names: Sequence[str], metrics: Sequence[Metrics], tables: Mapping[str, Any]) -> None:
    """Draw bits per byte and loss of runs over tokens and over seconds.

    Args:
        out: .svg for the four charts, .html for a page with the tables too.
        names: of the runs.
        metrics: of their base models' training.
        tables: by title, key -> one value per run.

    Raises:
        UserError: if the file's name ends otherwise, or nothing can be drawn.
    """
    if out.suffix not in (".svg", ".html"):
        raise UserError(f"--plot {out}: expected a file that ends in .svg or .html")
    charts = {title: draw for title, draw in _charts(names, metrics).items() if draw(WIDTH)}
    if not charts:
        raise UserError("none of these runs has trained for a step, so there is nothing to plot; --json has the rest")
    if out.suffix == ".svg":
        write_text(out, _drawing(names, {title: draw(WIDTH) for title, draw in charts.items()}))
        return
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(PAGE).render(
        names=names,
        style=Markup(_style()),
        legend=_legend(names, Markup('<svg class="legend" viewBox="0 0 {} {}" role="img" aria-label="Legend">')),
        tables=[
            (title, [(key, *map(wording.plain, values)) for key, values in rows.items()])
            for title, rows in tables.items()
            if rows
        ],
        charts=[(title, draw(WIDTH), draw(350)) for title, draw in charts.items()],
    )
    write_text(out, page)


def _charts(names: Sequence[str], metrics: Sequence[Metrics]) -> dict[str, Callable[[int], Markup]]:
    """By title, what draws the chart in a width; it draws nothing where there are no points."""
    charts: dict[str, Callable[[int], Markup]] = {}
    for what, key, y_label, over_evaluations in (
        ("Bits per byte", "bits_per_byte", "bits per byte", True),
        ("Training loss", "loss", "nats per token", False),
    ):
        for x_key, x_title in (("tokens", "over tokens"), ("seconds", "over time")):
            lines, x_label = _lines(names, metrics, key, x_key, over_evaluations)
            charts[f"{what} {x_title}"] = lambda width, lines=lines, x=x_label, y=y_label: lines_chart(
                lines, x, y, width=width
            )
    return charts


def _lines(
    names: Sequence[str], metrics: Sequence[Metrics], key: str, x_key: str, over_evaluations: bool
) -> tuple[list[Line], str]:
    points: list[list[tuple[float, float, int]]] = []
    for some in metrics:
        events = some.evaluations if over_evaluations else some.steps
        xs = _tokens_of(some, events) if x_key == "tokens" else [number(event, x_key) for event in events]
        ys = [number(event, key) for event in events]
        points.append(
            [
                (x, y, event["step"])
                for x, y, event in zip(xs, ys, events, strict=True)
                if x is not None and y is not None
            ]
        )
    last = max((x for some in points for x, _, _ in some), default=0.0)
    unit, label = _unit(x_key, last)
    lines = [
        Line(name, [Point(x / unit, y, f"step {step:,}, {x / unit:.3g} {label}: {y:.3f}") for x, y, step in some])
        for name, some in zip(names, points, strict=True)
    ]
    return lines, label


def _tokens_of(metrics: Metrics, events: Sequence[dict[str, Any]]) -> list[float | None]:
    """Tokens trained on at each event: its own record, or in proportion to the steps between two that have one."""
    known = [(0, 0.0), *((e["step"], tokens) for e in metrics.steps if (tokens := number(e, "tokens")) is not None)]
    found: list[float | None] = []
    for event in events:
        tokens, step = number(event, "tokens"), event["step"]
        before = max((entry for entry in known if entry[0] <= step), default=known[0])
        after = min((entry for entry in known if entry[0] >= step), default=None)
        if tokens is None and after is not None:
            share = (step - before[0]) / (after[0] - before[0]) if after[0] > before[0] else 0.0
            tokens = before[1] + share * (after[1] - before[1])
        found.append(tokens)
    return found


def _unit(x_key: str, last: float) -> tuple[float, str]:
    if x_key == "seconds":
        return next(
            ((size, unit) for size, unit in ((3600.0, "hours"), (60.0, "minutes")) if last >= 2 * size),
            (1.0, "seconds"),
        )
    sizes = ((1e9, "billion tokens"), (1e6, "million tokens"), (1e3, "thousand tokens"))
    return next(((size, unit) for size, unit in sizes if last >= size), (1.0, "tokens"))


def _legend(names: Sequence[str], opening: Markup) -> Markup:
    parts = [opening.format(WIDTH, LEGEND_LINE * len(names))]
    for row, name in enumerate(names):
        middle = row * LEGEND_LINE + LEGEND_LINE // 2
        parts.append(
            Markup(
                '<g class="line-{}"><line class="swatch" x1="0" x2="36" y1="{y}" y2="{y}"/>'
                '<text x="46" y="{}">{}</text></g>'
            ).format(row, middle + 5, name, y=middle)
        )
    return Markup("").join([*parts, Markup("</svg>")])


def _drawing(names: Sequence[str], charts: Mapping[str, Markup]) -> str:
    """All charts in two columns, with the legend above, as a file of its own."""
    margin, above = 32, 30
    top = margin + LEGEND_LINE * len(names) + 24
    rows = (len(charts) + 1) // 2
    width, height = 2 * margin + 2 * WIDTH + GAP, top + rows * (above + HEIGHT + GAP)
    opening = '<svg class="legend" x="' + str(margin) + '" y="' + str(margin) + '" width="{}" height="{}">'
    parts = [
        Markup(
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" height="{h}">'
            '<style>{}</style><rect width="100%" height="100%" style="fill: var(--paper)"/>'
        ).format(Markup(_style()), w=width, h=height),
        _legend(names, Markup(opening)),
    ]
    for index, (title, chart) in enumerate(charts.items()):
        x, y = margin + index % 2 * (WIDTH + GAP), top + index // 2 * (above + HEIGHT + GAP)
        parts.append(
            Markup(
                '<text class="title" x="{x}" y="{}">{}</text><svg x="{x}" y="{}" width="{}" height="{}">{}</svg>'
            ).format(y + 14, title, y + above, WIDTH, HEIGHT, chart, x=x)
        )
    return str(Markup("").join([*parts, Markup("</svg>\n")]))
