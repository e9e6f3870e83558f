"""What a run folder has recorded, read leniently about absence and strictly about damage."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from lalia.errors import CorruptFile, UserError
from lalia.files import read_json

STAGES = ("documents", "tokens", "plan", "base", "chat", "evaluation")
TRAINING_STAGES = ("base", "chat")


class Metrics(NamedTuple):
    """metrics.jsonl of one training stage, by kind of event, in order of steps."""

    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]


class Records(NamedTuple):
    """Everything a run folder has recorded; a file that is absent gives an empty record."""

    run: Path
    recipe: str
    environment: dict[str, Any]
    plan: dict[str, Any]
    card: dict[str, Any]
    tokens: dict[str, Any]
    metrics: dict[str, Metrics]  # by training stage, those that ran
    results: dict[str, Any]
    receipts: dict[str, dict[str, Any]]  # by stage, those that finished: the summary, and the stage's seconds


def read_records(run: Path) -> Records:
    """Read the records of a run folder.

    Raises:
        UserError: if `run` is not a folder with records of a run.
        CorruptFile: if a record is there but cannot be read.
    """
    records = Records(
        run=run,
        recipe=_text(run / "recipe.toml"),
        environment=_object(run / "environment.json"),
        plan=_object(run / "plan" / "plan.json") or _object(run / "plan.json"),
        card=_object(run / "documents" / "card.json"),
        tokens=_object(run / "tokens" / "manifest.json"),
        metrics={stage: found for stage in TRAINING_STAGES if (found := read_metrics(run / stage / "metrics.jsonl"))},
        results=_object(run / "evaluation" / "results.json"),
        receipts={stage: found for stage in STAGES if (found := _receipt(run / stage / "receipt.json"))},
    )
    if not any(records[1:]):
        raise UserError(f"{run} holds no records of a run; give the folder of a run, for example runs/shakespeare")
    return records


def read_metrics(path: Path) -> Metrics | None:
    """Events of a metrics.jsonl, None if there is none; a step logged again after a resume counts once, as last logged.

    Raises:
        CorruptFile: if a line is not a JSON object; a half-written last line (a killed run) is passed over.
    """
    if not path.exists():
        return None
    by_step: dict[str, dict[int, dict[str, Any]]] = {"step": {}, "evaluation": {}}
    lines = _text(path).splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
            if event["event"] in by_step:
                by_step[event["event"]][event["step"]] = event
        except (json.JSONDecodeError, TypeError, KeyError):
            if number == len(lines) and not line.endswith("\n"):
                break
            raise CorruptFile(
                f"{path}, line {number} is not an event; delete the line, or run the stage again"
            ) from None
    steps, evaluations = ([events[step] for step in sorted(events)] for events in by_step.values())
    return Metrics(steps, evaluations)


def number(record: dict[str, Any], *names: str) -> float | None:
    """The first of `names` in `record` that is a finite number."""
    for name in names:
        value = record.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return value
    return None


def _receipt(path: Path) -> dict[str, Any]:
    receipt = _object(path)
    summary = receipt.get("summary", {})
    return {**summary, **{key: value for key, value in receipt.items() if key not in ("summary", "identity")}}


def _object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise CorruptFile(f"{path} should hold a JSON object; delete it and run the same command again")
    return content


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") if path.exists() else ""
    except UnicodeDecodeError as error:
        raise CorruptFile(f"{path} is not UTF-8 text ({error}); delete it and run the same command again") from None
