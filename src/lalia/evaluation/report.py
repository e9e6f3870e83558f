"""report.html: everything a run has recorded, on one page that needs nothing but a browser."""

from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from lalia.evaluation import wording
from lalia.evaluation.charts import Bar, Point, Reference, bar_chart, line_chart
from lalia.evaluation.records import TRAINING_STAGES, Metrics, Records, number, read_records
from lalia.files import write_text

MAX_SAMPLES_OVER_TIME = 6
MAX_HELD_OUT = 50
CHART_WIDTHS = {"wide": 680, "narrow": 350}  # the style sheet shows the one that fits

STAGE_TITLES = {"base": "Base model", "chat": "Assistant"}
OTHER_TOKENIZERS = {"gpt2": "GPT-2", "cl100k": "cl100k (GPT-4)"}
# Predictions of the planner: how they are worded, and the stage and name under which the outcome is recorded.
PREDICTIONS: dict[str, tuple[str, Callable[[float], str], str, str]] = {
    "seconds": ("Training time, base model", wording.duration, "base", "training_seconds"),
    "tokens_per_second": ("Tokens per second, base model", wording.count, "base", "tokens_per_second"),
    "memory_bytes": ("Peak memory, base model", wording.size, "base", "peak_memory_bytes"),
    "bits_per_byte": ("Bits per byte, base model", wording.bits_per_byte, "base", "bits_per_byte"),
}


class Row(NamedTuple):
    """One line of plan versus outcome, as text."""

    what: str
    predicted: str
    between: str
    measured: str
    error: str


class Table(NamedTuple):
    """A table of text; columns after the first hold numbers."""

    columns: list[str]
    rows: list[list[str]]


def write_report(run: Path, out: Path) -> None:
    """Write one self-contained HTML page about a run: no scripts, no external resources.

    Args:
        run: run folder; a record it lacks leaves out the part of the page that would show it.
        out: the page to write, replaced if it exists.

    Raises:
        UserError: if the folder holds no records of a run.
        CorruptFile: if a record is there but cannot be read.
    """
    write_text(out, render(read_records(run)))


