"""The training loop: one for every objective."""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lalia.data.loader import Batch
from lalia.data.packing import keyed_hash
from lalia.errors import UserError
from lalia.model.transformer import Transformer
from lalia.progress import Progress
from lalia.training.activation_checkpointing import checkpoint_activations
from lalia.training.averaging import WeightAverage
from lalia.training.checkpoints import Checkpoints
from lalia.training.compilation import compile_layers, uncompiled
from lalia.training.config import LoopConfig, OptimizerConfig
from lalia.training.fp8 import convert_to_fp8
from lalia.training.guard import StepGuard
from lalia.training.interruption import Interruption
from lalia.training.meters import Meters, first_start
from lalia.training.objectives import LossModule, Objective
from lalia.training.optimizers import make_optimizers
from lalia.training.parallel.apply import GradientSync, gradient_norm, parallelize
from lalia.training.parallel.context import shard_batch
from lalia.training.parallel.heartbeat import Heartbeat, is_communication_failure
from lalia.training.parallel.layout import check_model
from lalia.training.parallel.state import local, pieces, saved_state
from lalia.training.parallel.world import World
from lalia.training.prefetch import Prefetcher
from lalia.training.schedule import evenly_spaced, learning_rate_scale


class Batches(Protocol):
    """Where batches come from: any step's batch, at any time, the same each time."""

    def batch(self, step: int) -> Batch: ...


