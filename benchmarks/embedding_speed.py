"""Speed of sentence embeddings: Lalia beside sentence-transformers, from the same folder, in the same process.

    python benchmarks/embedding_speed.py --model ~/.cache/lalia/models/minilm

float32 on both sides, batches of 32, in turn; medians. Three collections of texts: short (a sentence), long (up to the
model's limit) and mixed. Both sort by length. The vectors are compared: a speed for other vectors would be no
comparison. sentence-transformers is no dependency of Lalia; install it beside it for this benchmark.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lalia
import machine
from lalia.errors import UserError

TARGET = 1.0
"""Texts per second, ours divided by sentence-transformers'."""
PROSE = (
    "when the long rain had ended old king walked down to harbour and asked every sailor for news of his daughter she "
    "gone away in spring with nothing but a lantern loaf bread own good name some seen light upon water"
)
LENGTHS = {"short": (4, 20), "long": (100, 230), "mixed": (2, 230)}
"""Words of the shortest and the longest text."""


def make_texts(kind: str, count: int) -> list[str]:
    """Texts of random words; in the mixed collection short ones are as frequent as they are in a mailbox."""
    rng = random.Random(kind)
    low, high = LENGTHS[kind]
    lengths = [
        int(low * (high / low) ** rng.random()) if kind == "mixed" else rng.randint(low, high) for _ in range(count)
    ]
    return [" ".join(rng.choices(PROSE.split(), k=length)) for length in lengths]


def peer(folder: Path, batch_size: int) -> Callable[[Sequence[str]], np.ndarray]:
    """Embed with sentence-transformers."""
    try:
        from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise UserError("sentence-transformers is not installed: pip install sentence-transformers") from None
    model = SentenceTransformer(str(folder), device="cpu")
    return lambda texts: model.encode(list(texts), batch_size=batch_size, show_progress_bar=False)


def compare(kind: str, arguments: argparse.Namespace, embeds: dict[str, Any]) -> dict[str, Any]:
    """Texts per second of both on one collection."""
    texts = make_texts(kind, arguments.texts if kind == "short" else arguments.texts // 4)
    vectors = {name: embed(texts) for name, embed in embeds.items()}  # warms up as well
    times: dict[str, list[float]] = {name: [] for name in embeds}
    for repeat in range(arguments.repeats):
        for name in list(embeds)[:: 1 if repeat % 2 else -1]:
            began = time.perf_counter()
            embeds[name](texts)
            times[name].append(time.perf_counter() - began)
    speeds = {name: len(texts) / statistics.median(values) for name, values in times.items()}
    return {
        "texts": len(texts),
        "texts_per_second": {name: round(speed, 1) for name, speed in speeds.items()},
        "seconds": {name: [round(value, 4) for value in values] for name, values in times.items()},
        "ours_to_peer": round(speeds["lalia"] / speeds["sentence-transformers"], 3),
        "largest_difference": float(np.abs(vectors["lalia"] - vectors["sentence-transformers"]).max()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a sentence-transformers folder")
    parser.add_argument("--texts", type=int, default=1000, help="short texts; a quarter of it of the others")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a smoke run: 64 texts, once; no result")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.texts, arguments.repeats = 64, 1
    machine.restart_with(arguments.threads)
    torch.set_num_threads(arguments.threads)
    encoder = lalia.load(arguments.model)
    embeds: dict[str, Any] = {
        "sentence-transformers": peer(arguments.model, arguments.batch_size),
        "lalia": lambda texts: encoder.embed(texts, batch_size=arguments.batch_size),
    }
    results = {kind: compare(kind, arguments, embeds) for kind in LENGTHS}
    rows = [
        (kind, r["texts"], *r["texts_per_second"].values(), r["ours_to_peer"], r["largest_difference"])
        for kind, r in results.items()
    ]
    print(machine.table(("texts", "count", *(f"{n} texts/s" for n in embeds), "ratio", "difference"), rows))
    met = all(r["ours_to_peer"] >= TARGET and r["largest_difference"] < 1e-5 for r in results.values())
    print(f"target: at least {TARGET} in every row, equal vectors: {'met' if met else 'NOT met'}")
    content = {
        "machine": machine.describe(arguments.threads) | {"sentence_transformers": version("sentence-transformers")},
        "settings": {"batch_size": arguments.batch_size, "repeats": arguments.repeats},
        "results": results,
        "target": TARGET,
        "met": met,
    }
    machine.write_result("embedding_speed", content, arguments.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
