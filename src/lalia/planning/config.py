"""Settings of the plan: devices that are not here, what they cost, and which scaling law to go by."""

from pydantic import Field

from lalia.settings import Settings


class PlanConfig(Settings):
    """What the planner cannot see for itself; nothing here changes how a model is trained."""

    devices: int | None = Field(default=None, gt=0)
    """Devices to plan for; None means as many as processes were started (WORLD_SIZE)."""
    device: str | None = Field(default=None, min_length=1)
    """Name of a device that is not here, such as "NVIDIA H100"; None means that this machine is measured."""
    price_per_hour: float | None = Field(default=None, gt=0)
    """Dollars that one device costs in an hour."""
    watts: float | None = Field(default=None, gt=0)
    """Power that one device draws while it trains."""
    law: str | None = Field(default=None, min_length=1)
    """Law file that `lalia plan --fit` wrote; None means the one fitted to Shakespeare."""