class Trainer:
    """Trains a model for a fixed number of steps, survives being killed, and ends bit for bit the same.

    Everything that influences the weights is a function of the settings and the step; wall-clock time only decides
    when a checkpoint is written. Every process of a `World` runs the same loop on its part of each batch.

    Args:
        model: trained in place; weights float32, activations in `model.compute_dtype`.
        batches: stateless source of whole batches.
        objective: loss of a batch as (sum, weight, metrics); the gradient is that of sum / weight over the batch.
        num_steps: optimizer steps.
        optimizer: learning rates and schedule.
        folder: where checkpoints and metrics.jsonl are kept.
        run_fingerprint: identity of settings and data; a checkpoint of another is refused.
        progress: where to report.
        loop: micro-batches, checkpoints and what to do about bad steps.
        world: the processes that train together; None means this one alone.
        unit: what the objective's weight counts, for messages.
        meters: count and time the steps; None means meters without peaks, so without utilisation.
        evaluate: called at `evaluation_steps` and at the end (never timed as training), returns fields for the log.
    """

    def __init__(
        self,
        model: Transformer,
        batches: Batches,
        objective: Objective,
        num_steps: int,
        optimizer: OptimizerConfig,
        folder: Path,
        run_fingerprint: str,
        progress: Progress,
        loop: LoopConfig | None = None,
        world: World | None = None,
        evaluate: Callable[[int], dict[str, Any]] | None = None,
        evaluation_steps: frozenset[int] = frozenset(),
        unit: str = "token",
        meters: Meters | None = None,
    ) -> None:
        self.model, self.batches = model, batches
        self.num_steps, self.settings = num_steps, optimizer
        self.folder, self.run_fingerprint, self.progress = folder, run_fingerprint, progress
        self.loop = loop or LoopConfig()
        self.world = world or World.alone(model.device)
        self.evaluate, self.evaluation_steps = evaluate, evaluation_steps
        self.unit = unit
        check_model(self.world.layout, model.config, optimizer.kind, self.loop.fp8)
        if self.loop.fp8:
            convert_to_fp8(model)
        model.set_dropout(self.loop.dropout)
        checkpoint_activations(model, self.loop.activation_checkpointing)
        if self.loop.compile:
            compile_layers(model)
        parallelize(model, self.world)
        self.sync = GradientSync(LossModule(model, objective), self.world)
        self.optimizers = make_optimizers(model, optimizer, self.world.weights)
        self.average = WeightAverage(model, self.loop.average_decay) if self.loop.average_decay else None
        self.guard = StepGuard(self.loop.spike_deviations, self.world.device)
        self.milestones = evenly_spaced(num_steps, self.loop.milestones)
        self.checkpoints = Checkpoints(
            folder,
            run_fingerprint,
            self.world,
            progress,
            self.loop.keep_checkpoints,
            self.milestones,
            self.world.timeout_seconds,
        )
        self.heartbeat = Heartbeat(self.world)
        self.meters = meters or Meters(model.config.flops_per_token, self.world.device, self.world.size)
        self.step = 0
        self.rewinds = 0
        self.passed_over = 0
        """Batches left out by going back: step s trains on batch s + passed_over."""
        self._first_started: float | None = None
        self._sums: dict[str, Tensor] = {}
        """Loss, weight and metrics since the last line of the log, on the device."""

    def train(self) -> dict[str, Any]:
        """Run the remaining steps; returns what happened (steps, tokens, seconds, ...).

        Raises:
            UserError: if bad steps go on after going back, or another process does not answer; the last good
                checkpoint remains.
            KeyboardInterrupt, SystemExit: after Ctrl-C or SIGTERM, when everything is saved.
        """
        try:
            self._train()
        except (RuntimeError, OSError) as error:
            if self.world.size > 1 and is_communication_failure(error):
                raise self.heartbeat.explain(error) from error
            self.checkpoints.wait()
            raise
        except BaseException:
            self.checkpoints.wait()  # whoever goes on in this folder finds nothing being written
            raise
        figures = self.meters.summary()
        return {
            "steps": self.step,
            "training_seconds": figures.pop("seconds"),
            **figures,
            "skipped_steps": self.skipped,
            "rewinds": self.rewinds,
        }

    def _train(self) -> None:
        self._resume()
        self._first_started = first_start(self.progress.log_path)
        self.progress.record("start")
        self.model.train()
        with Interruption() as interruption:
            while not self._run(interruption) or not self.save():
                self._go_back()
            # Saved before the last evaluation, so that nothing of the training can be lost.
            with self.meters.phase("checkpoint"):
                self.checkpoints.wait()
            if self.world.agree(interruption.received is not None)[0]:
                self._leave(interruption)
        if self.average is not None:
            self.average.exchange()
        self._evaluate()

    @property
    def skipped(self) -> int:
        """Steps that were not applied."""
        return int(self.guard.counts[1])

    @property
    def _log_every(self) -> int:
        return max(1, self.num_steps // 200)

    def _run(self, interruption: Interruption) -> bool:
        """Steps until the end; False if training has to go back instead."""
        ahead = Prefetcher(self._prepared, self.step, self.num_steps)
        self.meters.start(self._first_started)
        saved_at = time.perf_counter()
        try:
            while self.step < self.num_steps:
                if self.step in self.evaluation_steps:
                    if not self._skipping() and not self.save():
                        return False
                    self._evaluate(averaged=True)
                    saved_at = time.perf_counter()
                self.heartbeat.beat(self.step, "waiting for its batch")
                with self.meters.waiting():
                    batch = ahead.take()
                self.heartbeat.beat(self.step, "computing")
                self._train_step(batch)
                self.step += 1
                if self.step % self._log_every == 0 or self.step == self.num_steps:
                    self._log()
                look = self.step % self.loop.max_skipped == 0 or self.step == self.num_steps
                if look and int(self.guard.counts[2]) >= min(self.loop.max_skipped, self.num_steps):
                    return False
                due = time.perf_counter() - saved_at > self.loop.checkpoint_seconds
                stopped, due = self.world.agree(interruption.received is not None, due)
                wanted = stopped or due or self.step in self.milestones
                # While steps are being skipped older checkpoints are kept, which going back may need.
                if wanted and self.step < self.num_steps and (stopped or not self._skipping()):
                    if not self.save():
                        return False
                    saved_at = time.perf_counter()
                    if stopped:
                        self._leave(interruption)
            return True
        finally:
            ahead.stop()

    def _leave(self, interruption: Interruption) -> None:
        name = interruption.received.name if interruption.received else "a signal to another process"
        self.progress.say(f"stopped by {name} at step {self.step}, which is saved; the same command continues there")
        interruption.leave()

    def _prepared(self, step: int) -> Batch:
        """This process's part of a step's batch."""
        batch = self.batches.batch(step + self.passed_over)
        ranks = self.world.data_size
        if len(batch.tokens) % ranks:
            raise UserError(
                f"a batch of {len(batch.tokens)} rows cannot be divided among {ranks} groups of processes; set "
                f"pretrain.batch_size to a multiple of {ranks}, or choose another pretrain.parallel"
            )
        if ranks > 1:
            share = len(batch.tokens) // ranks
            batch = batch.rows(self.world.data_rank * share, (self.world.data_rank + 1) * share)
        batch = shard_batch(batch, self.world)
        return batch.pinned() if self.world.device.type == "cuda" else batch

    def _train_step(self, batch: Batch) -> None:
        """One optimizer step, without waiting for the device."""
        scale = learning_rate_scale(
            self.step,
            self.num_steps,
            self.settings.warmup_fraction,
            self.settings.decay_fraction,
            self.settings.final_learning_rate_fraction,
            self.settings.schedule,
        )
        sums: dict[str, Tensor] = {}
        parts = batch.split(self.loop.micro_batch_size)
        for number, part in enumerate(parts):
            if self.loop.dropout:
                self._seed_dropout(number)
            with self.sync(last=number == len(parts) - 1):
                loss, weight, metrics = self.sync.module(part.to(self.world.device))
                loss.backward()
            for key, value in {"loss": loss.detach(), "weight": weight, **metrics}.items():
                sums[key] = sums.get(key, 0.0) + value.double()
        totals = self.world.sum(torch.stack(list(sums.values())))
        sums = dict(zip(sums, totals.unbind(), strict=True))
        weight = sums["weight"].clamp(min=1.0)
        gradients = [local(p.grad) for p in self.model.parameters() if p.grad is not None]
        norm = gradient_norm(self.model, self.world) / weight
        # All processes must judge alike, to the last bit: one that skips a step alone would part from the others.
        loss, norm = self.world.from_main(torch.stack((sums["loss"] / weight, norm.double()))).unbind()
        present = sums["weight"] > 0
        usual = self.guard.judge(loss, norm, present)
        keep = usual * present
        _scale(gradients, ((self.settings.gradient_clip / (norm + 1e-12)).clamp(max=1.0) / weight).float())
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * scale
            optimizer.step(keep)
        if self.average is not None:
            self.average.update(self.step, keep)
        self.model.zero_grad(set_to_none=True)
        rows, length = batch.tokens.shape
        self.meters.step(rows * self.world.data_size, length * self.world.layout.context, sums["weight"])
        sums["skipped"] = 1.0 - usual.double()
        for key, value in sums.items():
            self._sums[key] = self._sums.get(key, 0.0) + value

    def _seed_dropout(self, part: int) -> None:
        """Let a micro-batch's dropout depend on the run, its batch and part and on the rows alone, so that a run that
        was interrupted goes on as if it had not been. Processes that share rows (tensor parallel) drop the same."""
        rows = self.world.data_rank, self.world.context_rank
        seeds = keyed_hash(np.array([part]), self.loop.seed, self.step + self.passed_over, *rows)
        torch.manual_seed(int(seeds[0]))

    def _go_back(self) -> None:
        """Return to the last checkpoint, and pass over the batches since.

        Raises:
            UserError: if there is none, or the run has gone back too often.
        """
        bad, rewinds, passed_over = self.step, self.rewinds, self.passed_over
        if self._finite(self._state()):
            row = f"for {self.loop.max_skipped} steps in a row"
            why = f"loss or gradient was not finite, or far above what it had been, {row}"
        else:
            why = "weights or the optimizer's state are no longer finite numbers"
        advice = (
            f"{why} (step {bad}, after going back {rewinds} times); lower the learning rates of the stage "
            "(optimizer.matrix_learning_rate) or use precision = 'float32'. The last good checkpoint is in "
            f"{self.folder}; other settings begin the stage anew and remove it, so copy what you want to keep"
        )
        if rewinds >= self.loop.max_rewinds or not self._load():
            raise UserError(advice)
        self.rewinds, self.passed_over = rewinds + 1, passed_over + bad - self.step
        self.guard.forget()
        self._sums = {}
        self._truncate_metrics(self.step)
        self.progress.record("rewind", step=self.step, from_step=bad, passed_over=self.passed_over)
        self.progress.say(
            f"warning: {why}; going back from step {bad} to {self.step}, and on with the batches after those"
        )

    def _log(self) -> None:
        figures = self.meters.read()
        sums = {key: float(value) for key, value in self._sums.items()}
        self._sums = {}
        weight, skipped = sums.pop("weight"), int(sums.pop("skipped"))
        means = {key: value / max(weight, 1.0) for key, value in sums.items()}
        if skipped:
            self.progress.say(
                f"warning: {skipped} of the last steps to {self.step} skipped: loss or gradient norm not finite, or "
                f"far above what it had been (loss {means['loss']:.3f})"
            )
        seconds = figures["seconds"]
        remaining = (self.num_steps - self.step) * seconds / self.step
        self.progress.record(
            "step",
            step=self.step,
            **{key: round(value, 5) for key, value in means.items()},
            learning_rate=self.optimizers[0].param_groups[0]["lr"],
            **figures,
            skipped=self.skipped,
        )
        if self.step % (self._log_every * 5) == 0 or self.step == self.num_steps:
            self.progress.say(
                f"step {self.step:>6}/{self.num_steps}  loss {means['loss']:.3f} nats/{self.unit}  "
                f"{figures['tokens_per_second']:>7,} {self.unit}s/s  {_clock(seconds)} done, {_clock(remaining)} to go"
            )

    def _evaluate(self, averaged: bool = False) -> None:
        if self.evaluate is None:
            return
        self.model.eval()
        average = self.average.applied() if self.average is not None and averaged else contextlib.nullcontext()
        with self.meters.phase("evaluation"), average, uncompiled(bool(self.loop.compile)):
            fields = self.evaluate(self.step)
        self.model.train()
        trained = self.meters.total
        self.progress.record(
            "evaluation", step=self.step, tokens=trained.trained, seconds=round(trained.seconds, 3), **fields
        )
        self.progress.say(
            f"step {self.step:>6}/{self.num_steps}  "
            + "  ".join(f"{key.replace('_', ' ')} {value:.3f}" for key, value in fields.items() if _is_number(value))
        )
        for key, value in fields.items():
            if isinstance(value, str):
                self.progress.say(f"    {key}: {value!r}")

    def _skipping(self) -> bool:
        """Whether the last step was not applied."""
        return bool(self.guard.counts[2])

    def save(self) -> bool:
        """Write a checkpoint of everything that the remaining steps depend on, beside the training.

        Returns:
            False, and nothing is written, if any of it is not a finite number.
        """
        self.heartbeat.beat(self.step, "saving")
        with self.meters.phase("checkpoint"):
            state = self._state()
            if not self._finite(state):
                return False
            meta = {"meters": self.meters.state(), "rewinds": self.rewinds, "passed_over": self.passed_over}
            self.checkpoints.save(self.step, state, meta)
        return True

    def _finite(self, state: dict[str, Tensor]) -> bool:
        """Whether all of it, in all processes, are finite numbers: their norms are, in one pass over them."""
        parts = [local(value) for value in state.values() if value.is_floating_point()]
        sizes = [part.norm() for part in parts if type(part) is Tensor]  # not of torchao's 8 bits
        finite = torch.stack([size.to(self.world.device, torch.float32) for size in sizes]).isfinite().all()
        return not self.world.agree(not bool(finite))[0]

    def _state(self) -> dict[str, Tensor]:
        state = saved_state(self.model, self.optimizers) | self.guard.state()
        if self.average is not None:
            for name, value in self.average.averages.items():
                for number, part in enumerate(pieces(self.model.config, name, value)):
                    state[f"average.{name}/{number}"] = part
        return state

    def _resume(self) -> None:
        found = self._load()
        self._truncate_metrics(self.step)
        if found:
            self.progress.say(f"continuing at step {self.step} of {self.num_steps}")

    def _load(self) -> bool:
        """Take everything from the newest checkpoint; False if there is none."""
        found = self.checkpoints.load(self._state())
        if found is None:
            return False
        self.step, meta = found
        self.meters.load(meta["meters"])
        self.rewinds, self.passed_over = meta["rewinds"], meta["passed_over"]
        return True

    def _truncate_metrics(self, step: int) -> None:
        """Drop log lines of steps that will be run again, after an interruption or after going back."""
        path = self.progress.log_path
        if path is None or not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                event = json.loads(line)
            except json.JSONDecodeError:  # the process was killed while writing this line
                continue
            at = event.get("step", 0)
            if at < step or (at == step and event.get("event") != "evaluation"):
                kept.append(line)
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def initialize(model: Transformer, seed: int) -> None:
    """Random weights from a seed.

    Matrices that read the residual stream are uniform with standard deviation hidden_size ** -0.5, those that write
    to it start at zero, so every layer begins as the identity and the gradient reaches all of them at once.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    bound = (3.0 / config.hidden_size) ** 0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 1:
                nn.init.constant_(parameter, 0.0 if config.norm_weight == "offset" else 1.0)
            elif name in ("position_embedding.weight", "type_embedding.weight"):
                nn.init.normal_(parameter, std=0.02, generator=generator)
            elif name == "embedding.weight":
                nn.init.normal_(parameter, std=embedding_std(config.tie_word_embeddings), generator=generator)
            elif name == "head.weight":
                nn.init.normal_(parameter, std=0.001, generator=generator)
            elif name.endswith(("attention.output.weight", "feed_forward.down.weight", "feed_forward.down")):
                nn.init.zeros_(parameter)
            else:
                nn.init.uniform_(parameter, -bound, bound, generator=generator)


def embedding_std(tied: bool) -> float:
    """Standard deviation of the initial embedding: near one when it is read only, small when it is the head too."""
    return 0.02 if tied else 0.8


def _scale(gradients: list[Tensor], factor: Tensor) -> None:
    torch._foreach_mul_(gradients, factor)  # pyright: ignore[reportPrivateImportUsage]


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