def render(records: Records) -> str:
    """The page. Everything that comes from records is escaped: text of data and models is not trusted."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(wording=wording)
    source = (resources.files("lalia.evaluation") / "report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        name=records.run.resolve().name,
        facts=_facts(records),
        lede=_lede(records),
        verdict=_verdict(records),
        bars=_bars(records),
        baselines=records.results.get("baselines", []),
        curves=_curves(records),
        plan=_plan(records),
        funnel=_funnel(records.card),
        splits=_splits(records),
        held_out=_held_out(records),
        overlap=_overlap(records.card),
        tokens=_tokens(records),
        over_time=_samples_over_time(records),
        samples=records.results.get("samples", []),
        conversations=records.results.get("conversations", []),
        turns_ended=records.results.get("turns_ended"),
        settings=_settings(records.plan),
        recipe=records.recipe,
        environment=list(_flat(records.environment)),
        model_folder=_model_folder(records),
        is_chat="chat" in records.receipts or "chat" in records.metrics,
    )


def _facts(records: Records) -> list[tuple[str, str]]:
    """The few figures under the title, those that are recorded."""
    found = [
        ("bits per byte, held-out text", _headline_score(records), wording.bits_per_byte),
        ("parameters", _num_parameters(records), wording.short_count),
        ("tokens trained on", number(records.receipts.get("base", {}), "tokens"), wording.short_count),
        ("from raw text to here", _total_seconds(records), wording.duration),
    ]
    return [(label, word(value)) for label, value, word in found if value is not None]


def _lede(records: Records) -> str:
    parameters = _num_parameters(records)
    kind = "language model" if parameters is None else f"language model of {wording.short_count(parameters)} parameters"
    trained = " and finetuned into an assistant" if "chat" in records.receipts else ""
    source = records.card.get("title") or records.card.get("source")
    on = f" on text from {source}" if isinstance(source, str) else ""
    return f"A {kind}, trained from nothing{on}{trained}."


def _num_parameters(records: Records) -> float | None:
    plan = {key: entry.get("value") for key, entry in _planned_values(records.plan).items()}
    for record in (records.receipts.get("base", {}), records.results, plan):
        if (found := number(record, "num_parameters", "parameters")) is not None:
            return found
    return None


def _total_seconds(records: Records) -> float | None:
    seconds = [found for receipt in records.receipts.values() if (found := number(receipt, "seconds")) is not None]
    return sum(seconds) if seconds else None


def _scores(records: Records) -> dict[str, float]:
    """Bits per byte of each model that was evaluated."""
    scores = records.results.get("bits_per_byte", {})
    return {stage: found for stage in TRAINING_STAGES if (found := number(scores, stage)) is not None}


def _headline_score(records: Records) -> float | None:
    return _scores(records).get("base")


def _verdict(records: Records) -> list[str]:
    """In plain words, which baselines each model beats and which it does not."""
    rivals = records.results.get("baselines", [])
    return [_sentence(STAGE_TITLES[stage].lower(), score, rivals) for stage, score in _scores(records).items()]


def _sentence(model: str, score: float, rivals: list[dict[str, Any]]) -> str:
    beaten = [rival for rival in rivals if score < rival["bits_per_byte"]]
    unbeaten = sorted((rival for rival in rivals if score >= rival["bits_per_byte"]), key=_bits)

    def listed(some: Iterable[dict[str, Any]]) -> str:
        return ", ".join(f"{rival['name']} ({wording.bits_per_byte(_bits(rival))})" for rival in some)

    needs = f"On held-out text the {model} needs {wording.bits_per_byte(score)} bits for each byte."
    if not rivals:
        return needs
    if not unbeaten:
        nearest = min(rivals, key=_bits)
        more = 100 * (_bits(nearest) / score - 1)
        return (
            f"{needs} It beats all {len(rivals)} baselines; the nearest, {listed([nearest])}, needs {more:.1f} % more."
        )
    if not beaten:
        return f"{needs} It does NOT beat any of the {len(rivals)} baselines: {listed(unbeaten)}."
    return f"{needs} It does NOT beat {listed(unbeaten)}; it beats the other {len(beaten)} baselines."


def _bits(baseline: dict[str, Any]) -> float:
    return baseline["bits_per_byte"]


def _bars(records: Records) -> Markup | None:
    ours = [
        Bar(f"this {STAGE_TITLES[stage].lower()}", score, wording.bits_per_byte(score), "", ours=True)
        for stage, score in _scores(records).items()
    ]
    theirs = [
        Bar(
            rival["name"], _bits(rival), wording.bits_per_byte(_bits(rival)), f"{rival['name']}: {rival.get('how', '')}"
        )
        for rival in records.results.get("baselines", [])
    ]
    if not ours:
        return None
    bars = sorted(ours + theirs, key=lambda bar: bar.value)
    return bar_chart(bars, "Bits per byte of this model and the baselines; shorter is better")


def _curves(records: Records) -> list[dict[str, Any]]:
    return [
        {"title": STAGE_TITLES[stage], "charts": charts}
        for stage, metrics in records.metrics.items()
        if (charts := _stage_charts(metrics, records.results.get("baselines", []) if stage == "base" else []))
    ]


def _stage_charts(metrics: Metrics, rivals: list[dict[str, Any]]) -> list[dict[str, Any]]:
    end = max((number(event, "seconds") or 0 for event in (*metrics.steps, *metrics.evaluations)), default=0)
    unit, unit_seconds = ("minutes", 60.0) if end >= 120 else ("seconds", 1.0)
    x_label = f"training time, {unit}"

    def points(events: list[dict[str, Any]], key: str, decimals: int) -> list[Point]:
        found: list[Point] = []
        for event in events:
            x, y = number(event, "seconds"), number(event, key)
            if x is not None and y is not None:
                when = f"step {event['step']:,}, {wording.duration(x)}"
                found.append(Point(x / unit_seconds, y, f"{when}: {y:.{decimals}f}"))
        return found

    charts: list[dict[str, Any]] = []
    loss, bits = points(metrics.steps, "loss", 3), points(metrics.evaluations, "bits_per_byte", 3)
    best = min(rivals, key=_bits, default=None)
    references = [Reference(_bits(best), f"{best['name']}: {wording.bits_per_byte(_bits(best))}")] if best else []
    if any(event.get("all_of_validation") is False for event in metrics.evaluations):
        held_out = "Never trained on; the last point is all of it, those before an excerpt. Lower is better."
    else:
        held_out = "Never trained on; lower is better."
    dashed = f" Dashed: the best baseline, {references[0].title}." if references else ""
    for title, caption, line, marks, y_label in (
        ("Training loss", "Of the training text, mean since the point before.", loss, [], "loss, nats per token"),
        ("Held-out text", held_out + dashed, bits, references, "bits per byte"),
    ):
        if len(line) > 1:
            drawn = {size: line_chart(line, x_label, y_label, marks, width) for size, width in CHART_WIDTHS.items()}
            lost = sum(1 for event in metrics.steps if number(event, "loss") is None) if line is loss else 0
            note = f" {lost} points without a finite loss are not drawn." if lost else ""
            charts.append({"title": title, "caption": caption + note, "drawn": drawn})
    return charts


def _plan(records: Records) -> list[Row]:
    predicted = records.plan.get("predicted", {})
    rows: list[Row] = []
    for key, (what, word, stage, name) in PREDICTIONS.items():
        guess = number(predicted, key)
        outcome = number(records.receipts.get(stage, {}), name)
        if key == "bits_per_byte" and (score := _headline_score(records)) is not None:
            outcome = score
        if guess is None or (stage == "chat" and "chat" not in records.receipts):
            continue
        interval = predicted.get(f"{key}_interval")
        between = f"{word(interval[0])} to {word(interval[1])}" if interval else ""
        if outcome is None:
            rows.append(Row(what, word(guess), between, "not recorded", ""))
        else:
            error = f"{100 * (outcome / guess - 1):+.1f} %" if guess else ""
            rows.append(Row(what, word(guess), between, word(outcome), error))
    return rows


def _planned_values(plan: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The plan's values with their reasons; a bare value has none."""
    values = plan.get("values", {})
    return {key: entry if isinstance(entry, dict) else {"value": entry} for key, entry in values.items()}


