"""From a budget to a model: shape, tokens, batch, learning rates, layout, memory, time and quality, with reasons.

The speed is measured on this machine by a short calibration; the rules that turn it into a plan are published ones
or were measured in LOG.md, and each value says which.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lalia.devices import make_deterministic, memory_bytes, num_processes, use_threads
from lalia.errors import UserError
from lalia.files import read_json
from lalia.model.config import ModelConfig
from lalia.planning.budgets import enough, steps_bought
from lalia.planning.law import (
    MOST_WEIGHTS_PER_TOKEN,
    effective_bytes,
    expected_on_text,
    load_law,
    overfitting,
    useful_epochs,
)
from lalia.planning.layout import FILL, LEVELS, TOKENS_PER_THREAD, Placement, place
from lalia.planning.memory import COMPILER_BYTES, Checkpointing, parameters, training_memory
from lalia.planning.rules import FEW_EPOCHS, SMALL_BATCH_TOKENS, batch_tokens, scale_optimizer
from lalia.planning.sizes import candidates
from lalia.planning.speed import Speed, StepTimer, bfloat16_speedup, relative_cost, require_datasheet
from lalia.progress import Progress
from lalia.recipe import Recipe
from lalia.training.compilation import compiler_failure, find_compiler
from lalia.training.config import Amount, TrainingConfig, parse_budget
from lalia.training.hardware import device_name
from lalia.training.parallel.layout import ParallelConfig, misfits
from lalia.training.schedule import BatchSchedule, mean_rows, rows_of_stages

LEAST_STEPS = 20
"""A model that gets fewer steps has learned nothing worth the name."""
COMPILED_FROM_SECONDS = 300
"""Shorter runs are over before compiling has paid: a first compilation takes most of a minute on two processors."""


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
        UserError: if the budget is too small for any model, the data for one batch, or the devices for the layout.
    """
    return _Planner(recipe, manifest, progress).plan()


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
        self.recipe, self.config, self.progress = recipe, recipe.pretrain, progress
        train = manifest["splits"]["train"]
        self.train_tokens, self.train_bytes = int(train["num_tokens"]), int(train["num_bytes"])
        self.num_documents = int(train.get("num_documents", self.train_tokens))
        self.estimated = manifest.get("estimated", False)
        self.bytes_per_token = self.train_bytes / self.train_tokens
        self.vocab_size = int(manifest["vocab_size"])
        self.law = load_law(recipe.plan.law)
        self.sheet = require_datasheet(recipe.plan.device) if recipe.plan.device else None
        self.here = "cuda" if self.sheet is None and torch.cuda.is_available() else "cpu"
        self.accelerator = self.sheet is not None or self.here != "cpu"
        self.devices = recipe.plan.devices or num_processes()
        self.device_bytes = self._device_bytes(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self.memory = partial(
            training_memory,
            accelerator=self.accelerator,
            optimizer=self.config.optimizer.kind,
            average=self.config.average_decay > 0,
        )
        self.timer = StepTimer(
            config=self.config,
            architecture=recipe.model,
            vocab_size=self.vocab_size,
            device=self.here,
            num_devices=self.devices,
            sheet=self.sheet,
            fits=lambda *training: self.memory(*training).total <= FILL * self.device_bytes,
        )
        self.asked_layout = None if self.config.parallel == ParallelConfig() else self.config.parallel
        self.values: dict[str, dict[str, Any]] = {}
        self.calibration: dict[str, Any] = {}

    def set(self, name: str, value: Any, reason: str) -> Any:
        self.values[name] = {"value": value, "reason": reason}
        return value

    def plan(self) -> dict[str, Any]:
        if self.config.deterministic:  # before anything is measured: a GPU's libraries read it once
            make_deterministic()
        self._set_devices()
        precision = self.set("precision", *self._precision())
        length = self.set("sequence_length", *self._sequence_length())
        budget = parse_budget(self.config.budget) if self.config.budget else None
        if budget is None and self.config.steps is None:
            raise UserError("pretrain needs a budget (pretrain.budget = '6 minutes') or a number of steps")
        rows = self._rows(SMALL_BATCH_TOKENS, length)
        self._check_rows(length, rows)
        shape, reason, tokens = self._shape(budget, length, rows, precision)
        wanted, batch_reason = batch_tokens(tokens, self.accelerator)
        if self._rows(wanted, length) != rows:
            rows = self._rows(wanted, length)
            self._check_rows(length, rows)
        if self.config.batch_size:
            batch_reason = "set in the recipe"
        self.set(
            "batch_size", rows, batch_reason if self.config.batch_size else f"{rows * length:,} tokens: {batch_reason}"
        )
        placement = self._place(shape, rows, length, precision)
        if placement is None:
            raise self._too_large(shape, rows, length, precision)
        self._describe_placement(placement)
        speed = self._compilation(
            budget,
            shape,
            self._mean_rows(rows) * length,
            length,
            partial(self.timer.speed, shape, placement, self._mean_rows(rows), length, precision, steps=9),
        )
        steps = self._steps(budget, shape, speed, self._mean_rows(rows) * length, length)
        self._describe(shape, reason)
        tokens = length * _schedule(self.config, rows, length, steps).total_rows()
        stages = ", over the stages of the batch" if self.config.batch_stages else ""
        self.set("tokens", tokens, f"steps x batch x sequence length{stages}")
        epochs = tokens / self.train_tokens
        self.set("epochs", round(epochs, 3), self._about_epochs(epochs, self._useful_epochs(shape)))
        self._set_optimizer(rows * length, shape.hidden_size, tokens)
        predicted = self._predict(shape, placement, speed, steps, tokens, length)
        self._say(predicted)
        return {
            "values": self.values,
            "model": shape.model_dump(),
            "predicted": predicted,
            "calibration": self.calibration,
        }

    # What there is to compute with

    def _device_bytes(self, processes_here: int) -> int:
        if self.sheet is not None:
            return self.sheet.memory_bytes
        if self.here == "cuda":
            return torch.cuda.get_device_properties(0).total_memory
        return memory_bytes() // processes_here

    def _set_devices(self) -> None:
        if self.sheet is not None:
            self.set("devices", self.devices, f"{self.sheet.name}, not here: estimated from its data sheet")
            return
        threads = self.set("threads", use_threads(), "one per processor (OMP_NUM_THREADS overrides)")
        self.calibration["threads"] = threads
        name = device_name(torch.device(self.here))
        self.set("devices", self.devices, f"{'each like ' if self.devices > 1 else ''}{name}")

    def _precision(self) -> tuple[str, str]:
        if self.config.precision != "auto":
            return self.config.precision, "set in the recipe"
        if self.accelerator:
            return "bfloat16", "what accelerators are built for; weights stay float32 (Micikevicius et al. 2018)"
        gain = bfloat16_speedup()
        self.calibration["bfloat16_matmul_speedup"] = round(gain, 2)
        chosen = "bfloat16" if gain > 1.3 else "float32"
        return chosen, f"bfloat16 products measured {gain:.1f}x as fast as float32 here"

    # Rows and batches

    def _sequence_length(self) -> tuple[int, str]:
        if self.config.sequence_length:
            return self.config.sequence_length, "set in the recipe"
        context = self.recipe.model.max_position_embeddings
        if self.accelerator:
            length, reason = 2048, "as nanochat trains, shorter for little text"
            while length > 256 and length * 64 > self.train_tokens:
                length //= 2
        else:
            length = 256
            reason = "best bits per byte at equal time on the demo's data among 128, 256 and 512 (LOG.md)"
        if context and context < length:
            return context, "the longest context (model.max_position_embeddings)"
        return length, reason

    def _rows(self, tokens: int, length: int) -> int:
        """Rows of a batch: those asked for, or `tokens` worth, less for little text, a multiple of the devices."""
        if self.config.batch_size:
            return self.config.batch_size
        rows = max(1, tokens // length)
        while rows > 1 and rows * length * 4 > self.train_tokens:
            rows //= 2
        layout = self.config.parallel
        groups = max(1, self.devices // (layout.context * layout.tensor))
        rows = -(-rows // groups) * groups
        wider = range(rows, 8 * rows + 1, groups)  # until every stage can be divided too
        stages = self.config.batch_stages
        return next((n for n in wider if all(size % groups == 0 for size in rows_of_stages(n, stages))), rows)

    def _mean_rows(self, rows: int) -> float:
        return mean_rows(rows, self.config.batch_stages)

    def _check_rows(self, length: int, rows: int) -> None:
        """Refuse rows that the model or the data cannot fill, before anything is measured."""
        context = self.recipe.model.max_position_embeddings
        if context and context < length:
            raise UserError(
                f"model.max_position_embeddings = {context} is shorter than the training rows "
                f"(pretrain.sequence_length = {length}); raise it, or shorten the rows"
            )
        most_rows = self.train_tokens // length + self.num_documents  # no document leaves more than one row unfilled
        if rows > most_rows:
            raise UserError(
                f"the training text has {self.train_tokens} tokens, at most {most_rows} rows of {length}, but a batch "
                f"takes {rows}; give more text, set pretrain.batch_size to {most_rows} or less, or shorten "
                "pretrain.sequence_length"
            )

    # Which model

    def _shape(self, budget: Amount | None, length: int, rows: int, precision: str) -> tuple[ModelConfig, str, float]:
        """The model, why that one, and about how many tokens it will train on."""
        asked, per_step = self.recipe.model, self._mean_rows(rows) * length
        if asked.hidden_size and asked.num_hidden_layers:
            shape = asked.build(self.vocab_size, length)
            if self.config.batch_size or self.config.steps:  # then nothing hangs on the tokens
                return shape, "set in the recipe", (self.config.steps or 1) * per_step
            sizes, names = [shape], "set in the recipe"
        else:
            if budget is None:
                raise UserError(
                    "with pretrain.steps and no budget, set model.hidden_size and model.num_hidden_layers too"
                )
            sizes, names = candidates(asked, self.vocab_size, length), ""
            most = MOST_WEIGHTS_PER_TOKEN * self.train_tokens
            sizes = [one for one in sizes if one.num_matrix_parameters() <= most] or sizes[:1]
        assert budget is not None
        placed = [(shape, self._place(shape, rows, length, precision)) for shape in sizes]
        fitting = [(shape, placement) for shape, placement in placed if placement is not None]
        if not fitting:
            raise self._too_large(sizes[0], rows, length, precision)
        seconds = self._seconds_per_step(budget, fitting, rows, length, precision)
        affordable = [
            (shape, steps)
            for (shape, _), each in zip(fitting, seconds, strict=True)
            if (steps := self._affordable(budget, shape, each, per_step, length)) >= LEAST_STEPS
            and steps >= (self.config.steps or 0)
        ]
        if not affordable:
            raise self._too_small(budget, fitting[0][0], seconds[0], per_step, length)
        affordable = [(shape, min(self.config.steps or steps, steps)) for shape, steps in affordable]
        shape, steps = self._best(affordable, budget, per_step)
        what = (
            "compute-optimal for that many tokens (Hoffmann et al. 2022)"
            if budget.unit == "tokens"
            else ("lowest expected bits per byte")
        )
        speed = (
            "" if budget.unit in ("tokens", "FLOPs") else f" at the {'estimated' if self.sheet else 'measured'} speed"
        )
        return shape, names or f"{what} among {len(fitting)} sizes{speed}", steps * per_step

    def _best(self, sized: list[tuple[ModelConfig, int]], budget: Amount, per_step: float) -> tuple[ModelConfig, int]:
        """The size of lowest expected bits per byte; for a fixed number of tokens, where more weights always help, the
        largest that is the best use of its own computation."""
        if budget.unit != "tokens":
            return min(sized, key=lambda one: self._quality(one[0], one[1] * per_step))
        weights = [shape.num_matrix_parameters() for shape, _ in sized]
        best = sized[0]
        for (shape, steps), own in zip(sized, weights, strict=True):
            tokens = [steps * per_step * own / other for other in weights]  # of equal computation
            expected = [self._quality(one, count) for (one, _), count in zip(sized, tokens, strict=True)]
            if min(expected) == self._quality(shape, steps * per_step):
                best = (shape, steps)
        return best

    def _quality(self, shape: ModelConfig, tokens: float) -> float:
        weights, epochs = shape.num_matrix_parameters(), tokens / self.train_tokens
        return expected_on_text(self.law, weights, epochs, self.train_tokens, self.train_bytes)

    # What a budget buys

    def _affordable(self, budget: Amount, shape: ModelConfig, seconds: float, per_step: float, length: int) -> int:
        """Steps that a budget buys, at most as many as still teach something."""
        amount = self._bought(budget, shape, seconds, per_step, length)
        if self.config.steps is not None:  # whoever says how many wants them, however often the text repeats
            return int(amount)
        return int(min(amount, max(self._useful_epochs(shape) * self.train_tokens / per_step, LEAST_STEPS)))

    def _useful_epochs(self, shape: ModelConfig) -> float:
        return useful_epochs(self.law, shape.num_matrix_parameters(), self.train_tokens, self.train_bytes)

    def _bought(self, budget: Amount, shape: ModelConfig, seconds: float, per_step: float, length: int) -> float:
        """Steps, as a fraction."""
        price = self.recipe.plan.price_per_hour
        dollars = None if price is None else price * self.devices
        return steps_bought(budget, per_step, shape.flops_per_token(length), seconds, dollars)

    def _too_small(
        self, budget: Amount, smallest: ModelConfig, seconds: float, per_step: float, length: int
    ) -> UserError:
        steps = max(LEAST_STEPS, self.config.steps or 0)
        advised = enough(budget, self._bought(budget, smallest, seconds, per_step, length) / steps)
        return UserError(
            f"a budget of {budget} is too small for any model: the smallest (width {smallest.hidden_size}, "
            f"{smallest.num_hidden_layers} layers) wants {steps} steps; set pretrain.budget = '{advised}' or more"
        )

    def _steps(self, budget: Amount | None, shape: ModelConfig, speed: Speed, per_step: float, length: int) -> int:
        if self.config.steps:
            return self.set("steps", self.config.steps, "set in the recipe")
        assert budget is not None
        steps = max(1, self._affordable(budget, shape, speed.seconds_per_step, per_step, length))
        reason = f"{budget}"
        if budget.unit in ("seconds", "dollars"):
            reason += f" at {speed.seconds_per_step * 1000:.0f} ms per step, {speed.how}"
        if steps < int(self._bought(budget, shape, speed.seconds_per_step, per_step, length)):
            reason = (
                f"{steps * per_step / self.train_tokens:.2g} epochs, less than the budget: beyond that a model of this "
                "size learns the text by heart and is expected to get worse on other text (LOG.md); give more text"
            )
            self.progress.say(f"note: {steps} steps are {reason}")
        return self.set("steps", steps, reason)

    # Memory and layout

    def _place(self, shape: ModelConfig, rows: int, length: int, precision: str) -> Placement | None:
        schedule, asked = _schedule(self.config, rows, length), self.config.activation_checkpointing
        levels: Sequence[Checkpointing] = LEVELS if asked == "none" else (asked,)
        if shape.num_experts:
            levels = [level for level in levels if level != "selective"]
        if not levels:
            raise UserError(
                "pretrain.activation_checkpointing = selective knows no mixture of experts; set full, or none to leave "
                "it to the plan"
            )
        return place(
            schedule.sizes(),
            schedule.lengths(),
            self.devices,
            FILL * self.device_bytes,
            lambda rows, checkpointing, layout: self.memory(shape, rows, length, precision, checkpointing, layout),
            lambda layout: self._misfits(layout, shape),
            self.asked_layout,
            self.config.micro_batch_size,
            levels,
            None if self.accelerator else TOKENS_PER_THREAD * torch.get_num_threads(),
        )

    def _misfits(self, layout: ParallelConfig, shape: ModelConfig) -> list[str]:
        """Why a layout suits neither pretraining nor finetuning, which share it."""
        stages = [self.config, *([self.recipe.finetune] if self.recipe.finetune.enabled else [])]
        problems = [misfits(layout, shape, stage.optimizer.kind, stage.fp8) for stage in stages]
        return list(dict.fromkeys(problem for each in problems for problem in each))

    def _too_large(self, shape: ModelConfig, rows: int, length: int, precision: str) -> UserError:
        one = self.memory(shape, 1, length, precision, "full", ParallelConfig(shard=self.devices))
        asked = self.config.micro_batch_size
        if asked is not None:
            one = self.memory(shape, asked, length, precision)
        what = "the machine has" if self.devices == 1 and self.sheet is None else "each device has"
        return UserError(
            f"this plan needs about {one.total / 2**30:.1f} GiB of memory{'' if asked else ' even row by row'} and "
            f"{what} {self.device_bytes / 2**30:.1f} GiB; set a smaller pretrain.batch_size (or "
            "pretrain.micro_batch_size), pretrain.sequence_length or model.hidden_size, or use more devices"
        )

    def _describe_placement(self, placement: Placement) -> None:
        layout, micro, checkpointing = placement.reasons
        self.set("parallel", placement.layout.model_dump(), layout)
        self.set("micro_batch_size", placement.micro_rows, micro)
        self.set("activation_checkpointing", placement.checkpointing, checkpointing)

    # Speed

    def _seconds_per_step(
        self, budget: Amount, placed: list[tuple[ModelConfig, Placement]], rows: int, length: int, precision: str
    ) -> list[float]:
        """Of a mean step of each size; where the devices are here one is measured, and the others follow from costs."""
        if budget.unit in ("tokens", "FLOPs"):
            return [1.0] * len(placed)  # time buys nothing here
        mean = self._mean_rows(rows)
        if self.sheet is not None:
            return [self.timer.speed(*one, mean, length, precision, steps=0).seconds_per_step for one in placed]
        probe, placement = placed[min(3, len(placed) - 1)]
        seconds = self.timer.speed(probe, placement, mean, length, precision, steps=5).seconds_per_step
        return [seconds * relative_cost(shape, probe, length) for shape, _ in placed]

    def _compilation(
        self,
        budget: Amount | None,
        shape: ModelConfig,
        per_step: float,
        length: int,
        measure: Callable[..., Speed],
    ) -> Speed:
        """Decide whether the layers are compiled: where it saves more time than it takes, both measured."""
        speed = measure()
        if self.config.compile is not None:
            self.set("compile", self.config.compile, "set in the recipe")
            if self.config.compile and self.sheet is None:  # finetuning is not compiled
                self.calibration["uncompiled_seconds_per_step"] = measure(compiled=False).seconds_per_step
            return speed
        steps = self.config.steps
        if steps is None:
            assert budget is not None
            steps = self._affordable(budget, shape, speed.seconds_per_step, per_step, length)
        expected = steps * speed.seconds_per_step
        reason = ""
        if self.sheet is not None or self.devices > 1:
            reason = "measured for one device that is here only; set pretrain.compile = true to have it"
        elif expected < COMPILED_FROM_SECONDS:
            reason = f"runs of less than {COMPILED_FROM_SECONDS} s do not begin with a compiler"
        elif self.here == "cpu" and find_compiler() is None:
            reason = "there is no C++ compiler (g++ or clang++) here"
        if reason:
            self.set("compile", False, reason)
            return speed
        self.progress.say("compiling the layers, to see whether that pays")
        began = time.perf_counter()
        try:
            compiled = measure(compiled=True)
        except RuntimeError as error:
            failure = compiler_failure(error)
            if failure is None:
                raise
            self.set("compile", False, f"it failed here: {failure}")
            return speed
        took = time.perf_counter() - began
        gain = 1 - compiled.seconds_per_step / speed.seconds_per_step
        pays = gain * expected > took
        self.calibration["uncompiled_seconds_per_step"] = speed.seconds_per_step
        self.calibration["compilation_seconds"] = round(took, 1)
        what = f"{gain:.0%} less time per step" if gain >= 0 else f"{-gain:.0%} more time per step"
        self.set("compile", pays, f"{what}, measured; {took:.0f} s to compile and measure")
        return compiled if pays else replace(speed, peak_memory_bytes=compiled.peak_memory_bytes)

    # Words

    def _describe(self, shape: ModelConfig, reason: str) -> None:
        named = "family" in self.recipe.model.model_fields_set
        self.set("family", shape.family, "set in the recipe" if named else "chosen among four (docs/decisions/002)")
        self.set("hidden_size", shape.hidden_size, reason)
        self.set("num_hidden_layers", shape.num_hidden_layers, "depth grows with width (LOG.md; Qwen3, 2025)")
        self.set("num_attention_heads", shape.num_attention_heads, f"hidden_size / head_dim {shape.head_dim}")
        if shape.num_experts:
            chosen = shape.num_experts_per_token
            self.set("num_experts", shape.num_experts, f"{chosen} of them compute a token")
            self.set("expert_size", shape.expert_size, "the width of a network without experts, divided among those")
        else:
            self.set("intermediate_size", shape.intermediate_size, "8/3 of the width when gated (Shazeer 2020)")
        self.set("vocab_size", shape.vocab_size, "tokenizer")
        self.set("parameters", parameters(shape), "matrix weights and embedding")

    def _about_epochs(self, epochs: float, useful: float) -> str:
        reason = f"over {'an estimated ' if self.estimated else ''}{self.train_tokens:,} training tokens"
        if epochs > useful * 1.01:
            reason += f"; beyond {useful:.2g} a model of this size is expected to get worse on other text (LOG.md)"
        elif epochs > FEW_EPOCHS:
            reason += f"; beyond {FEW_EPOCHS} they teach less and less (Muennighoff et al. 2023)"
        return reason

    def _set_optimizer(self, batch: int, width: int, tokens: float) -> None:
        settings, scaled = scale_optimizer(self.config.optimizer, batch, width, tokens, self.accelerator)
        for name, one in scaled.items():
            self.set(name, one.value, one.reason)
        to_zero = settings.schedule == "stable" and settings.final_learning_rate_fraction == 0
        reason = (
            "linear to zero (Bergsma et al. 2025)" if to_zero else f"schedule {settings.schedule}, set in the recipe"
        )
        self.set("decay_fraction", settings.decay_fraction, reason)
        self.set("optimizer", settings.model_dump(mode="json"), "all settings of the optimizers, with the above")

    def _predict(
        self, shape: ModelConfig, placement: Placement, speed: Speed, steps: int, tokens: int, length: int
    ) -> dict[str, Any]:
        seconds = steps * speed.seconds_per_step
        flops = shape.flops_per_token(length) * tokens
        weights, expected = shape.num_matrix_parameters(), self._quality(shape, tokens)
        effective = effective_bytes(tokens * self.bytes_per_token, self.train_bytes)
        harm = overfitting(tokens / self.train_tokens, weights, self.train_tokens)
        low, high = (harm * bound for bound in self.law.interval(weights, effective))
        predicted: dict[str, Any] = {
            "seconds": round(seconds, 1),
            "seconds_interval": [round(steps * speed.low, 1), round(steps * speed.high, 1)],
            "seconds_per_step": round(speed.seconds_per_step, 5),
            "tokens_per_second": round(tokens / seconds),
            "memory_bytes": self._memory(placement, speed),
            "flops": float(f"{flops:.4g}"),
            "bits_per_byte": round(expected, 3),
            "bits_per_byte_interval": [round(low, 3), round(high, 3)],
            "extrapolation": round(self.law.extrapolation(weights, effective), 1),
        }
        self.calibration["flops_per_second"] = round(flops / seconds)
        settings = self.recipe.plan
        if settings.watts:
            predicted["energy_kwh"] = float(f"{settings.watts * self.devices * seconds / 3.6e6:.3g}")
        if settings.price_per_hour:
            predicted["cost_dollars"] = round(settings.price_per_hour * self.devices * seconds / 3600.0, 2)
        return predicted

    def _memory(self, placement: Placement, speed: Speed) -> int:
        """Peak of training: what measuring its step took and the copy for a checkpoint, or what the formulas say."""
        compiler = COMPILER_BYTES if self.values["compile"]["value"] and not self.accelerator else 0
        estimate = placement.memory.total + compiler
        if speed.peak_memory_bytes is None:
            return estimate
        self.calibration["memory_estimate_bytes"] = estimate
        return speed.peak_memory_bytes + placement.memory.checkpoint

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


def _schedule(config: TrainingConfig, rows: int, length: int, steps: int = 1) -> BatchSchedule:
    return BatchSchedule(rows, length, steps, config.batch_stages, config.sequence_stages)
