"""Rules that carry what was measured on small runs to large ones, each with its source."""

import math
from dataclasses import dataclass

from lalia.training.config import OptimizerConfig
from lalia.training.optimizers import learning_rates

SMALL_BATCH_TOKENS, SMALL_DATA_TOKENS = 2048, 3.1e6
"""Best batch of the demo, and the tokens it trains on (LOG.md, 2026-11-23 and 24)."""
LARGE_BATCH_TOKENS, LARGE_DATA_TOKENS = 2**19, 1.32e9
"""Batch and tokens of nanochat's reference model, depth 12 (LEADERBOARD of karpathy/nanochat)."""
BATCH_EXPONENT = 0.383
"""Batch ~ tokens^0.383 keeps the loss per token (Bergsma et al. 2025, arXiv 2505.13738)."""
LARGE_RATES = {
    "matrix_learning_rate": 0.02,
    "adamw_matrix_learning_rate": 6e-4 * 768 / 256,
    "embedding_learning_rate": 0.3 * (768 / 256) ** 0.5,
    "head_learning_rate": 0.008,
}
"""Rates at that batch, for the width that `lalia.training.optimizers` starts from: nanochat's at width 768, and for
AdamW in Muon's place GPT-3's of that width (Brown et al. 2020). Norm weights, which nanochat has none of, keep ours."""
LARGE_WEIGHT_DECAY = 0.28
"""nanochat's at its reference batch and tokens."""
FEW_EPOCHS = 4
"""Up to 4 epochs repeated data is nearly as good as fresh (Muennighoff et al. 2023)."""


def batch_tokens(tokens: float, accelerator: bool) -> tuple[int, str]:
    """Tokens of an optimizer step, a power of two, for training on `tokens`, and the reason.

    On a CPU a larger batch is no faster, so the best of the small runs counts; an accelerator needs large products, so
    it gets the largest batch that costs no quality.
    """
    at, data = (LARGE_BATCH_TOKENS, LARGE_DATA_TOKENS) if accelerator else (SMALL_BATCH_TOKENS, SMALL_DATA_TOKENS)
    exact = at * (tokens / data) ** BATCH_EXPONENT
    batch = max(SMALL_BATCH_TOKENS, 2 ** round(math.log2(exact)))
    if batch == SMALL_BATCH_TOKENS:
        return batch, "small batches learn most per token in short runs (LOG.md)"
    return batch, (
        f"{at:,} at {data / 1e6:,.0f} M tokens ({'nanochat' if accelerator else 'LOG.md'}) and tokens^{BATCH_EXPONENT} "
        "from there (Bergsma et al. 2025)"
    )


@dataclass(frozen=True)
class Scaled:
    """A value of the optimizer settings, and why it is that."""

    value: float
    reason: str


def scale_optimizer(
    asked: OptimizerConfig, batch: int, width: int, tokens: float, accelerator: bool
) -> tuple[OptimizerConfig, dict[str, Scaled]]:
    """Learning rates and weight decay for a batch and an amount of tokens; what the width changes the optimizer does.

    What the recipe sets to other than the default is kept.

    Returns:
        the whole settings, and the values that rules decide with their reasons.
    """
    at_batch = LARGE_BATCH_TOKENS if accelerator else SMALL_BATCH_TOKENS
    origin = "nanochat" if accelerator else "swept on the demo, LOG.md"
    grown = (batch / at_batch) ** 0.5
    by_batch = f", x {grown:.2f} = sqrt(batch / {at_batch:,} tokens) (Malladi et al. 2022)" if grown != 1 else ""
    matrix = "matrix_learning_rate" if asked.kind == "muon" else "adamw_matrix_learning_rate"
    # That Muon's rate grows with the batch as Adam's does is an assumption, which nanochat makes too.
    rules = {
        matrix: (grown, f"{'Muon (Jordan et al. 2024)' if asked.kind == 'muon' else 'AdamW'}{by_batch}"),
        "embedding_learning_rate": (grown, f"AdamW ({origin}){by_batch}"),
        "head_learning_rate": (grown, f"AdamW ({origin}){by_batch}"),
        "scalar_learning_rate": (1.0, "AdamW (swept on the demo, LOG.md)"),
    }
    scaled: dict[str, Scaled] = {}
    for name, (factor, reason) in rules.items():
        if _is_set(asked, name):
            scaled[name] = Scaled(getattr(asked, name), "set in the recipe")
        else:
            base = LARGE_RATES.get(name, getattr(asked, name)) if accelerator else getattr(asked, name)
            scaled[name] = Scaled(float(f"{base * factor:.4g}"), reason)
    scaled["weight_decay"] = _weight_decay(asked, batch, tokens, accelerator)
    settings = asked.model_copy(update={name: one.value for name, one in scaled.items()})
    for role, rate in learning_rates(settings, width).items():
        name = matrix if role == "matrix" else f"{role}_learning_rate"
        if not math.isclose(rate, scaled[name].value):
            scaled[name] = Scaled(scaled[name].value, f"{scaled[name].reason}; at this width {rate:.3g}")
    return settings, scaled


def _weight_decay(asked: OptimizerConfig, batch: int, tokens: float, accelerator: bool) -> Scaled:
    """Keeps batch / (learning rate * decay * tokens), the memory of the weights in epochs (Wang and Aitchison 2024)."""
    if _is_set(asked, "weight_decay"):
        return Scaled(asked.weight_decay, "set in the recipe")
    if not accelerator or tokens < LARGE_DATA_TOKENS / 10:
        return Scaled(asked.weight_decay, "short runs forget nothing they should (not swept)")
    decay = LARGE_WEIGHT_DECAY * (batch / LARGE_BATCH_TOKENS) ** 0.5 * LARGE_DATA_TOKENS / tokens
    decay = float(f"{min(decay, 0.4):.3g}")  # 0.4 was the largest best value of nanochat's sweep
    return Scaled(decay, "0.28 x sqrt(batch / 2^19) x 1.32e9 / tokens (nanochat; Wang and Aitchison 2024)")


def _is_set(settings: OptimizerConfig, name: str) -> bool:
    """By value: the recipe that a run folder keeps names every setting."""
    return getattr(settings, name) != type(settings).model_fields[name].default


def depth_of(width: int) -> int:
    """Layers of a model of this width: a layer per 56 up to 1,024, then with the square root of the width.

    Small ones were measured (LOG.md; nanochat has one per 64). Beyond, published models grow wider faster than deeper,
    28 layers at 2,048, 36 at 4,096 (Qwen3 technical report, 2025), as Levine et al. 2020 expect.
    """
    return max(2, round(width / 56)) if width <= 1024 else round(18 * (width / 1024) ** 0.5)
