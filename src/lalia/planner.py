"""From a budget to a model: shape, tokens, batch, learning rates, memory, time and expected quality, with reasons.

The speed is measured on this machine by a short calibration; the rules that turn it into a plan are published ones
or were measured in LOG.md, and each value says which.
"""

import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lalia.devices import memory_bytes, use_threads
from lalia.errors import UserError
from lalia.files import read_json
from lalia.model.config import ModelConfig
from lalia.model.shapes import ArchitectureConfig
from lalia.model.transformer import Transformer
from lalia.progress import Progress
from lalia.recipe import Recipe
from lalia.training.config import parse_budget
from lalia.training.linear_cross_entropy import linear_cross_entropy
from lalia.training.trainer import initialize, make_optimizers

WIDTHS = (64, 96, 128, 192, 256, 320, 384, 448, 512, 640, 768, 1024)
"""Widths the planner chooses among; the depth follows from the width."""

LAW_FLOOR, LAW_SIZE, LAW_SIZE_EXPONENT, LAW_DATA, LAW_DATA_EXPONENT = 1.6, 380.8, 0.56, 312.9, 0.48
"""bits per byte = floor + size / N^a + data / D^b, with N matrix weights and D effective bytes (Hoffmann et al. 2022),
fitted to the ladder of runs in LOG.md on Shakespeare. Other text shifts the floor, hence the interval."""

REPEAT_DECAY_EPOCHS = 15.4
"""Data repeated r times is worth U (1 + R (1 - exp(-r / R))) fresh bytes (Muennighoff et al. 2023)."""

RUNTIME_BYTES = 420 * 2**20
"""Resident size of Python with PyTorch, pyarrow and the tokenizer before the first tensor, measured."""


@dataclass(frozen=True)
class Speed:
    """What a machine does on a shape: seconds of one optimizer step, by measurement."""

    seconds_per_step: float
    flops_per_second: float


