"""The ladder of small runs behind the planner's scaling law: sizes x token counts, on the demo's data.

    lalia tokenize recipes/shakespeare.toml
    python benchmarks/ladder.py --run runs/shakespeare --seconds 20 60

Writes benchmarks/results/ladder.json and prints the least-squares fit of
bits per byte = floor + size / N^a + data / D^b (N matrix weights, D effective bytes; Hoffmann et al. 2022), the numbers
that stand in src/lalia/planner.py.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

import numpy as np

from architectures import train
from lalia.data.shards import TokenShards
from lalia.devices import use_threads
from lalia.model.shapes import ArchitectureConfig
from lalia.planner import depth_of, effective_bytes
from machine import describe, write_result


def fit(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Least squares over a grid of exponents and floors; size and data factors follow linearly, both >= 0."""
    sizes = np.array([row["matrix_parameters"] for row in rows], dtype=float)
    data = np.array([row["effective_bytes"] for row in rows], dtype=float)
    scores = np.array([row["bits_per_byte"] for row in rows])
    best: tuple[float, dict[str, float]] | None = None
    exponents = np.arange(0.1, 0.62, 0.02)
    for floor, a, b in itertools.product(np.arange(0.4, 1.65, 0.05), exponents, exponents):
        columns = np.stack([sizes**-a, data**-b], 1)
        factors, *_ = np.linalg.lstsq(columns, scores - floor, rcond=None)
        if (factors < 0).any():
            continue
        error = float(np.abs(columns @ factors + floor - scores).max())
        if best is None or error < best[0]:
            values = {
                "floor": round(float(floor), 3),
                "size": round(float(factors[0]), 3),
                "size_exponent": round(float(a), 3),
                "data": round(float(factors[1]), 3),
                "data_exponent": round(float(b), 3),
                "largest_error": round(error, 4),
            }
            best = (error, values)
    assert best is not None
    return best[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/shakespeare"))
    parser.add_argument("--seconds", type=float, nargs="+", default=[20.0, 60.0])
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 192, 256, 320])
    parser.add_argument("--precision", default="bfloat16")
    arguments = parser.parse_args()
    threads = use_threads()
    shards = TokenShards.open(arguments.run / "tokens", "train")
    bytes_per_token = shards.num_bytes / shards.num_tokens
    rows: list[dict[str, Any]] = []
    for width, seconds in itertools.product(arguments.widths, arguments.seconds):
        architecture = ArchitectureConfig(hidden_size=width, num_hidden_layers=depth_of(width))
        row = train(architecture, arguments.run / "tokens", seconds, arguments.precision, 1, 256, 8)
        row["effective_bytes"] = effective_bytes(row["tokens"] * bytes_per_token, shards.num_bytes)
        rows.append(row)
        print(
            f"width {width}  {row['layers']} layers  {row['matrix_parameters'] / 1e6:.2f} M  {row['steps']} steps  "
            f"{row['tokens_per_second']:,} tokens/s  {row['bits_per_byte']:.4f} bits per byte",
            flush=True,
        )
    law = fit(rows)
    print(law)
    settings = {key: str(value) for key, value in vars(arguments).items() if key != "run"}
    write_result("ladder", {"machine": describe(threads), "settings": settings, "rows": rows, "law": law}, quick=False)


if __name__ == "__main__":
    main()
