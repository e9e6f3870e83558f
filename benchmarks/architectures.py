"""Which shape learns most in equal time: Llama, Qwen3, Gemma 3 and nanochat, same tokens, budget and optimizer.

    lalia tokenize recipes/shakespeare.toml
    python benchmarks/architectures.py --run runs/shakespeare --seconds 60

Each family gets the steps that fit the budget at its own measured speed, so a slower shape must learn more per step.
Writes benchmarks/results/architectures.json: bits per byte on all held-out text, by family and seed.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from lalia.data.loader import PackedBatches
from lalia.data.shards import TokenShards
from lalia.devices import use_threads
from lalia.model.shapes import ArchitectureConfig
from lalia.model.transformer import Transformer
from lalia.planning.speed import measure_step
from lalia.progress import Progress
from lalia.tokenizer.bpe import Tokenizer
from lalia.training.config import LoopConfig, OptimizerConfig
from lalia.training.hardware import DTYPES
from lalia.training.objectives import next_token
from lalia.training.pretrain import Evaluation
from lalia.training.trainer import Trainer, initialize
from machine import describe, write_result

FAMILIES = ("llama", "qwen3", "gemma3_text", "nanochat")


def train(
    architecture: ArchitectureConfig,
    tokens: Path,
    seconds: float,
    precision: str,
    seed: int,
    length: int,
    batch: int,
    step_seconds: float | None = None,
) -> dict[str, Any]:
    """Train one shape for `seconds` at its measured speed and score it on all held-out text."""
    shards = TokenShards.open(tokens, "train")
    shape = architecture.build(shards.vocab_size, length)
    step_seconds = step_seconds or measure_step(shape, batch, length, precision, steps=4)
    steps = max(1, int(seconds / step_seconds))
    model = Transformer(shape)
    initialize(model, seed)
    model.compute_dtype = DTYPES[precision]
    evaluate = Evaluation(model, Tokenizer.load(tokens / "tokenizer"), tokens, length, 1, last_step=0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            PackedBatches(shards, length, batch, seed),
            next_token,
            steps,
            OptimizerConfig(),
            Path(folder),
            "benchmark",
            Progress(quiet=True),
            LoopConfig(checkpoint_seconds=1e9),
            evaluate=evaluate,
        )
        happened = trainer.train()
    return {
        "family": architecture.family,
        "hidden_size": shape.hidden_size,
        "layers": shape.num_hidden_layers,
        "parameters": model.num_parameters(),
        "matrix_parameters": shape.num_matrix_parameters(),
        "seed": seed,
        "steps": steps,
        "tokens": happened["tokens"],
        "training_seconds": happened["training_seconds"],
        "tokens_per_second": happened["tokens_per_second"],
        "bits_per_byte": round(evaluate.last or 0.0, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/shakespeare"))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--precision", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES))
    arguments = parser.parse_args()
    threads = use_threads()
    rows: list[dict[str, Any]] = []
    vocab_size = TokenShards.open(arguments.run / "tokens", "train").vocab_size
    turns: dict[str, list[float]] = {family: [] for family in arguments.families}
    for family in arguments.families * 4:  # in turn, so that a slow moment of the machine meets all of them
        shape = ArchitectureConfig(
            family=family, hidden_size=arguments.width, num_hidden_layers=arguments.layers
        ).build(vocab_size, 256)
        turns[family].append(measure_step(shape, 8, 256, arguments.precision, steps=3))
    for seed in range(1, arguments.seeds + 1):
        for family in arguments.families:
            architecture = ArchitectureConfig(
                family=family, hidden_size=arguments.width, num_hidden_layers=arguments.layers
            )
            row = train(
                architecture,
                arguments.run / "tokens",
                arguments.seconds,
                arguments.precision,
                seed,
                256,
                8,
                statistics.median(turns[family]),
            )
            print(
                f"{family:<12} seed {seed}  {row['parameters'] / 1e6:.2f} M  {row['steps']} steps  "
                f"{row['tokens_per_second']:,} tokens/s  {row['bits_per_byte']:.4f} bits per byte",
                flush=True,
            )
            rows.append(row)
    settings = {key: str(value) for key, value in vars(arguments).items() if key != "run"}
    write_result("architectures", {"machine": describe(threads), "settings": settings, "rows": rows}, quick=False)


if __name__ == "__main__":
    main()
