"""How fast a run trains, how near that is to what the device can do, and what share of its time counted."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lalia.devices import peak_memory_bytes
from lalia.model.transformer import Transformer
from lalia.training.hardware import datasheet_flops, device_name, measured_flops
from lalia.training.hardware import synchronize as wait_for
from lalia.training.parallel.world import World

WARMUP_STEPS = 3
"""Steps of a process that no speed counts: allocators, autotuning and compilation are theirs."""

FLOPS_FORMULA = (
    "6 per matrix weight (the head included, the embedding not; of experts the chosen ones and the router) + 12 * "
    "heads * head_dim * min(window, sequence length) per layer; forward and backward, not halved for causality, "
    "recomputed activations not counted again"
)
"""What `ModelConfig.flops_per_token` counts, for whoever reads a figure made with it."""


@dataclass
class _Counts:
    """Sums over optimizer steps."""

    steps: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0
    processed: int = 0
    trained: int = 0
    flops: float = 0.0

    def add(self, other: "_Counts") -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


class Meters:
    """Counts tokens, operations and seconds of a training run, over all its restarts.

    Training time is what passes between `start` and a reading, less the phases (evaluation, checkpoint), so nothing
    that the loop does in between goes unnoticed. A device works behind the program's back; a reading waits for it, and
    between readings nothing does. The program's clock must be monotonic; the wall clock serves only to tell how long
    the run was down between two processes, and is never believed where it runs backwards.

    Args:
        flops_per_token: operations of one trained token by sequence length (`ModelConfig.flops_per_token`).
        device: where the model computes.
        num_devices: devices that share the tokens counted here.
        peaks: operations per second of one device, by the name of the figure: "datasheet", "measured".
        no_peak: why "datasheet" is not among them; stands where the utilisation would.
        warmup_steps: steps of this process that count for no speed.
        clock: seconds, monotonic.
        wall_clock: seconds since the epoch.
        synchronize: waits until the device has done what it was given; by default that of `device`.
    """

    def __init__(
        self,
        flops_per_token: Callable[[int], float],
        device: torch.device,
        num_devices: int = 1,
        peaks: Mapping[str, float] | None = None,
        no_peak: str = "",
        warmup_steps: int = WARMUP_STEPS,
        clock: Callable[[], float] = time.perf_counter,
        wall_clock: Callable[[], float] = time.time,
        synchronize: Callable[[], None] | None = None,
    ) -> None:
        self.flops_per_token, self.device, self.num_devices = flops_per_token, device, num_devices
        self.peaks, self.no_peak, self.warmup_steps = dict(peaks or {}), no_peak, warmup_steps
        self.clock, self.wall_clock = clock, wall_clock
        self.synchronize = synchronize or (lambda: wait_for(device))
        self.total = _Counts()
        """Since the run began; steps that a restart had to repeat count once."""
        self.steady = _Counts()
        """Of those, the steps behind each process's warm-up."""
        self.phases = {"evaluation": 0.0, "checkpoint": 0.0}
        """Seconds of what is not training."""
        self.first_started: float | None = None
        """When the run first began, by the wall clock."""
        self._recent = _Counts()
        self._pending = _Counts()
        self._trained: int | Tensor = 0
        self._steps_here = 0
        self._elapsed_before = 0.0
        self._began = self._mark = clock()
        self._in_phase = False

    def start(self, first_started: float | None = None) -> None:
        """Training begins or goes on now.

        Args:
            first_started: when an earlier process began this run, by the wall clock; a state that was loaded knows it
                too, if a checkpoint was ever written.
        """
        now = self.wall_clock()
        self.first_started = min((t for t in (first_started, self.first_started) if t is not None), default=now)
        self._elapsed_before = max(self._elapsed_before, now - self.first_started)  # a clock put back is not believed
        self._began = self._mark = self.clock()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The loop waits for its next batch. A device may still be busy meanwhile: this is an upper bound."""
        began = self.clock()
        try:
            yield
        finally:
            self._pending.wait_seconds += max(0.0, self.clock() - began)

    @contextlib.contextmanager
    def phase(self, name: Literal["evaluation", "checkpoint"]) -> Iterator[None]:
        """What happens inside is no training and is counted by itself."""
        assert not self._in_phase, "phases do not nest"
        self._close()
        self._in_phase = True
        try:
            yield
        finally:
            self._in_phase = False
            self.synchronize()
            self.phases[name] += self._lap()

    def step(self, rows: int, length: int, trained: int | Tensor) -> None:
        """An optimizer step was given to the device.

        Args:
            rows: of the batch of all processes.
            length: tokens of a row, padding included.
            trained: targets that counted, of all processes; a tensor is not read before the next reading.
        """
        pending = self._pending
        pending.steps += 1
        pending.processed += rows * length
        pending.flops += rows * length * self.flops_per_token(length)
        self._trained = self._trained + trained
        self._steps_here += 1
        if self._steps_here == self.warmup_steps:
            self._close()

    def read(self) -> dict[str, Any]:
        """Figures of the run so far, for a line of the log.

        tokens and seconds are those of all steps; speeds leave out each process's warm-up (and are those of the
        warm-up while there is nothing else). tokens_per_second counts trained tokens, recent_ those since the last
        reading; processed_ also counts padding and what is masked, as the utilisation does.
        """
        self._close()
        counts = self.steady if self.steady.steps else self.total
        recent, self._recent = self._recent, _Counts()
        figures: dict[str, Any] = {
            "tokens": self.total.trained,
            "processed_tokens": self.total.processed,
            "seconds": round(self.total.seconds, 3),
            "tokens_per_second": _rate(counts.trained, counts.seconds),
            "recent_tokens_per_second": _rate(recent.trained, recent.seconds),
            "processed_tokens_per_second": _rate(counts.processed, counts.seconds),
            "step_seconds": round(recent.seconds / max(recent.steps, 1), 5),
            "flops_per_second": _rate(counts.flops, counts.seconds),
            **self._utilisation(counts),
            "data_wait_share": _share(counts.wait_seconds, counts.seconds),
            "evaluation_seconds": round(self.phases["evaluation"], 3),
            "checkpoint_seconds": round(self.phases["checkpoint"], 3),
            "goodput": self.goodput(),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        if self.device.type == "cuda":
            figures["peak_device_memory_bytes"] = torch.cuda.max_memory_allocated(self.device)
        return figures

    def summary(self) -> dict[str, Any]:
        """`read`, with what a reader must know to judge the figures."""
        warm = self.total.steps - self.steady.steps
        figures = self.read()
        del figures["recent_tokens_per_second"], figures["step_seconds"]
        return figures | {
            "warmup_steps_not_in_speed": warm if self.steady.steps else 0,
            "warmup_seconds": round(self.total.seconds - self.steady.seconds, 3),
            "flops": self.total.flops,
            "flops_formula": FLOPS_FORMULA,
            "peak_flops_per_second": self.peaks,
            **({} if "datasheet" in self.peaks else {"no_mfu": self.no_peak or "no peak was given"}),
        }

    def goodput(self) -> float:
        """Share of the time since the run first began that was spent on steps which count.

        Not counted: steps that were lost and computed again, waits for data, evaluations, checkpoints, start-up, and
        the time between processes.
        """
        productive = self.total.seconds - self.total.wait_seconds
        return _share(productive, max(self.elapsed_seconds(), self.total.seconds + sum(self.phases.values())))

    def elapsed_seconds(self) -> float:
        """Since the run first began, also while no process ran."""
        return self._elapsed_before + max(0.0, self.clock() - self._began)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the meters."""
        if not self._in_phase:
            self._close()
        return {
            "total": asdict(self.total),
            "steady": asdict(self.steady),
            "phases": dict(self.phases),
            "first_started": self.first_started,
            "elapsed_seconds": self.elapsed_seconds(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of a checkpoint; `start` comes after it. What was counted since then is forgotten."""
        self.total, self.steady = _Counts(**state["total"]), _Counts(**state["steady"])
        self.phases = dict(state["phases"])
        self.first_started, self._elapsed_before = state["first_started"], state["elapsed_seconds"]
        self._recent, self._pending, self._trained = _Counts(), _Counts(), 0

    def _utilisation(self, counts: _Counts) -> dict[str, float]:
        speed = counts.flops / max(counts.seconds, 1e-9) / self.num_devices
        names = {"datasheet": "mfu"}
        return {names.get(name, f"mfu_{name}"): round(speed / peak, 4) for name, peak in self.peaks.items()}

    def _close(self) -> None:
        """Wait for the device and book what has passed since the last time."""
        self.synchronize()
        self._pending.seconds = self._lap()
        self._pending.trained = int(self._trained)
        self.total.add(self._pending)
        self._recent.add(self._pending)
        if self._steps_here > self.warmup_steps:
            self.steady.add(self._pending)
        self._pending, self._trained = _Counts(), 0

    def _lap(self) -> float:
        now = self.clock()
        passed, self._mark = max(0.0, now - self._mark), now
        return passed


def meters_of(model: Transformer, world: World, precision: str) -> Meters:
    """Meters of a training with the peaks of its device: measured now (a tenth of a second), and the datasheet's."""
    name = device_name(world.device)
    peaks = {"measured": measured_flops(world.device, precision, seconds=0.1)}
    stated = datasheet_flops(name, precision)
    if stated is not None:
        peaks["datasheet"] = stated
    why = f"no datasheet peak is known for {name!r} in {precision}"
    return Meters(model.config.flops_per_token, world.device, world.size, peaks, why)


def first_start(log: Path | None) -> float | None:
    """When the first process of a run began, by the first line of its metrics.jsonl; None if that cannot be told."""
    if log is None:
        return None
    try:
        with log.open(encoding="utf-8") as lines:
            when = json.loads(next(lines))["time"]
    except (OSError, ValueError, StopIteration, KeyError, TypeError):
        return None
    return when if isinstance(when, int | float) and not isinstance(when, bool) else None


def _rate(amount: float, seconds: float) -> int:
    return round(amount / seconds) if seconds > 0 else 0


def _share(part: float, whole: float) -> float:
    return round(min(1.0, max(0.0, part) / whole), 5) if whole > 0 else 0.0
