"""Runs side by side: which there are, how far each came, in what two of them differ."""

import difflib
import fcntl
import json
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lalia.errors import CorruptFile, UserError
from lalia.evaluation.records import Metrics, Records, number, read_metrics, read_records
from lalia.provenance import read_starts

LAST_STAGE = "report"
MOST_COMPARED = 6
MARKS = ("recipe.toml", "log.jsonl", "run.lock", "environment.json")
"""A folder with one of these is a run's."""


class Summary(NamedTuple):
    """One run in a list; None where nothing is recorded.

    Attributes:
        state: finished, interrupted, running, stopped (the last stage asked for is done), empty or damaged.
        stage: the last one that was worked on.
        parameters: weights of the model.
        tokens: tokens trained on, of the base model.
        bits_per_byte: of the base model on held-out text, as last measured.
        minutes: of work on all stages.
        tokens_per_second: of the base model's training.
        started: seconds since the epoch.
        problem: what is damaged.
    """

    name: str
    path: str
    state: str
    stage: str | None = None
    parameters: float | None = None
    tokens: float | None = None
    bits_per_byte: float | None = None
    minutes: float | None = None
    tokens_per_second: float | None = None
    started: float | None = None
    problem: str | None = None


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, whatever state it is in."""
    return any((folder / name).exists() for name in MARKS)


def list_runs(folder: Path = Path("runs")) -> list[Summary]:
    """The runs in a folder, the oldest first; damaged ones are listed as such, other folders are passed over.

    Raises:
        UserError: if the folder does not exist.
    """
    if not folder.is_dir():
        raise UserError(
            f"there is no folder {folder} here; `lalia run` makes one with a first run, or name the one where runs are"
        )
    found = [summarize(path) for path in sorted(folder.iterdir()) if path.is_dir() and is_run(path)]
    return sorted(found, key=lambda summary: summary.started or 0.0)


def find_run(name: str) -> Path:
    """The folder of a run, given by path or by its name under runs/.

    Raises:
        UserError: if there is none, with the nearest name.
    """
    for path in (Path(name).expanduser(), Path("runs") / name):
        if path.is_dir() and is_run(path):
            return path
    names = [path.name for path in Path("runs").glob("*") if is_run(path)]
    nearest = difflib.get_close_matches(name, names, n=1)
    hint = f", did you mean {nearest[0]!r}?" if nearest else ""
    raise UserError(f"no run {name!r}{hint or '.'} Give the folder of a run, or its name under runs/")


def summarize(folder: Path) -> Summary:
    """One run as a line of a list; never an error: a run that cannot be read is "damaged"."""
    name, path = folder.resolve().name, str(folder)
    started = _started(folder)
    try:
        records = _records(folder)
        if records is None:
            return Summary(name, path, "running" if _is_locked(folder) else "empty", started=started)
        figures = final_figures(records)
        _settings(records)
    except (UserError, AttributeError, TypeError, ValueError, OSError) as error:  # a record of a wrong shape
        return Summary(name, path, "damaged", started=started, problem=str(error) or type(error).__name__)
    state, stage = _state(folder, records)
    seconds = figures["seconds"]
    return Summary(
        name,
        path,
        state,
        stage,
        figures["parameters"],
        figures["tokens"],
        figures["bits_per_byte"],
        None if seconds is None else seconds / 60,
        figures["tokens_per_second"],
        started,
    )


def final_figures(records: Records) -> dict[str, float | None]:
    """What came of a run, as far as it came: the same keys for every run, None where nothing is recorded."""
    base = records.receipts.get("base", {})
    planned = {key: entry.get("value") for key, entry in records.plan.get("values", {}).items()}
    metrics = records.metrics.get("base", Metrics([], []))
    last = {**(metrics.evaluations[-1] if metrics.evaluations else {}), **(metrics.steps[-1] if metrics.steps else {})}
    scores = records.results.get("bits_per_byte", {})
    chat = records.metrics.get("chat", Metrics([], []))

    def trained(*names: str) -> float | None:
        found = number(base, *names)
        return number(last, *names) if found is None else found

    def score(stage: str, evaluations: list[dict[str, Any]]) -> float | None:
        found = number(scores, stage)
        measured = [value for event in evaluations if (value := number(event, "bits_per_byte")) is not None]
        return found if found is not None else measured[-1] if measured else None

    return {
        "parameters": number(planned, "parameters"),
        "steps": trained("steps", "step"),
        "tokens": trained("tokens"),
        "bits_per_byte": score("base", metrics.evaluations),
        "chat_bits_per_byte": score("chat", chat.evaluations),
        "loss": number(last, "loss"),
        "training_seconds": trained("training_seconds", "seconds"),
        "tokens_per_second": trained("tokens_per_second"),
        "mfu": trained("mfu"),
        "mfu_measured": trained("mfu_measured"),
        "data_wait_share": trained("data_wait_share"),
        "goodput": trained("goodput"),
        "peak_memory_bytes": trained("peak_memory_bytes"),
        "skipped_steps": trained("skipped_steps", "skipped"),
        "seconds": _seconds(records),
    }


def compare(folders: Sequence[Path]) -> dict[str, Any]:
    """Runs side by side: {"runs", "settings", "plan", "environment", "figures"}.

    Each of the last four maps a key to a list with one value per run, None where it lacks the key; settings, plan and
    environment have only the keys in which the runs differ.

    Raises:
        UserError: if there are too many, or a run has no records.
        CorruptFile: if a record is damaged.
    """
    if len(folders) > MOST_COMPARED:
        raise UserError(f"{len(folders)} runs are too many to compare; name at most {MOST_COMPARED}")
    for folder in folders:
        if problem := summarize(folder).problem:
            raise CorruptFile(f"cannot compare {folder}: {problem}")
    found = [read_run(folder) for folder in folders]
    figures = [final_figures(records) for records in found]
    beside = {key: [some[key] for some in figures] for key in figures[0]}
    return {
        "runs": [str(folder) for folder in folders],
        "settings": differences([_settings(records) for records in found]),
        "plan": differences([_planned(records) for records in found]),
        "environment": differences([records.environment | _code(records.run) for records in found]),
        "figures": {key: row for key, row in beside.items() if any(value is not None for value in row)},
    }


def read_run(folder: Path) -> Records:
    """The records of a run; those of stages that are not finished included.

    Raises:
        UserError: if it has none yet.
        CorruptFile: if one is damaged.
    """
    records = _records(folder)
    if records is None:
        raise UserError(f"{folder} has recorded nothing yet; continue it with: lalia run {folder}")
    return records


def differences(values: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """The keys, nested ones joined by dots, whose values are not all equal, in order of first appearance."""
    flat = [dict(_leaves(some)) for some in values]
    beside = {key: [some.get(key) for some in flat] for key in dict.fromkeys(key for some in flat for key in some)}
    return {key: row for key, row in beside.items() if any(value != row[0] for value in row)}


def names_of(folders: Sequence[Path]) -> list[str]:
    """What to call runs beside each other: their folders' names, or paths where two have the same."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _records(folder: Path) -> Records | None:
    """Records with the metrics of a stage that is being worked on in the place of an older result's; None if none."""
    partial = {stage: read_metrics(folder / f".{stage}.partial" / "metrics.jsonl") for stage in ("base", "chat")}
    if not any((folder / name).exists() for name in ("recipe.toml", "environment.json")) and not any(partial.values()):
        return None
    records = read_records(folder)
    current = {stage: metrics for stage, metrics in partial.items() if metrics}
    receipts = {stage: receipt for stage, receipt in records.receipts.items() if stage not in current}
    return records._replace(metrics=records.metrics | current, receipts=receipts)


