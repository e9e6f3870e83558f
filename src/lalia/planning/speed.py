"""Seconds of an optimizer step: measured on the device at hand, or estimated for one that is not."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lalia.devices import peak_memory_bytes, reset_peak_memory
from lalia.errors import UserError
from lalia.model.config import ModelConfig
from lalia.model.shapes import ArchitectureConfig
from lalia.model.transformer import Transformer
from lalia.planning.layout import NODE, Placement
from lalia.planning.memory import parameters
from lalia.planning.sizes import candidates
from lalia.training.compilation import compile_layers
from lalia.training.config import TrainingConfig
from lalia.training.fp8 import convert_to_fp8
from lalia.training.hardware import DTYPES, Datasheet, device_name, find_datasheet, known_devices, synchronize
from lalia.training.linear_cross_entropy import linear_cross_entropy
from lalia.training.optimizers import make_optimizers
from lalia.training.trainer import initialize

USUAL_MFU = (0.30, 0.40, 0.50)
"""Low, middle and high share of the data sheet's peak that pretraining reaches in bfloat16 on one node of good ones:
torchtitan 0.33 to 0.39 (Llama 3.1 8B), OLMo 2 0.38, levanter 0.35 to 0.54, nanochat 0.40 to 0.50 (reference runs)."""

TIME_ACCURACY = 0.2
"""Relative error of the time that a measured speed should keep to: the target of benchmarks/planner_accuracy.py."""

RECOMPUTED = {"none": 1.0, "selective": 1.2, "full": 4 / 3}
"""Work relative to no checkpointing: full repeats the forward pass, a third of 6 N (Chen et al. 2016); selective the
feed-forward networks, about two thirds of it."""

NODE_LINK, NETWORK_LINK, LOOPBACK = 25e9, 50e9, 1e9
"""Bytes per second and device, one direction: PCIe 4.0 x16 as it is reached; 400 Gbit/s per device between nodes (DGX
H100); gloo between processes of one machine. Orders of magnitude, none of them measured here."""

HIDDEN_SHARE = 0.6
"""Share of the work behind which communication can hide: the backward pass, two thirds of it, less its beginning."""


@dataclass(frozen=True)
class Speed:
    """Seconds of one optimizer step of all devices together: expected, and between what it should be.

    `peak_memory_bytes` is the process's by the time this very step had been measured, None where it was not.
    """

    seconds_per_step: float
    low: float
    high: float
    how: str
    peak_memory_bytes: int | None = None


@dataclass(frozen=True)
class StepTimer:
    """Finds the seconds of a step: on this machine's device, or from the data sheet of one that is not here.

    `fits` says whether one device holds the training of (shape, rows, length, precision) all alone.
    """

    config: TrainingConfig
    architecture: ArchitectureConfig
    vocab_size: int
    device: Literal["cpu", "cuda"]
    num_devices: int
    sheet: Datasheet | None
    fits: Callable[[ModelConfig, int, int, str], bool]

    def speed(
        self,
        shape: ModelConfig,
        placement: Placement,
        mean_rows: float,
        length: int,
        precision: str,
        steps: int,
        compiled: bool | None = None,
    ) -> Speed:
        """Of a step of `mean_rows` rows (the mean, where batches differ), measured as the median of `steps`."""
        layout = placement.layout
        if self.sheet is not None:
            return estimated_step(shape, placement, mean_rows, length, precision, self.sheet, self.num_devices)
        probe = shape
        if layout.shard * layout.tensor * layout.context > 1:  # what no device holds alone is not measured on one
            probe = self._measurable(shape, placement.micro_rows, length, precision)
        parts = mean_rows / placement.data_groups() / placement.micro_rows
        config = self.config if compiled is None else self.config.model_copy(update={"compile": compiled})
        resettable = reset_peak_memory()
        seconds = measure_step(probe, placement.micro_rows, length, precision, steps, parts, self.device, config)
        seconds *= relative_cost(shape, probe, length) * RECOMPUTED[placement.checkpointing]
        seconds /= layout.tensor * layout.context
        seconds = with_communication(seconds, shape, placement, mean_rows, length, precision, *self._links())
        how = "measured here" if probe is shape else f"measured here at width {probe.hidden_size}"
        whole = probe is shape and placement.checkpointing == "none" and config.average_decay == 0
        alone = self.device == "cpu" and self.num_devices == 1
        peak = peak_memory_bytes() if resettable and whole and alone else None
        return Speed(seconds, seconds * (1 - TIME_ACCURACY), seconds * (1 + TIME_ACCURACY), how, peak)

    def _measurable(self, shape: ModelConfig, rows: int, length: int, precision: str) -> ModelConfig:
        """The widest model up to this one that a single device holds."""
        architecture = self.architecture.model_copy(update={"hidden_size": None, "num_hidden_layers": None})
        sizes = candidates(architecture, self.vocab_size, length)
        smaller = [one for one in sizes if one.hidden_size < shape.hidden_size]
        for one in [shape, *reversed(smaller)]:
            if self.fits(one, rows, length, precision):
                return one
        raise UserError(
            f"no width from {sizes[0].hidden_size} to {shape.hidden_size} fits one device, to measure its speed, with "
            f"micro-batches of {rows} rows of {length}; set a smaller pretrain.micro_batch_size or "
            "pretrain.sequence_length"
        )

    def _links(self) -> tuple[float, float]:
        if self.device == "cpu":
            return LOOPBACK, LOOPBACK
        return links(find_datasheet(device_name(torch.device(self.device))), self.num_devices)


def measure_step(
    shape: ModelConfig,
    rows: int,
    length: int,
    precision: str,
    steps: int,
    parts: float = 1,
    device: str = "cpu",
    config: TrainingConfig | None = None,
) -> float:
    """Seconds of one optimizer step on random tokens, the median of `steps` after one that warms up.

    The step is `parts` micro-batches of `rows` rows each (in the mean, where batches differ) and one update; at most
    two are run, and the time of one (forward and backward) counts `parts` times, that of the update once. `config` says
    which optimizer, and whether the layers are compiled and multiply in 8-bit floating point.
    """
    config = config or TrainingConfig()
    where = torch.device(device)
    model = Transformer(shape)
    initialize(model, 0)
    model.to(where)
    model.compute_dtype = DTYPES[precision]
    model.set_dropout(config.dropout)
    if config.fp8:
        convert_to_fp8(model)
    if config.compile:
        compile_layers(model)
    optimizers = make_optimizers(model, config.optimizer)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, shape.vocab_size, (rows, length + 1), generator=generator).to(where)
    targets = tokens[:, 1:].contiguous()
    if config.compile:  # rows of several documents, with their mask, are a compilation of their own
        positions = torch.arange(length, device=where).repeat(rows, 1)
        documents = (positions >= length // 2).int()
        loss = model(tokens[:, :-1], positions=positions, document_ids=documents).float().sum()
        loss.backward()
        model.zero_grad(set_to_none=True)
    forward_backward, update = [], []
    for step in range(steps + 1):
        for _ in range(1 if parts <= 1 else 2):
            began = time.perf_counter()
            loss, _, count = linear_cross_entropy(
                model(tokens[:, :-1]), model.head_weight, targets, shape.logit_softcap
            )
            (loss / count).backward()
            synchronize(where)
            if step:
                forward_backward.append(time.perf_counter() - began)
        began = time.perf_counter()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        torch.nn.utils.get_total_norm(gradients)
        for gradient in gradients:
            gradient.mul_(1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        synchronize(where)
        if step:
            update.append(time.perf_counter() - began)
    return parts * statistics.median(forward_backward) + statistics.median(update)


def bfloat16_speedup() -> float:
    """How many times as fast matrix products are in bfloat16 as in float32 on this CPU."""
    times = {}
    for name in ("float32", "bfloat16"):
        a, b = torch.randn(2048, 256, dtype=DTYPES[name]), torch.randn(768, 256, dtype=DTYPES[name])
        times[name] = _fastest(lambda a=a, b=b: a @ b.t(), repeats=12, seconds=0.5)
    return times["float32"] / times["bfloat16"]


def _fastest(work: Callable[[], Any], repeats: int, seconds: float) -> float:
    times: list[float] = []
    while len(times) < repeats and (len(times) < 2 or sum(times) < seconds):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def relative_cost(shape: ModelConfig, probe: ModelConfig, length: int) -> float:
    """Time per token of a shape relative to the probe's: its FLOPs, and a share that grows with the activations."""

    def cost(config: ModelConfig) -> float:
        feed = config.num_experts_per_token * (config.expert_size or 0) or config.intermediate_size
        volume = config.num_hidden_layers * (14 * config.hidden_size + 6 * feed)
        return config.flops_per_token(length) + 600.0 * volume

    return cost(shape) / cost(probe)


