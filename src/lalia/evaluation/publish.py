"""The report stage: report.html and a model card in every model folder, from the run's records."""

from pathlib import Path
from typing import Any

from lalia.evaluation.model_card import model_card
from lalia.evaluation.records import Records, read_records
from lalia.evaluation.report import write_report
from lalia.files import write_bytes, write_text


def publish(run: Path, out: Path) -> dict[str, Any]:
    """Write report.html (in `out` and, for finding it easily, in the run folder) and the model cards.

    Returns:
        where they are.
    """
    write_report(run, out / "report.html")
    write_bytes(run / "report.html", (out / "report.html").read_bytes())
    records = read_records(run)
    cards = []
    for stage in ("base", "chat"):
        if (run / stage / "config.json").exists():
            write_text(run / stage / "README.md", model_card(facts(records, stage)))
            cards.append(str(run / stage / "README.md"))
    return {"report": str(run / "report.html"), "model_cards": cards}


def facts(records: Records, stage: str) -> dict[str, Any]:
    """What the model card of a stage's model says, as far as the run recorded it."""
    values = {name: entry["value"] for name, entry in records.plan.get("values", {}).items()}
    summary = records.receipts.get(stage, {})
    scores = records.results.get("bits_per_byte", {})
    card = records.card
    splits = card.get("splits", {})
    is_shakespeare = card.get("settings", {}).get("source") == "shakespeare"
    return {
        "name": f"{records.run.name}-{stage}",
        "license": "apache-2.0" if is_shakespeare else None,
        "language": "en" if is_shakespeare else None,
        "architecture": values.get("family"),
        "parameters": values.get("parameters"),
        "context_length": values.get("sequence_length"),
        "vocab_size": values.get("vocab_size"),
        "train_bytes": splits.get("train", {}).get("bytes"),
        "validation_bytes": splits.get("validation", {}).get("bytes"),
        "data": f"{card['documents']:,} documents from {card['source']}" if "source" in card else None,
        "data_license": ", ".join(card.get("by_license", {})) or None,
        "held_out": card.get("held_out"),
        "bits_per_byte": scores.get("base"),
        "chat_bits_per_byte": scores.get("chat"),
        "baselines": records.results.get("baselines"),
        "steps": summary.get("steps"),
        "tokens": summary.get("tokens"),
        "seconds": summary.get("training_seconds"),
        "hardware": _hardware(records.environment),
        "precision": values.get("precision"),
        "lalia_version": records.environment.get("lalia"),
        "commit": records.environment.get("commit"),
        "is_chat": stage == "chat",
        "is_shakespeare": is_shakespeare,
        "reproduce": "lalia run recipes/shakespeare.toml" if is_shakespeare else None,
    }


def _hardware(environment: dict[str, Any]) -> str | None:
    cpu, cores = environment.get("cpu"), environment.get("cores")
    return f"{cpu}, {cores} cores" if cpu else None
