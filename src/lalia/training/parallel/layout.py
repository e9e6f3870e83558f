"""How many devices there are along each axis; no tensor is needed to say so."""

from pydantic import Field

from lalia.errors import UserError
from lalia.settings import Settings

AXES = ("replicate", "shard", "context", "tensor")
"""Axes of the device mesh, the outermost first: neighbours in the last share a machine's fastest links."""


class ParallelConfig(Settings):
    """How many devices along each axis; their product is the number of processes."""

    replicate: int | None = Field(default=None, ge=1)
    """Copies of the model, each on rows of its own (data parallel); None means what the other axes leave."""
    shard: int = Field(default=1, ge=1)
    """Devices among which weights, gradients and optimizer state of one copy are divided, each on rows of its own."""
    context: int = Field(default=1, ge=1)
    """Devices among which every row's tokens are divided, for long sequences."""
    tensor: int = Field(default=1, ge=1)
    """Devices among which every layer's heads and feed-forward units are divided."""
    expert: int = Field(default=1, ge=1)
    """Devices among which the experts of a mixture are divided: neighbours among those with rows of their own."""


def resolve(config: ParallelConfig, size: int) -> ParallelConfig:
    """The layout with `replicate` filled in.

    Raises:
        UserError: if the axes do not multiply to the number of processes.
    """
    others = config.shard * config.context * config.tensor
    replicate = config.replicate or max(1, size // others)
    if replicate * others != size:
        raise UserError(
            f"the layout replicate {replicate} x shard {config.shard} x context {config.context} x tensor "
            f"{config.tensor} = {replicate * others} does not fit the {size} processes that were started; change "
            f"pretrain.parallel, or start {replicate * others} processes (torchrun --nproc-per-node ...)"
        )
    if (replicate * config.shard) % config.expert:
        raise UserError(
            f"pretrain.parallel.expert = {config.expert} must divide replicate x shard = {replicate * config.shard}"
        )
    if config.expert > 1 and config.tensor > 1:
        raise UserError(
            f"pretrain.parallel.expert = {config.expert} with tensor = {config.tensor} is not supported; set one to 1"
        )
    return config.model_copy(update={"replicate": replicate})