def require_datasheet(name: str) -> Datasheet:
    """The data sheet of a device that is not here.

    Raises:
        UserError: if the device is unknown, with those that are known.
    """
    sheet = find_datasheet(name)
    if sheet is None:
        raise UserError(
            f"plan.device = {name!r} is in no table of Lalia's (exact names count); known are "
            f"{', '.join(known_devices())}; on the device itself leave plan.device out and it is measured"
        )
    return sheet


def estimated_step(
    shape: ModelConfig,
    placement: Placement,
    mean_rows: float,
    length: int,
    precision: str,
    sheet: Datasheet,
    devices: int,
) -> Speed:
    """Seconds of a step on devices that are not here: the data sheet's peak times the usual MFU, and communication.

    Raises:
        UserError: if the data sheet has no peak in that precision.
    """
    peak = sheet.flops(precision)
    if peak is None:
        raise UserError(
            f"there is no peak in {precision} for {sheet.name} to estimate from; set pretrain.precision to auto or "
            "bfloat16, or plan on the device itself, where it is measured"
        )
    flops = shape.flops_per_token(length) * mean_rows * length * RECOMPUTED[placement.checkpointing]
    near_and_far = links(sheet, devices)
    slow, middle, fast = (
        with_communication(
            flops / (peak * devices * mfu), shape, placement, mean_rows, length, precision, *near_and_far
        )
        for mfu in USUAL_MFU
    )
    how = f"{sheet.name}'s data sheet, {peak / 1e12:,.0f} TFLOP/s, at {USUAL_MFU[1]:.0%} (not measured)"
    return Speed(middle, fast, slow, how)