def make_plan(recipe: Recipe, manifest: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Decide everything about training that the recipe leaves open.

    Args:
        recipe: what is fixed.
        manifest: tokens/manifest.json: tokens and bytes of the training split, vocabulary size.
        progress: where to report.

    Returns:
        {"values": {name: {"value", "reason"}}, "model": ModelConfig,
        "predicted": {...}, "calibration": {...}}.

    Raises:
        UserError: if the budget is too small for any model, or the data for one batch.
    """
    planner = _Planner(recipe, manifest, progress)
    return planner.plan()


def facts_of_data(recipe: Recipe, run_folder: Path | None) -> dict[str, Any]:
    """The manifest of a run's tokens or, while there is none (None), an estimate of it from the size of the source.

    Raises:
        UserError: if the source is missing.
    """
    if run_folder is not None:
        return read_json(run_folder / "tokens" / "manifest.json")
    from lalia.data.collect import source_bytes

    num_bytes = round(source_bytes(recipe.data) * (1.0 - recipe.data.validation_fraction))
    return {
        "estimated": True,
        "vocab_size": recipe.tokenizer.vocab_size,
        "splits": {"train": {"num_bytes": num_bytes, "num_tokens": max(1, round(num_bytes / 3.2))}},
    }


class _Planner:
    def __init__(self, recipe: Recipe, manifest: dict[str, Any], progress: Progress) -> None:
        self.recipe, self.progress = recipe, progress
        train = manifest["splits"]["train"]
        self.train_tokens, self.train_bytes = int(train["num_tokens"]), int(train["num_bytes"])
        self.num_documents = int(train.get("num_documents", self.train_tokens))
        self.estimated = manifest.get("estimated", False)
        self.bytes_per_token = self.train_bytes / self.train_tokens
        self.vocab_size = int(manifest["vocab_size"])
        self.values: dict[str, dict[str, Any]] = {}
        self.calibration: dict[str, Any] = {}

    def set(self, name: str, value: Any, reason: str) -> Any:
        self.values[name] = {"value": value, "reason": reason}
        return value

    def plan(self) -> dict[str, Any]:
        config = self.recipe.pretrain
        threads = self.set("threads", use_threads(), "one per processor (OMP_NUM_THREADS overrides)")
        precision = self._precision()
        length = self.set("sequence_length", *self._sequence_length())
        batch = self.set("batch_size", *self._batch_size(length))
        self._check_rows(length, batch)
        budget = parse_budget(config.budget) if config.budget else None
        if budget is None and config.steps is None:
            raise UserError("pretrain needs a budget (pretrain.budget = '6 minutes') or a number of steps")
        shape, reason = self._shape(budget, length, batch, precision)
        speed = self._measure(shape, length, batch, precision, steps=9)
        steps = self._steps(budget, speed, length * batch)
        self._describe(shape, reason)
        tokens = self.set("tokens", steps * length * batch, "steps x batch x sequence length")
        epochs = tokens / self.train_tokens
        self.set(
            "epochs",
            round(epochs, 3),
            f"over {'an estimated ' if self.estimated else ''}{self.train_tokens:,} training tokens",
        )
        self._explain_optimizer()
        seconds = steps * speed.seconds_per_step
        predicted = {
            "seconds": round(seconds, 1),
            "seconds_per_step": round(speed.seconds_per_step, 5),
            "tokens_per_second": round(length * batch / speed.seconds_per_step),
            "memory_bytes": self._memory(shape, length, batch, precision),
            **self._predict_quality(shape.num_matrix_parameters(), tokens),
        }
        self.calibration |= {"threads": threads, "flops_per_second": round(speed.flops_per_second)}
        self._say(predicted)
        return {
            "values": self.values,
            "model": shape.model_dump(),
            "predicted": predicted,
            "calibration": self.calibration,
        }

    def _precision(self) -> str:
        asked = self.recipe.pretrain.precision
        if asked != "auto":
            return self.set("precision", asked, "set in the recipe")
        times = {}
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            a, b = torch.randn(2048, 256, dtype=dtype), torch.randn(768, 256, dtype=dtype)
            times[name] = _fastest(lambda a=a, b=b: a @ b.t(), repeats=12)
        gain = times["float32"] / times["bfloat16"]
        self.calibration["bfloat16_matmul_speedup"] = round(gain, 2)
        chosen = "bfloat16" if gain > 1.3 else "float32"
        return self.set("precision", chosen, f"bfloat16 products measured {gain:.1f}x as fast as float32 here")

    def _sequence_length(self) -> tuple[int, str]:
        asked = self.recipe.pretrain.sequence_length
        if asked:
            return asked, "set in the recipe"
        return 256, "best bits per byte at equal time on the demo's data among 128, 256 and 512 (LOG.md)"

    def _batch_size(self, length: int) -> tuple[int, str]:
        asked = self.recipe.pretrain.batch_size
        if asked:
            return asked, "set in the recipe"
        rows = max(1, 2048 // length)
        while rows > 1 and rows * length * 4 > self.train_tokens:
            rows //= 2
        return rows, f"{rows * length:,} tokens per step: small batches learn most per token in short runs (LOG.md)"

    def _check_rows(self, length: int, batch: int) -> None:
        """Refuse rows that the model or the data cannot fill, before anything is measured."""
        context = self.recipe.model.max_position_embeddings
        if context and context < length:
            raise UserError(
                f"model.max_position_embeddings = {context} is shorter than the training rows "
                f"(pretrain.sequence_length = {length}); raise it, or shorten the rows"
            )
        most_rows = self.train_tokens // length + self.num_documents  # no document leaves more than one row unfilled
        if batch > most_rows:
            raise UserError(
                f"the training text has {self.train_tokens} tokens, at most {most_rows} rows of {length}, but a batch "
                f"takes {batch}; give more text, set pretrain.batch_size to {most_rows} or less, or shorten "
                "pretrain.sequence_length"
            )

    def _shape(self, budget: float | None, length: int, batch: int, precision: str) -> tuple[ModelConfig, str]:
        asked = self.recipe.model
        if asked.hidden_size and asked.num_hidden_layers:
            return asked.build(self.vocab_size, length), "set in the recipe"
        if budget is None:
            raise UserError("with pretrain.steps and no budget, set model.hidden_size and model.num_hidden_layers too")
        candidates = self._candidates(asked, length)
        fitting = [c for c in candidates if self._memory(c, length, batch, precision) <= memory_bytes()]
        candidates = fitting or candidates[:1]
        probe = candidates[min(3, len(candidates) - 1)]
        speed = self._measure(probe, length, batch, precision, steps=5)
        best: tuple[float, ModelConfig] | None = None
        for candidate in candidates:
            step = speed.seconds_per_step * _relative_cost(candidate, probe, length)
            affordable = int(budget / step)
            steps = self.recipe.pretrain.steps or affordable
            if steps > affordable or affordable < 20:
                continue
            quality = expected_bits_per_byte(
                candidate.num_matrix_parameters(),
                steps * length * batch * self.bytes_per_token,
                self.train_bytes,
            )
            if best is None or quality < best[0]:
                best = (quality, candidate)
        if best is None:
            needed = max(20, self.recipe.pretrain.steps or 0)
            smallest = speed.seconds_per_step * _relative_cost(candidates[0], probe, length) * needed
            raise UserError(
                f"a budget of {budget:.0f} s is too small for any model: the smallest needs {smallest:.0f} s for "
                f"{needed} steps here; set pretrain.budget = '{math.ceil(smallest)} seconds' or more"
            )
        return best[1], f"lowest expected bits per byte among {len(candidates)} sizes at the measured speed"

    def _candidates(self, asked: ArchitectureConfig, length: int) -> list[ModelConfig]:
        widths = [asked.hidden_size] if asked.hidden_size else list(WIDTHS)
        shapes, refused = [], ""
        for width in widths:
            try:
                shapes.append(asked.build(self.vocab_size, length, width, asked.num_hidden_layers or depth_of(width)))
            except UserError as error:  # such as heads that do not divide; another width may do
                refused = str(error)
        if not shapes:
            raise UserError(f"no width among {', '.join(map(str, widths))} suits the recipe: {refused}")
        return shapes

    def _measure(self, shape: ModelConfig, length: int, batch: int, precision: str, steps: int) -> Speed:
        needed = self._memory(shape, length, batch, precision)
        if needed > memory_bytes():
            raise UserError(
                f"this plan needs about {needed / 2**30:.1f} GiB of memory and the machine has "
                f"{memory_bytes() / 2**30:.1f} GiB; set a smaller pretrain.batch_size (or pretrain.micro_batch_size), "
                "pretrain.sequence_length or model.hidden_size"
            )
        rows = min(batch, self.recipe.pretrain.micro_batch_size or batch)
        seconds = measure_step(shape, rows, length, precision, steps) * batch / rows
        flops = shape.flops_per_token(length) * length * batch
        return Speed(seconds, flops / seconds)

    def _steps(self, budget: float | None, speed: Speed, tokens_per_step: int) -> int:
        asked = self.recipe.pretrain.steps
        if asked:
            return self.set("steps", asked, "set in the recipe")
        assert budget is not None
        steps = max(1, int(budget / speed.seconds_per_step))
        return self.set(
            "steps", steps, f"{budget:.0f} s at the measured {speed.seconds_per_step * 1000:.0f} ms per step"
        )

    def _describe(self, shape: ModelConfig, reason: str) -> None:
        self.set("family", shape.family, "chosen among four (docs/decisions/002)")
        self.set("hidden_size", shape.hidden_size, reason)
        self.set("num_hidden_layers", shape.num_hidden_layers, "depth grows with width (LOG.md)")
        self.set("num_attention_heads", shape.num_attention_heads, f"hidden_size / head_dim {shape.head_dim}")
        self.set("intermediate_size", shape.intermediate_size, "8/3 of the width when gated (Shazeer 2020)")
        self.set("vocab_size", shape.vocab_size, "tokenizer")
        total = shape.num_matrix_parameters() + (
            0 if shape.tie_word_embeddings else shape.vocab_size * shape.hidden_size
        )
        self.set("parameters", total, "matrix weights and embedding")

    def _explain_optimizer(self) -> None:
        settings = self.recipe.pretrain.optimizer
        self.set("matrix_learning_rate", settings.matrix_learning_rate, "Muon; transfers across widths (Jordan 2024)")
        self.set("embedding_learning_rate", settings.embedding_learning_rate, "AdamW; swept on the demo (LOG.md)")
        self.set("decay_fraction", settings.decay_fraction, "linear to zero (Bergsma et al. 2025)")

    def _memory(self, shape: ModelConfig, length: int, batch: int, precision: str) -> int:
        rows = min(batch, self.recipe.pretrain.micro_batch_size or batch)
        return RUNTIME_BYTES + training_bytes(shape, rows * length, length, 2 if precision == "bfloat16" else 4)

    def _predict_quality(self, matrix_parameters: int, tokens: int) -> dict[str, Any]:
        expected = expected_bits_per_byte(matrix_parameters, tokens * self.bytes_per_token, self.train_bytes)
        return {
            "bits_per_byte": round(expected, 3),
            "bits_per_byte_interval": [round(expected * 0.93, 3), round(expected * 1.07, 3)],
        }

    def _say(self, predicted: dict[str, Any]) -> None:
        value = {name: entry["value"] for name, entry in self.values.items()}
        low, high = predicted["bits_per_byte_interval"]
        self.progress.say(
            f"{value['family']} with {value['parameters'] / 1e6:.2f} M parameters (width {value['hidden_size']}, "
            f"{value['num_hidden_layers']} layers), {value['precision']}, {value['steps']} steps of "
            f"{value['batch_size']} x {value['sequence_length']} tokens\nexpected: {predicted['seconds']:.0f} s at "
            f"{predicted['tokens_per_second']:,} tokens/s, {predicted['memory_bytes'] / 2**20:.0f} MiB, "
            f"{predicted['bits_per_byte']:.2f} bits per byte ({low:.2f} to {high:.2f})"
        )


def depth_of(width: int) -> int:
    """Layers of a model of this width."""
    return max(2, round(width / 56))


def expected_bits_per_byte(matrix_parameters: int, trained_bytes: float, unique_bytes: float) -> float:
    """Bits per byte on held-out text after training on `trained_bytes`, of which `unique_bytes` differ."""
    effective = effective_bytes(trained_bytes, unique_bytes)
    return LAW_FLOOR + LAW_SIZE / matrix_parameters**LAW_SIZE_EXPONENT + LAW_DATA / effective**LAW_DATA_EXPONENT


def effective_bytes(trained_bytes: float, unique_bytes: float) -> float:
    """What repeated data is worth in fresh bytes (Muennighoff et al. 2023, equation 5)."""
    repeats = max(0.0, trained_bytes / unique_bytes - 1.0)
    fresh = min(trained_bytes, unique_bytes)
    return fresh * (1.0 + REPEAT_DECAY_EPOCHS * (1.0 - math.exp(-repeats / REPEAT_DECAY_EPOCHS)))


def training_bytes(shape: ModelConfig, tokens: int, length: int, bytes_per_activation: int) -> int:
    """Bytes of weights, gradients, optimizer state and saved activations of one forward pass of `tokens` tokens.

    Weights, gradients and two optimizer values are float32; per token and layer about 8 hidden-sized and 3
    feed-forward-sized activations stay for backward, and the attention probabilities of a row.
    """
    weights = shape.num_matrix_parameters() * 4 * 4
    per_layer = (
        8 * shape.hidden_size
        + 3 * shape.query_size
        + 3 * shape.intermediate_size
        + shape.num_attention_heads * length * 3 // 4
    )
    activations = tokens * shape.num_hidden_layers * per_layer * bytes_per_activation
    return weights + activations + 3 * 512 * shape.vocab_size * 4


def _relative_cost(shape: ModelConfig, probe: ModelConfig, length: int) -> float:
    """Time per token of a shape relative to the probe's: its FLOPs, and a share that grows with the activations."""

    def cost(config: ModelConfig) -> float:
        volume = config.num_hidden_layers * (14 * config.hidden_size + 6 * config.intermediate_size)
        return config.flops_per_token(length) + 600.0 * volume

    return cost(shape) / cost(probe)


def measure_step(shape: ModelConfig, rows: int, length: int, precision: str, steps: int) -> float:
    """Seconds of one optimizer step on random tokens: the median of `steps` after one that warms up."""
    from lalia.training.config import OptimizerConfig
    from lalia.training.pretrain import DTYPES

    model = Transformer(shape)
    initialize(model, 0)
    model.compute_dtype = DTYPES[precision]
    optimizers = make_optimizers(model, OptimizerConfig())
    tokens = torch.randint(0, shape.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    times = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        loss, _, count = linear_cross_entropy(
            model(tokens[:, :-1]), model.head_weight, tokens[:, 1:].contiguous(), shape.logit_softcap
        )
        (loss / count).backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def _fastest(work: Any, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)