def _state(folder: Path, records: Records) -> tuple[str, str | None]:
    partial = [path.name[1:].removesuffix(".partial") for path in sorted(folder.glob(".*.partial"))]
    done = [*records.receipts]
    stage = partial[0] if partial else done[-1] if done else None
    if _is_locked(folder):
        return "running", stage
    if partial:
        return "interrupted", stage
    if (folder / LAST_STAGE / "receipt.json").exists():
        return "finished", LAST_STAGE
    return ("stopped", stage) if done else ("empty", None)


def _is_locked(folder: Path) -> bool:
    try:
        with (folder / "run.lock").open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _started(folder: Path) -> float | None:
    """When the first process began to work on a run."""
    if starts := read_starts(folder):
        return number(starts[0], "time")
    try:
        with (folder / "log.jsonl").open(encoding="utf-8") as lines:
            return number(json.loads(next(lines)), "time")
    except (OSError, ValueError, StopIteration, AttributeError):
        pass
    try:
        return (folder / "recipe.toml").stat().st_mtime
    except OSError:
        return None


def _seconds(records: Records) -> float | None:
    found = [seconds for receipt in records.receipts.values() if (seconds := number(receipt, "seconds")) is not None]
    for partial in records.run.glob(".*.partial/.seconds"):
        try:
            found.append(float(partial.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            continue
    for stage, metrics in records.metrics.items():  # a stage that runs, or was killed, has not written its seconds
        if stage not in records.receipts and not (records.run / f".{stage}.partial" / ".seconds").exists():
            found += [seconds for event in metrics.steps[-1:] if (seconds := number(event, "seconds")) is not None]
    return sum(found) if found else None


def _settings(records: Records) -> dict[str, Any]:
    try:
        return tomllib.loads(records.recipe)
    except tomllib.TOMLDecodeError as error:
        raise CorruptFile(
            f"{records.run / 'recipe.toml'} is not valid TOML ({error}); start the run again with its recipe and "
            f"--run {records.run}"
        ) from None


def _planned(records: Records) -> dict[str, Any]:
    return {key: entry["value"] for key, entry in records.plan.get("values", {}).items()}


def _code(folder: Path) -> dict[str, Any]:
    starts = read_starts(folder)
    return {f"code.{key}": starts[-1].get(key) for key in ("source_sha256", "diff")} if starts else {}


def _leaves(values: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if not isinstance(values, dict):
        yield prefix, values
        return
    for key, value in values.items():
        yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
