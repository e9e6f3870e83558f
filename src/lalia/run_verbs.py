"""The verb about runs: parse, call, print."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lalia.arguments import Json, print_json
from lalia.errors import UserError

app = typer.Typer()


@app.command()
def runs(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]...", help="runs to compare, or a folder of runs to list (default: runs/)"),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="draw their learning curves: FILE.svg or FILE.html")] = None,
    as_json: Json = False,
) -> None:
    """List runs, or compare some: in what their settings differ, and what came of it."""
    from lalia.runs import is_run, list_runs

    names = names or []
    if len(names) <= 1 and plot is None and not (names and is_run(_path(names[0]))):
        _list([summary._asdict() for summary in list_runs(_path(names[0]) if names else Path("runs"))], as_json)
        return
    _compare(names, plot, as_json)


def _path(name: str) -> Path:
    """A folder by path, or by its name under runs/."""
    path = Path(name).expanduser()
    return path if path.is_dir() or not (Path("runs") / name).is_dir() else Path("runs") / name


def _list(summaries: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json(summaries)
        return
    if not summaries:
        print("no runs here; `lalia run` makes one")
        return
    rows = [("run", "state", "parameters", "tokens", "bits/byte", "minutes", "tokens/s", "started")]
    for run in summaries:
        started = run["started"]
        rows.append(
            (
                run["name"],
                f"{run['state']}: {run['stage']}"
                if run["state"] in ("interrupted", "running", "stopped")
                else run["state"],
                _number(run["parameters"], 1e6, "{:.2f} M"),
                _number(run["tokens"], 1e6, "{:,.2f} M"),
                _number(run["bits_per_byte"], 1.0, "{:.3f}"),
                _number(run["minutes"], 1.0, "{:,.1f}"),
                _number(run["tokens_per_second"], 1.0, "{:,.0f}"),
                time.strftime("%Y-%m-%d %H:%M", time.localtime(started)) if started is not None else "-",
            )
        )
    _print_table(rows)
    for run in summaries:
        if run["problem"]:
            print(f"\n{run['path']} is damaged: {run['problem']}")


def _compare(names: Sequence[str], plot: Path | None, as_json: bool) -> None:
    from lalia.evaluation.records import Metrics
    from lalia.evaluation.wording import plain
    from lalia.runs import compare, find_run, names_of, read_run

    if not names:
        raise UserError("--plot draws the runs that are named; give one or more: lalia runs RUN RUN --plot FILE")
    folders = [find_run(name) for name in names]
    found = compare(folders)
    titles = {
        "figures": "What came of them",
        "settings": "Settings that differ",
        "plan": "Planned values that differ",
        "environment": "Code and machine, where they differ",
    }
    shown = names_of(folders)
    if plot is not None:
        from lalia.evaluation.comparison import write_comparison

        metrics = [read_run(folder).metrics.get("base", Metrics([], [])) for folder in folders]
        write_comparison(plot, shown, metrics, {title: found[key] for key, title in titles.items()})
    if as_json:
        print_json(found | ({"plot": str(plot)} if plot else {}))
        return
    for key, title in titles.items():
        if found[key]:
            print(f"{title}")
            _print_table([("", *shown), *((name, *map(plain, values)) for name, values in found[key].items())])
            print()
    if len(folders) > 1 and not found["settings"]:
        print("The settings are the same.")
    if plot is not None:
        print(f"written to {plot}")


def _number(value: float | None, unit: float, form: str) -> str:
    return "-" if value is None else form.format(value / unit)


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as what stands in them, the first to the left and the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip())