def _settings(plan: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [
        (key, wording.plain(entry.get("value")), wording.plain(entry.get("reason", "")))
        for key, entry in _planned_values(plan).items()
    ]


def _funnel(card: dict[str, Any]) -> Table | None:
    """What every rule of cleaning did, in the order in which they ran."""
    rows = [
        [
            rule.get("what") or wording.title(rule["rule"]),
            *(wording.count(rule[f"documents_{kind}"]) for kind in ("changed", "cut", "dropped", "out")),
            wording.size(rule["bytes_in"] - rule["bytes_out"]),
        ]
        for rule in card.get("funnel", [])
    ]
    return Table(["Rule", "Changed", "Cut", "Dropped", "Left", "Text removed"], rows) if rows else None


def _overlap(card: dict[str, Any]) -> str | None:
    """How much of the held-out text also stands in the training text."""
    overlap = card.get("overlap", {})
    paragraphs = overlap.get("paragraphs")
    if not paragraphs:
        return None
    return (
        f"Of {wording.count(paragraphs['held_out'])} held-out paragraphs of at least {overlap['paragraph_characters']} "
        f"characters, {wording.count(paragraphs['also_in_training'])} also stand in the training text."
    )


def _splits(records: Records) -> Table | None:
    rows: list[list[str]] = []
    splits = records.card.get("splits", {})
    for split in ("train", "validation"):
        counts = splits.get(split) or records.tokens.get("splits", {}).get(split)
        if isinstance(counts, dict):
            documents, num_bytes = number(counts, "documents", "num_documents"), number(counts, "bytes", "num_bytes")
            if documents is not None and num_bytes is not None:
                rows.append([wording.title(split), wording.count(documents), wording.size(num_bytes)])
    return Table(["Split", "Documents", "Text"], rows) if rows else None


def _held_out(records: Records) -> list[str]:
    works = records.card.get("held_out") or records.results.get("held_out", [])
    shown = [wording.plain(work) for work in works[:MAX_HELD_OUT]]
    return [*shown, f"and {wording.count(len(works) - MAX_HELD_OUT)} more"] if len(works) > MAX_HELD_OUT else shown


def _tokens(records: Records) -> dict[str, Any] | None:
    """Bytes per token of this tokenizer beside public ones, with the reason where one could not be measured."""
    comparison = records.receipts.get("tokens", {}).get("comparison")
    if not comparison:
        return None
    rows: list[list[str]] = []
    notes: list[str] = []
    for key, name in {"ours": "this tokenizer", **OTHER_TOKENIZERS}.items():
        measured = comparison.get(key, {})
        ratio, vocab_size = number(measured, "bytes_per_token"), number(measured, "vocab_size")
        if ratio is not None:
            rows.append([name, "" if vocab_size is None else wording.count(vocab_size), f"{ratio:.2f}"])
        else:
            notes.append(f"{name} is not shown: {measured.get('why', 'this run did not measure it')}.")
    return {"table": Table(["Tokenizer", "Vocabulary", "Bytes per token"], rows), "notes": notes}


def _samples_over_time(records: Records) -> list[dict[str, Any]]:
    """Samples of the base model while it learnt, evenly spread with the first and the last."""
    metrics = records.metrics.get("base")
    found = [event for event in metrics.evaluations if isinstance(event.get("sample"), str)] if metrics else []
    return [found[index] for index in _spread(len(found), MAX_SAMPLES_OVER_TIME)]


def _spread(length: int, limit: int) -> Sequence[int]:
    if length <= limit:
        return range(length)
    return [round(index * (length - 1) / (limit - 1)) for index in range(limit)]


def _flat(record: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield wording.entry(prefix + key, value)


def _model_folder(records: Records) -> str | None:
    """The finished model to use: the assistant if there is one."""
    for stage in reversed(TRAINING_STAGES):
        for folder in (records.run / stage, records.run / stage / "model"):
            if (folder / "config.json").exists():
                folder = folder.resolve()
                here = Path.cwd()
                return (folder.relative_to(here) if folder.is_relative_to(here) else folder).as_posix()
    return None
