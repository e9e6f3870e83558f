"""Settings of a training stage."""

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from lalia.errors import UserError
from lalia.settings import Seed, Settings
from lalia.training.parallel.layout import ParallelConfig
from lalia.training.schedule import Shape, check_stages

TIMES = {"s": 1, "sec": 1, "second": 1, "m": 60, "min": 60, "minute": 60, "h": 3600, "hour": 3600, "day": 86400}
"""Seconds of each unit that a budget may name, also in the plural."""
MULTIPLES = {"": 1.0, "k": 1e3, "thousand": 1e3, "m": 1e6, "million": 1e6, "b": 1e9, "billion": 1e9, "t": 1e12}
"""What may stand before tokens and dollars."""
NUMBER = r"((?:[0-9]*\.)?[0-9]+(?:[eE][+-]?[0-9]+)?)"
DEFAULT_BUDGET = "6 minutes"


class Amount(NamedTuple):
    """A budget: how much of what."""

    value: float
    unit: Literal["seconds", "FLOPs", "tokens", "dollars"]

    def __str__(self) -> str:
        if self.unit == "seconds":
            return f"{self.value:g} s"
        if self.unit == "FLOPs":
            return f"{self.value:.3g} FLOPs"
        return f"{self.value:,.0f} tokens" if self.unit == "tokens" else f"{self.value:,.2f} dollars"


def parse_budget(text: str) -> Amount:
    """What a budget such as "6 minutes", "1e18 FLOPs", "300M tokens" or "5 dollars" (or "$5") allows.

    Raises:
        UserError: if it is not a positive number with such a unit.
    """
    match = re.fullmatch(rf"\s*(?:\$\s*{NUMBER}|{NUMBER}\s*([a-zA-Z]+)(?:\s*([a-zA-Z]+))?)\s*", text)
    amount: Amount | None = None
    if match and match[1]:
        amount = Amount(float(match[1]), "dollars")
    elif match:
        amount = _amount(match[2], match[3], match[4])
    if amount is None or not 0 < amount.value < math.inf:
        raise UserError(
            f"budget {text!r} is not a time, nor an amount of FLOPs, tokens or dollars; write for example "
            "'6 minutes', '90 seconds', '1e18 FLOPs', '300M tokens' or '5 dollars'"
        )
    return amount


def _amount(number: str, first: str, second: str | None) -> Amount | None:
    singular = first.lower().removesuffix("s") or first.lower()
    if second is None:
        if seconds := TIMES.get(first.lower()) or TIMES.get(singular):
            # "1e3 s" is more often a slip than a time.
            return None if "e" in number.lower() else Amount(float(number) * seconds, "seconds")
        first, second = "", first
    unit = {"flop": "FLOPs", "token": "tokens", "dollar": "dollars", "usd": "dollars"}.get(
        second.lower().removesuffix("s")
    )
    multiple = MULTIPLES.get(first.lower())
    if unit is None or multiple is None:
        return None
    return Amount(float(number) * multiple, unit)  # pyright: ignore[reportArgumentType] (one of the four)


def parse_time(text: str) -> float:
    """Seconds of a budget that is a time.

    Raises:
        UserError: if it is none, or an amount of something else.
    """
    amount = parse_budget(text)
    if amount.unit != "seconds":
        raise UserError(f"budget {text!r} is not a time, and here it has to be one, such as '90 seconds'")
    return amount.value


def _check_budget(text: str) -> str:
    parse_budget(text)
    return text


def _check_time(text: str) -> str:
    parse_time(text)
    return text


Budget = Annotated[str, AfterValidator(_check_budget)]
"""A training time such as "6 minutes", or an amount of FLOPs, tokens or dollars."""
TimeBudget = Annotated[str, AfterValidator(_check_time)]
"""A training time, such as "6 minutes"."""


class OptimizerConfig(Settings):
    """Learning rates by role, and the schedule they share."""

    kind: Literal["muon", "adamw", "adamw8bit"] = "muon"
    """What trains the matrices inside the layers: Muon, or AdamW like everything else, its moments in 8 bits if asked
    (needs torchao, the extra `lowbit`)."""
    matrix_learning_rate: float = Field(default=0.02, gt=0)
    """Muon, for the matrices inside the layers."""
    adamw_matrix_learning_rate: float = Field(default=0.003, gt=0)
    """AdamW in Muon's place, at width 256; for other widths times 256 / width."""
    embedding_learning_rate: float = Field(default=0.1, gt=0)
    """AdamW, for the embedding, at width 256; for other widths times (256 / width)^0.5."""
    head_learning_rate: float = Field(default=0.006, gt=0)
    """AdamW, for the output head; a head tied to the embedding takes this rate."""
    scalar_learning_rate: float = Field(default=0.006, gt=0)
    """AdamW, for the norm weights."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled decay of the matrices, multiplied by the learning rate; under AdamW as it is at width 256, else times
    width / 256."""
    schedule: Shape = "stable"
    """Shape of the learning rate after the warm-up: stable (then linear decay), cosine or linear."""
    warmup_fraction: float = Field(default=0.01, ge=0, lt=1)
    decay_fraction: float = Field(default=0.6, ge=0, le=1)
    """Share of the steps, at the end, over which the learning rate falls linearly."""
    final_learning_rate_fraction: float = Field(default=0.0, ge=0, le=1)
    gradient_clip: float = Field(default=1.0, gt=0)
    """Largest global norm of the gradient of the mean loss."""


