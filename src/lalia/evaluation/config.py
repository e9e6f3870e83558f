"""Settings of the evaluate stage."""

from pydantic import Field

from lalia.settings import Seed, Settings


class EvaluateConfig(Settings):
    """What is measured on the held-out documents."""

    max_bytes: int | None = Field(default=None, gt=0)
    """Bytes of held-out text to score; None means all of it. The baselines see the same bytes."""
    baselines: bool = True
    samples: int = Field(default=3, ge=0)
    sample_tokens: int = Field(default=120, gt=0)
    seed: Seed = 3
