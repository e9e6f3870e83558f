"""Settings of the finetune stage."""

from typing import Literal, Self

from pydantic import Field, model_validator

from lalia.settings import Seed
from lalia.training.config import LoopConfig, OptimizerConfig, TimeBudget


class FinetuneOptimizerConfig(OptimizerConfig):
    """Pretraining's optimizer settings at lower learning rates, over a schedule that decays nearly all the way."""

    matrix_learning_rate: float = Field(default=0.004, gt=0)
    adamw_matrix_learning_rate: float = Field(default=0.0006, gt=0)
    embedding_learning_rate: float = Field(default=0.02, gt=0)
    head_learning_rate: float = Field(default=0.0015, gt=0)
    scalar_learning_rate: float = Field(default=0.0015, gt=0)
    warmup_fraction: float = Field(default=0.02, ge=0, lt=1)
    decay_fraction: float = Field(default=0.9, ge=0, le=1)


class FinetuneConfig(LoopConfig):
    """Supervised finetuning of the base model into one that talks."""

    enabled: bool = True
    source: Literal["auto", "dialogue", "continuation"] = "auto"
    """Where conversations come from: the speeches of plays, or passages of any text that the assistant continues.
    "auto" takes dialogue if the documents have speeches."""
    name: str = Field(default="Lalia", min_length=1, max_length=40)
    """What the assistant calls itself."""
    max_turns: int = Field(default=8, ge=2)
    """Longest conversation in turns."""
    identity_share: float = Field(default=0.3, ge=0, lt=1)
    """Share of conversations about the assistant itself and its sources."""
    pretraining_share: float = Field(default=0.25, ge=0, lt=1)
    """Share of steps on pretraining text, so that the model does not forget it."""
    budget: TimeBudget | None = "90 seconds"
    steps: int | None = Field(default=None, gt=0)
    optimizer: FinetuneOptimizerConfig = FinetuneOptimizerConfig()
    evaluations: int = Field(default=2, ge=0)
    seed: Seed = 2

    @model_validator(mode="after")
    def _has_an_end(self) -> Self:
        if self.enabled and self.budget is None and self.steps is None:
            raise ValueError("needs a budget (finetune.budget = '1 minute') or finetune.steps")
        return self
