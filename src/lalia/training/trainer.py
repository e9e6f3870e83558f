"""The training loop: one for every objective."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lalia.data.loader import Batch
from lalia.errors import UserError
from lalia.model.transformer import Transformer
from lalia.progress import Progress
from lalia.training.checkpoints import Checkpoint, load_newest, save_checkpoint
from lalia.training.config import OptimizerConfig
from lalia.training.objectives import Objective
from lalia.training.optimizers import make_optimizers
from lalia.training.schedule import learning_rate_scale

MAX_SKIPPED_IN_A_ROW = 20


class Batches(Protocol):
    """Where batches come from: any step's batch, at any time, the same each time."""

    def batch(self, step: int) -> Batch: ...


class Trainer:
    """Trains a model for a fixed number of steps, survives being killed, and ends bit for bit the same.

    Everything that influences the weights is a function of the settings and the step; wall-clock time only decides
    when a checkpoint is written.

    Args:
        model: trained in place; weights float32, activations in `model.compute_dtype`.
        batches: stateless source of batches.
        objective: loss of a batch as (sum, weight); the gradient is that of sum / weight over the whole batch.
        num_steps: optimizer steps.
        optimizer: learning rates and schedule.
        folder: where checkpoints and metrics.jsonl are kept.
        run_fingerprint: identity of settings and data; a checkpoint of another is refused.
        progress: where to report.
        micro_batch_size: rows per forward pass; None means the whole batch. It does not change the result beyond
            rounding.
        checkpoint_seconds: time between checkpoints.
        unit: what the objective's weight counts, for messages.
        evaluate: called at `evaluation_steps` (and never timed as training), returns fields for the log.
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
        micro_batch_size: int | None = None,
        checkpoint_seconds: float = 30.0,
        evaluate: Callable[[int], dict[str, Any]] | None = None,
        evaluation_steps: frozenset[int] = frozenset(),
        unit: str = "token",
    ) -> None:
        self.model, self.batches, self.objective = model, batches, objective
        self.num_steps, self.settings = num_steps, optimizer
        self.folder, self.run_fingerprint, self.progress = folder, run_fingerprint, progress
        self.micro_batch_size, self.checkpoint_seconds = micro_batch_size, checkpoint_seconds
        self.evaluate, self.evaluation_steps = evaluate, evaluation_steps
        self.unit = unit
        self.optimizers = make_optimizers(model, optimizer)
        self.step = 0
        self.seconds = 0.0
        """Time spent on optimizer steps, evaluations and checkpoints excluded."""
        self.tokens = 0
        """Tokens trained on: predicted targets, not padding."""
        self.skipped = 0
        self._skipped_in_a_row = 0

    def train(self) -> dict[str, Any]:
        """Run the remaining steps; returns what happened (steps, tokens, seconds, ...).

        Raises:
            UserError: if the loss stays non-finite; the last good checkpoint remains.
        """
        self._resume()
        self.model.train()
        last_checkpoint = time.monotonic()
        losses: list[tuple[float, int]] = []
        while self.step < self.num_steps:
            if self.step in self.evaluation_steps:
                self._evaluate()
            began = time.perf_counter()
            loss, weight = self._train_step(self.batches.batch(self.step))
            self.seconds += time.perf_counter() - began
            self.tokens += weight
            self.step += 1
            losses.append((loss, weight))
            if self.step % self._log_every == 0 or self.step == self.num_steps:
                self._log(losses, time.perf_counter() - began)
                losses = []
            if time.monotonic() - last_checkpoint > self.checkpoint_seconds and self.step < self.num_steps:
                self.save()
                last_checkpoint = time.monotonic()
        self.save()  # before the last evaluation, so that nothing of the training can be lost
        self._evaluate()
        return {
            "steps": self.step,
            "tokens": self.tokens,
            "training_seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.tokens / max(self.seconds, 1e-9)),
            "skipped_steps": self.skipped,
        }

    @property
    def _log_every(self) -> int:
        return max(1, self.num_steps // 200)

    def _train_step(self, batch: Batch) -> tuple[float, int]:
        """One optimizer step; returns the loss sum in nats and its weight in tokens."""
        scale = learning_rate_scale(
            self.step,
            self.num_steps,
            self.settings.warmup_fraction,
            self.settings.decay_fraction,
            self.settings.final_learning_rate_fraction,
        )
        total, weight = 0.0, 0
        for part in batch.split(self.micro_batch_size):
            loss, count = self.objective(self.model, part)
            loss.backward()
            total += float(loss.detach())
            weight += count
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) / max(weight, 1)
        if weight and math.isfinite(norm) and math.isfinite(total):
            clip = min(1.0, self.settings.gradient_clip / (norm + 1e-12))
            for gradient in gradients:
                gradient.mul_(clip / weight)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * scale
                optimizer.step()
            self._skipped_in_a_row = 0
        else:
            self._skip(total, norm)
        self.model.zero_grad(set_to_none=True)
        return total, weight

    def _skip(self, loss: float, norm: float) -> None:
        self.skipped += 1
        self._skipped_in_a_row += 1
        self.progress.say(f"warning: step {self.step} skipped: loss {loss}, gradient norm {norm}")
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise UserError(
                f"the loss or gradient was not finite for {MAX_SKIPPED_IN_A_ROW} steps in a row (step {self.step}); "
                "lower the learning rates (pretrain.optimizer.matrix_learning_rate) or use precision = 'float32'. "
                f"The last good checkpoint is in {self.folder}"
            )

    def _log(self, losses: list[tuple[float, int]], last_step_seconds: float) -> None:
        weight = sum(count for _, count in losses)
        loss = sum(total for total, _ in losses) / max(weight, 1)
        speed = self.tokens / max(self.seconds, 1e-9)
        remaining = (self.num_steps - self.step) * self.seconds / self.step
        self.progress.record(
            "step",
            step=self.step,
            loss=round(loss, 5),
            learning_rate=self.optimizers[0].param_groups[0]["lr"],
            tokens=self.tokens,
            seconds=round(self.seconds, 3),
            tokens_per_second=round(speed),
            step_seconds=round(last_step_seconds, 4),
        )
        if self.step % (self._log_every * 5) == 0 or self.step == self.num_steps:
            self.progress.say(
                f"step {self.step:>6}/{self.num_steps}  loss {loss:.3f} nats/{self.unit}  "
                f"{speed:>7,.0f} {self.unit}s/s  {_clock(self.seconds)} done, {_clock(remaining)} to go"
            )

    def _evaluate(self) -> None:
        if self.evaluate is None:
            return
        self.model.eval()
        fields = self.evaluate(self.step)
        self.model.train()
        self.progress.record("evaluation", step=self.step, seconds=round(self.seconds, 3), **fields)
        self.progress.say(
            f"step {self.step:>6}/{self.num_steps}  "
            + "  ".join(f"{key.replace('_', ' ')} {value:.3f}" for key, value in fields.items() if _is_number(value))
        )
        for key, value in fields.items():
            if isinstance(value, str):
                self.progress.say(f"    {key}: {value!r}")

    def save(self) -> None:
        """Write a checkpoint of everything that the remaining steps depend on."""
        tensors: dict[str, Tensor] = {f"model.{key}": value for key, value in self.model.state_dict().items()}
        for index, optimizer in enumerate(self.optimizers):
            for number, state in optimizer.state_dict()["state"].items():
                for key, value in state.items():
                    tensors[f"optimizer.{index}.{number}.{key}"] = value
        meta = {
            "run_fingerprint": self.run_fingerprint,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "skipped": self.skipped,
        }
        save_checkpoint(self.folder, Checkpoint(self.step, tensors, meta))

    def _resume(self) -> None:
        checkpoint = load_newest(self.folder, self.run_fingerprint, self.progress)
        self._truncate_metrics(checkpoint.step if checkpoint else 0)
        if checkpoint is None:
            return
        weights = {k.removeprefix("model."): v for k, v in checkpoint.tensors.items() if k.startswith("model.")}
        self.model.load_state_dict(weights)
        for index, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in checkpoint.tensors.items():
                if key.startswith(f"optimizer.{index}."):
                    _, _, number, name = key.split(".")
                    state.setdefault(int(number), {})[name] = value
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        self.step = checkpoint.step
        self.seconds, self.tokens = checkpoint.meta["seconds"], checkpoint.meta["tokens"]
        self.skipped = checkpoint.meta["skipped"]
        self.progress.say(f"continuing at step {self.step} of {self.num_steps}")

    def _truncate_metrics(self, step: int) -> None:
        """Drop log lines of steps that will be run again."""
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


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