class LoopConfig(Settings):
    """What the Trainer needs besides a model, batches and learning rates."""

    micro_batch_size: int | None = Field(default=None, gt=0)
    """Sequences per forward pass and device; None means the whole batch."""
    z_loss: float = Field(default=0.0, ge=0)
    """Coefficient of the mean squared log-partition of the output (PaLM, Chowdhery et al. 2022); 1e-4 is usual."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the values set to 0 in the embedding and in what attention and feed-forward networks give."""
    average_decay: float = Field(default=0.0, ge=0, lt=1)
    """Decay of an exponential moving average of the weights, which the run ends with; 0 keeps none."""
    spike_deviations: float = Field(default=6.0, ge=0)
    """Steps whose loss or gradient norm is so many standard deviations above the recent mean are skipped; 0 skips only
    what is not finite."""
    max_skipped: int = Field(default=20, gt=0)
    """Skipped steps in a row after which training goes back to the last checkpoint and passes over their batches; it
    is looked at every so many steps, so that the device is not waited for more often."""
    max_rewinds: int = Field(default=3, ge=0)
    """Times that a run may go back."""
    checkpoint_seconds: float = Field(default=30.0, ge=0)
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept."""
    milestones: int = Field(default=0, ge=0)
    """Checkpoints along the run, evenly spaced, that are kept besides until the stage is finished."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What of a layer is computed again in backward instead of being kept: nothing, what is cheap, or all."""
    compile: bool | None = None
    """Compile the layers with torch.compile: up to a minute at the start, for faster steps. None means as planned when
    pretraining (where it pays, measured), and no elsewhere."""
    fp8: bool = False
    """Multiply in 8-bit floating point in the layers, on GPUs from Hopper on (needs torchao, the extra `lowbit`)."""
    seed: Seed = 1
    """Of the initial weights, the order of the data and dropout."""


RUNTIME_ONLY = {"checkpoint_seconds", "keep_checkpoints", "parallel", "timeout_seconds", "tensorboard"}
"""Settings that do not change what is trained (beyond rounding, and which values dropout draws): changing them
redoes nothing."""


class TrainingConfig(LoopConfig):
    """How long, on what batches and in which precision to train; whatever is None is planned."""

    budget: Budget | None = None
    """Training time such as "6 minutes", or FLOPs, tokens or dollars; the planner turns it into a model size and a
    number of steps. 6 minutes where neither a budget nor steps are given."""
    steps: int | None = Field(default=None, gt=0)
    sequence_length: int | None = Field(default=None, ge=8)
    batch_size: int | None = Field(default=None, gt=0)
    """Sequences per optimizer step."""
    batch_stages: tuple[tuple[float, float], ...] = ()
    """Smaller batches for a part of the run: pairs (share of the steps at which it begins, share of the batch)."""
    sequence_stages: tuple[tuple[float, float], ...] = ()
    """Shorter sequences for a part of the run, as `batch_stages`; rows are cut, so a step's tokens stay the same."""
    parallel: ParallelConfig = ParallelConfig()
    """Layout of the processes that torchrun starts."""
    timeout_seconds: float = Field(default=600.0, gt=0)
    """How long a process waits for the others before it ends with the place where it waited."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluations: int = Field(default=8, ge=0)
    """Evaluations along the run, evenly spaced; one at the end comes on top."""
    evaluation_bytes: int = Field(default=100_000, gt=0)
    """Bytes of held-out text that an evaluation along the run reads (the final one reads all)."""
    deterministic: bool = False
    """Only algorithms that give the same bits every time, also on a GPU."""
    tensorboard: bool = False
    """Write the figures of metrics.jsonl for TensorBoard too, also when finetuning."""

    @field_validator("batch_stages", "sequence_stages")
    @classmethod
    def _ascending(
        cls, stages: tuple[tuple[float, float], ...], info: ValidationInfo
    ) -> tuple[tuple[float, float], ...]:
        check_stages(stages, f"pretrain.{info.field_name}")
        return stages

    @model_validator(mode="before")
    @classmethod
    def _has_a_budget(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "budget" not in values and not values.get("steps"):
            return {**values, "budget": DEFAULT_BUDGET}
        return values
