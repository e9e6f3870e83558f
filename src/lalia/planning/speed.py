"""Seconds of an optimizer step: measured on the device at hand, or estimated for one that is not."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lalia.errors import UserError
from lalia.model.config import ModelConfig
from lalia.model.transformer import Transformer
from lalia.planning.memory import Checkpointing, parameters
from lalia.training.compilation import compile_layers
from lalia.training.config import TrainingConfig
from lalia.training.fp8 import convert_to_fp8
from lalia.training.hardware import DTYPES, Datasheet, find_datasheet, known_devices, synchronize
from lalia.training.linear_cross_entropy import linear_cross_entropy
from lalia.training.optimizers import make_optimizers
from lalia.training.parallel.layout import ParallelConfig
from lalia.training.trainer import initialize

USUAL_MFU = (0.30, 0.40, 0.50)
"""Low, middle and high share of the data sheet's peak that pretraining reaches in bfloat16 on one node of good ones:
torchtitan 0.33 to 0.39 (Llama 3.1 8B), OLMo 2 0.38, levanter 0.35 to 0.54, nanochat 0.40 to 0.50 (reference runs)."""

RECOMPUTED = {"none": 1.0, "selective": 1.05, "full": 4 / 3}
"""Work relative to no checkpointing: full repeats the forward pass, a third of 6 N (Chen et al. 2016);
selective is a guess."""

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
    tokens_per_step: float,
    length: int,
    sheet: Datasheet,
    layout: ParallelConfig,
    devices: int,
    checkpointing: Checkpointing,
) -> Speed:
    """Seconds of a step on devices that are not here: the data sheet's peak times the usual MFU, and communication."""
    flops = shape.flops_per_token(length) * tokens_per_step * RECOMPUTED[checkpointing]
    link = sheet.link_bandwidth or NODE_LINK
    exposed = [
        with_communication(
            flops / (sheet.half_flops * devices * mfu), shape, layout, link if devices <= 8 else NETWORK_LINK
        )
        for mfu in USUAL_MFU
    ]
    slow, middle, fast = exposed
    how = f"{sheet.name}'s data sheet, {sheet.half_flops / 1e12:,.0f} TFLOP/s, at {USUAL_MFU[1]:.0%} (not measured)"
    return Speed(middle, fast, slow, how)


def with_communication(seconds: float, shape: ModelConfig, layout: ParallelConfig, link: float) -> float:
    """A step's computation and what of its communication cannot hide behind it.

    Replicas add up their gradients, in a ring 2 (n - 1) / n times the bytes (Patarasuk and Yuan 2009); shards also
    gather the weights twice (Rajbhandari et al. 2020: half as much again).
    """
    replicas = (layout.replicate or 1) * layout.shard
    if replicas == 1:
        return seconds
    held = 4.0 * parameters(shape) / layout.tensor
    times = 3.0 if layout.shard > 1 else 2.0
    communication = times * held * (replicas - 1) / replicas / link
    return seconds + max(0.0, communication - HIDDEN_SHARE * seconds)
