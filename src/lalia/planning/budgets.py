"""What a budget in seconds, dollars, FLOPs or tokens buys."""

import math

from lalia.errors import UserError
from lalia.training.config import Amount

_ROUNDED_UP = {  # so that what is advised is enough
    "seconds": lambda value: f"{math.ceil(value * 1.001)} seconds",
    "FLOPs": lambda value: f"{value * 1.01:.3g} FLOPs",
    "tokens": lambda value: f"{math.ceil(value)} tokens",
    "dollars": lambda value: f"{math.ceil(value * 100) / 100:.2f} dollars",
}


def steps_bought(
    budget: Amount,
    tokens_per_step: float,
    flops_per_token: float,
    seconds_per_step: float,
    dollars_per_hour: float | None,
) -> float:
    """Optimizer steps that a budget buys, as a fraction.

    `dollars_per_hour` is what all devices together cost; only a budget in dollars needs it.

    Raises:
        UserError: if the budget is in dollars and there is no price.
    """
    if budget.unit == "tokens":
        return budget.value / tokens_per_step
    if budget.unit == "FLOPs":
        return budget.value / (flops_per_token * tokens_per_step)
    if budget.unit == "seconds":
        return budget.value / seconds_per_step
    if dollars_per_hour is None:
        raise UserError(
            f"pretrain.budget = {budget} needs a price: set plan.price_per_hour to what one device costs in an hour"
        )
    return budget.value / dollars_per_hour * 3600.0 / seconds_per_step


def enough(budget: Amount, share: float) -> str:
    """The budget divided by `share`, as the recipe would say it, rounded up."""
    return _ROUNDED_UP[budget.unit](budget.value / share)