def links(sheet: Datasheet | None, devices: int) -> tuple[float, float]:
    """Bytes per second and device, one direction: within a node, and among all the devices."""
    near = (sheet.link_bandwidth if sheet else None) or NODE_LINK
    return near, near if devices <= NODE else min(near, NETWORK_LINK)


def with_communication(
    seconds: float,
    shape: ModelConfig,
    placement: Placement,
    mean_rows: float,
    length: int,
    precision: str,
    near: float,
    far: float,
) -> float:
    """A step's computation and what of its communication cannot hide behind it.

    Whoever has other tokens adds up the gradients, in a ring 2 (n - 1) / n times the bytes (Patarasuk and Yuan 2009);
    divided weights are gathered twice and their gradients scattered, half as much again, for every micro-batch
    (Rajbhandari et al. 2020). That overlaps with the backward pass. What nothing hides: layers divided among neighbours
    sum activations four times each (Shoeybi et al. 2019), and of divided rows keys and values are gathered, and their
    gradients scattered (Llama 3, 2024).

    Args:
        seconds: of the computation.
        precision: of the activations.
        near, far: bytes per second of a device to neighbours in its node, and among all.
    """
    layout = placement.layout
    copies = placement.data_groups() * layout.context
    divided = layout.shard > 1 or (layout.context > 1 and layout.tensor * layout.expert > 1)
    micro_batches = max(1.0, mean_rows / placement.data_groups() / placement.micro_rows)
    times = 3.0 * micro_batches if divided else 2.0
    overlapped = times * 4.0 * parameters(shape) / layout.tensor * (copies - 1) / copies / far
    sums = 4 * 2 * (layout.tensor - 1) / layout.tensor * shape.hidden_size
    gathers = 2 * 2 * (layout.context - 1) * shape.key_value_size / layout.tensor
    activations = mean_rows * length / copies * shape.num_hidden_layers * (4 if precision == "float32" else 2)
    exposed = activations * (sums / near + gathers / far)
    return seconds + max(0.0, overlapped - HIDDEN_SHARE * seconds) + exposed
