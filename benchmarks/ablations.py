"""What each setting of pretraining is worth: the same tokens with one thing changed, in bits per byte of held-out text.

    lalia tokenize recipes/shakespeare.toml
    python benchmarks/ablations.py --run runs/shakespeare --seeds 2
    python benchmarks/ablations.py --run runs/shakespeare --variants pretrain.optimizer.momentum=0.9 \
        "pretrain.optimizer.kind=adamw pretrain.optimizer.adamw_matrix_learning_rate=0.005"

By tokens and not by time, so that other work on the machine changes nothing; the seconds that the optimizers take per
step are measured beside it. Every seed is a pair with the unchanged settings, the first row: the same weights at the
start, the same batches. Writes benchmarks/results/ablations.json.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from lalia.data.shards import TokenShards
from lalia.model.config import ModelConfig
from lalia.model.transformer import Transformer
from lalia.progress import Progress
from lalia.recipe import Recipe, load_recipe
from lalia.training.optimizers import make_optimizers
from lalia.training.pretrain import pretrain
from lalia.training.trainer import initialize
from machine import describe, restart_with, table, write_result

OPTIMIZER = "pretrain.optimizer."
VARIANTS = (
    OPTIMIZER + "matrix_learning_rate=0.03",
    OPTIMIZER + "embedding_learning_rate=0.2",
    OPTIMIZER + "head_learning_rate=0.012",
    OPTIMIZER + "scalar_learning_rate=0.02",
    OPTIMIZER + "momentum=0.9",
    OPTIMIZER + "betas=[0.8,0.95]",
    OPTIMIZER + "weight_decay=0.1",
    OPTIMIZER + "decay_fraction=0.9",
    OPTIMIZER + "warmup_fraction=0.05",
    OPTIMIZER + "schedule=cosine",
    OPTIMIZER + "kind=adamw",
    "pretrain.z_loss=0.0001",
    "pretrain.average_decay=0.98",
    "pretrain.batch_stages=[[0,0.5],[0.2,1]]",
    "pretrain.sequence_stages=[[0,0.5],[0.2,1]]",
)
"""Overrides of the recipe, separated by spaces."""


def train(recipe: Recipe, shape: ModelConfig, tokens: Path, seed: int, plan: dict[str, Any]) -> dict[str, Any]:
    """One run of the pretrain stage; what happened."""
    config = recipe.pretrain.model_copy(update={"seed": seed, "evaluations": 0, "checkpoint_seconds": 1e9})
    values = {key: {"value": value} for key, value in plan.items()}
    with tempfile.TemporaryDirectory() as folder:
        whole = {"values": values, "model": shape.model_dump()}
        return pretrain(config, whole, tokens, Path(folder), "ablation", Progress(quiet=True))


def optimizer_seconds(recipe: Recipe, shape: ModelConfig, repeats: int = 9) -> float:
    """Median time of the optimizers' part of a step on this machine as it is now."""
    model = Transformer(shape)
    initialize(model, 0)
    optimizers = make_optimizers(model, recipe.pretrain.optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        for optimizer in optimizers:
            optimizer.step(torch.ones(()))
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/shakespeare"), help="a run folder with tokens")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, help="overrides of the recipe, in quotes")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it works; no result")
    options = parser.parse_args()
    restart_with(options.threads)
    if options.quick:
        options.steps, options.variants = 3, options.variants[:1]
    tokens = options.run / "tokens"
    vocab_size = TokenShards.open(tokens, "train").vocab_size
    plan = {
        "steps": options.steps,
        "sequence_length": 256,
        "batch_size": options.rows,
        "precision": "float32",
        "threads": options.threads,
    }
    sizes = (f"model.hidden_size={options.width}", f"model.num_hidden_layers={options.layers}")
    rows: list[dict[str, Any]] = []
    for variant in ("", *options.variants):
        recipe = load_recipe("shakespeare", (*sizes, *variant.split()))
        shape = recipe.model.build(vocab_size, 256)
        scores = []
        for seed in range(1, options.seeds + 1):
            happened = train(recipe, shape, tokens, seed, plan)
            scores.append(round(happened["bits_per_byte"], 4))
        row = {
            "variant": variant or "as it is",
            "bits_per_byte": scores,
            "optimizer_seconds": round(optimizer_seconds(recipe, shape), 4),
        }
        pairs = zip(scores, rows[0]["bits_per_byte"] if rows else scores, strict=True)
        row["difference"] = round(statistics.mean(ours - plain for ours, plain in pairs), 4)
        rows.append(row)
        print(f"{row['variant']}: {scores} ({row['difference']:+.4f})", flush=True)
    columns = ("variant", "difference", "bits_per_byte", "optimizer_seconds")
    print(table(columns, [[str(row[column]) for column in columns] for row in rows]))
    settings = {**plan, "width": options.width, "layers": options.layers, "seeds": options.seeds}
    write_result("ablations", {"machine": describe(options.threads), "settings": settings, "rows": rows}, options.quick)


if __name__ == "__main__":
    main()
