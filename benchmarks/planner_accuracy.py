"""Does the planner keep its word? Time, memory and bits per byte it predicts, beside what comes of the plan.

    lalia tokenize recipes/shakespeare.toml
    python benchmarks/planner_accuracy.py --run runs/shakespeare

Plans and trains for each budget (2, 6 and 12 minutes; none of them was used to fit the law) with `lalia pretrain` in a
process of its own, with the tokens of --run, so that its peak memory is that of training. With --shapes it trains
three fixed shapes for a few steps instead and compares memory only. Writes
benchmarks/results/planner_accuracy.json. Targets: time within 20 %, memory within 15 %, bits per byte within 4 %.
--quick takes budgets of seconds on the text of docs/, to see that the script works; its figures mean nothing.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from ladder import branch, small_tokens
from lalia.files import read_json
from machine import describe, environment, table, write_result

TARGETS = {"seconds": 0.20, "memory_bytes": 0.15, "memory_estimate_bytes": 0.15, "bits_per_byte": 0.04}
"""memory_bytes is what the plan says, measured beforehand; memory_estimate_bytes is by formulas, for what fits."""
SHAPES = ((128, 2, 8), (256, 4, 8), (384, 6, 4))
"""Width, layers and rows of 256 tokens of the runs whose memory alone is compared."""


def train(source: Path, folder: Path, settings: list[str], threads: int) -> dict[str, tuple[float, float]]:
    """Plan and train in a process of its own; (predicted, measured) of what has a target."""
    shutil.rmtree(folder, ignore_errors=True)
    branch(source, folder)
    command = [sys.executable, "-m", "lalia", "pretrain", str(folder), *settings]
    subprocess.run(command, env=environment(threads), check=True)
    plan = read_json(folder / "plan" / "plan.json")
    predicted = plan["predicted"] | {"memory_estimate_bytes": plan["calibration"]["memory_estimate_bytes"]}
    happened = read_json(folder / "base" / "receipt.json")["summary"]
    measured = {
        "seconds": happened["training_seconds"],
        "memory_bytes": happened["peak_memory_bytes"],
        "memory_estimate_bytes": happened["peak_memory_bytes"],
        "bits_per_byte": happened["bits_per_byte"],
    }
    return {name: (float(predicted[name]), float(measured[name])) for name in TARGETS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/shakespeare"), help="a run with tokens")
    parser.add_argument("--out", type=Path, default=Path("runs/planner-accuracy"), help="where the runs are made")
    parser.add_argument("--budgets", nargs="+", default=["2 minutes", "6 minutes", "12 minutes"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shapes", action="store_true", help="compare memory at three shapes instead")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    names = list(TARGETS)
    common = ["pretrain.evaluations=0"]
    if arguments.quick:
        arguments.run, arguments.out = small_tokens(Path("runs/quick/pages")), Path("runs/quick/planner-accuracy")
        arguments.budgets = ["5 seconds"]
        common += ["pretrain.sequence_length=64", "pretrain.batch_size=2"]
    if arguments.shapes:
        names = ["memory_bytes", "memory_estimate_bytes"]
        cases = {
            f"width {width}, {layers} layers, {rows} rows": [
                f"model.hidden_size={width}",
                f"model.num_hidden_layers={layers}",
                "pretrain.steps=8",
                "pretrain.sequence_length=256",
                f"pretrain.batch_size={rows}",
            ]
            for width, layers, rows in (SHAPES[:1] if arguments.quick else SHAPES)
        }
    else:
        cases = {budget: [f"pretrain.budget={budget}"] for budget in arguments.budgets}
    rows: list[dict[str, Any]] = []
    for number, (case, settings) in enumerate(cases.items()):
        pairs = train(arguments.run, arguments.out / str(number), [*common, *settings], arguments.threads)
        for name in names:
            predicted, measured = pairs[name]
            error = predicted / measured - 1
            met = abs(error) <= TARGETS[name]
            rows.append(
                {
                    "case": case,
                    "what": name,
                    "predicted": predicted,
                    "measured": measured,
                    "error": round(error, 4),
                    "target": TARGETS[name],
                    "met": met,
                }
            )
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    settings = {key: str(value) for key, value in vars(arguments).items() if key not in ("run", "out")}
    name = "planner_memory" if arguments.shapes else "planner_accuracy"
    result = {"machine": describe(arguments.threads), "settings": settings, "rows": rows}
    write_result(name, result, arguments.quick)


if __name__ == "__main__":
    main()
