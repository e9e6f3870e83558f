"""The collect stage: read a source, clean it, split it, describe it."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from lalia.data.card import build_card, render_card
from lalia.data.clean import apply_rules
from lalia.data.config import DataConfig
from lalia.data.documents import Document, write_documents
from lalia.data.folder import check_ids, folder_fingerprint
from lalia.data.plays import parse_play
from lalia.data.sources import Inputs, read_source, shakespeare_fingerprint
from lalia.data.split import assert_no_overlap, split_documents
from lalia.errors import UserError
from lalia.files import fingerprint, write_json, write_text
from lalia.progress import Progress

# Raised when the same input would give other documents than before: a new rule, another parse of plays.
COLLECT_VERSION = 1


def collect(config: DataConfig, out: Path, progress: Progress) -> dict[str, Any]:
    """Write train.parquet, validation.parquet, card.json and card.md into `out`; return the card's summary.

    The same input files and settings give the same bytes.

    Raises:
        UserError: if the input is missing, unreadable, malformed or too small; the message names the remedy.
    """
    inputs = read_source(config)
    _say_inputs(inputs, progress)
    documents, funnel = apply_rules(inputs.documents, config)
    inputs.documents = []  # the texts as read are no longer needed; cleaned ones may be as large
    for count in funnel:
        if count.documents_changed or count.documents_cut or count.documents_dropped:
            progress.say(
                f"  {count.rule}: {count.documents_changed} changed, {count.documents_cut} cut, "
                f"{count.documents_dropped} dropped ({count.bytes_in - count.bytes_out:,} bytes less)"
            )
    if not documents:
        raise UserError(_nothing_left(inputs, config))
    check_ids(documents)
    plays = None
    if config.source == "shakespeare":
        documents, plays = parse_plays(documents)
        progress.say(f"  {plays['speeches']:,} speeches of {plays['speakers']:,} speakers in {plays['scenes']} scenes")

    train, validation = split_documents(documents, config.validation_fraction, config.document_bytes)
    assert_no_overlap(train, validation)
    card = build_card(config, inputs, funnel, train, validation, plays)
    write_documents(out, "train", train)
    write_documents(out, "validation", validation)
    write_json(out / "card.json", card)
    write_text(out / "card.md", render_card(card))
    _say_split(card, config, progress)
    return summary(card)


def input_fingerprint(config: DataConfig) -> str:
    """A cheap identity of the input: sizes and times of the user's files, or version and sizes of the package.

    It changes when collect has to be done again for other reasons than its settings.

    Raises:
        UserError: if the input is missing, as `collect` would.
    """
    content = shakespeare_fingerprint() if config.source == "shakespeare" else folder_fingerprint(config)
    return fingerprint([COLLECT_VERSION, config.source, content])


def parse_plays(documents: list[Document]) -> tuple[list[Document], dict[str, Any]]:
    """Add title, speakers and scenes to the metadata of plays; return them with the counts of the parse."""
    parsed = []
    anomalies: Counter[str] = Counter()
    num_scenes = num_speeches = num_speakers = speech_characters = characters = longest = 0
    for document in documents:
        play = parse_play(document.text)
        title = play.title or document.metadata["title"]
        metadata = {**document.metadata, "title": title, "speakers": play.speakers, "scenes": play.scenes}
        parsed.append(replace(document, metadata=metadata))
        lengths = [end - start for _, start, end in play.speeches]
        num_scenes += len(play.scenes)
        num_speeches += len(lengths)
        num_speakers += len(play.speakers)
        characters += len(document.text)
        speech_characters += sum(lengths)
        longest = max([longest, *lengths])
        anomalies.update(play.anomalies)
    counts = {
        "works": len(parsed),
        "scenes": num_scenes,
        "speeches": num_speeches,
        "speakers": num_speakers,
        "share_of_text_in_speeches": round(speech_characters / max(characters, 1), 4),
        "longest_speech_characters": longest,
        "anomalies": dict(sorted(anomalies.items())),
    }
    return parsed, counts


def summary(card: dict[str, Any]) -> dict[str, Any]:
    """The few figures of the card that a receipt or a terminal shows."""
    return {
        "source": card["source"],
        "documents": card["documents"],
        "bytes": card["bytes"],
        "splits": {name: {k: part[k] for k in ("documents", "bytes")} for name, part in card["splits"].items()},
        "held_out": card["held_out"][:20],
        "dropped_documents": sum(row["documents_dropped"] for row in card["funnel"]),
        "skipped_files": sum(card["inputs"]["skipped"].values()),
        "bad_files": len(card["inputs"]["bad_files"]),
    }


def _nothing_left(inputs: Inputs, config: DataConfig) -> str:
    bad = f" and {len(inputs.bad_files)} unreadable files were dropped" if inputs.bad_files else ""
    return (
        f"no usable text in {inputs.name}: {len(inputs.files)} files were read{bad}, and every document was empty, "
        f"boilerplate or shorter than {config.min_document_bytes} bytes; add texts, or lower data.min_document_bytes"
    )


def _say_inputs(inputs: Inputs, progress: Progress) -> None:
    size = sum(file["bytes"] for file in inputs.files)
    progress.say(f"read {len(inputs.files):,} files, {size:,} bytes, from {inputs.name}")
    for reason, count in sorted(inputs.skipped.items()):
        progress.say(f"  {count:,} files skipped: {reason}")
    for bad in inputs.bad_files:
        progress.say(f"  dropped: {bad['problem']}")
    if inputs.ignored_columns:
        progress.say(f"  columns not used: {', '.join(sorted(inputs.ignored_columns))}")


def _say_split(card: dict[str, Any], config: DataConfig, progress: Progress) -> None:
    train, validation = card["splits"]["train"], card["splits"]["validation"]
    progress.say(
        f"training: {train['documents']:,} documents, {train['bytes']:,} bytes; held out: "
        f"{validation['documents']:,} documents, {validation['bytes']:,} bytes ({validation['share_of_bytes']:.1%})"
    )
    wanted = config.validation_fraction
    if not wanted / 2 <= validation["share_of_bytes"] <= wanted * 2:
        remedy = "" if config.source == "shakespeare" else f"; data.document_bytes below {config.document_bytes} helps"
        progress.say(f"  note: the held-out share is far from {wanted:.0%}, because the documents are few{remedy}")


def source_bytes(config: DataConfig) -> int:
    """Bytes of the files that `collect` would read, without reading them.

    Raises:
        UserError: if the source is missing.
    """
    files = shakespeare_fingerprint()[1:] if config.source == "shakespeare" else folder_fingerprint(config)
    return sum(int(entry[1]) for entry in files)
