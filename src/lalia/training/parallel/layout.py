"""How many devices there are along each axis, and what that asks of a model; no tensor is needed to say so."""

from pydantic import Field

from lalia.errors import UserError
from lalia.model.config import ModelConfig
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


def misfits(layout: ParallelConfig, shape: ModelConfig, optimizer: str = "muon", fp8: bool = False) -> list[str]:
    """Why a model cannot be trained in a layout (`replicate` resolved): one sentence for each reason.

    Args:
        layout: devices along each axis.
        shape: of the model.
        optimizer: its kind, as in the settings.
        fp8: whether its layers multiply in 8-bit floating point.
    """
    assert layout.replicate is not None
    tensor, expert, rows = layout.tensor, layout.expert, layout.replicate * layout.shard * layout.context
    divided = layout.shard * tensor * expert > 1
    problems = [
        f"the {count} {name} cannot be divided by parallel.tensor = {tensor}; choose a divisor"
        for name, count in (
            ("query heads", shape.num_attention_heads),
            ("key and value heads", shape.num_key_value_heads),
            ("feed-forward units (intermediate_size)", shape.intermediate_size),
        )
        if count % tensor
    ]
    if tensor > 1 and shape.num_experts:
        problems.append(f"layers with num_experts = {shape.num_experts} are divided by parallel.expert, not by tensor")
    if expert > 1 and not shape.num_experts:
        problems.append(f"parallel.expert = {expert} divides experts, but the model has none; set it to 1")
    elif shape.num_experts % expert:
        problems.append(f"parallel.expert = {expert} must divide the model's num_experts = {shape.num_experts}")
    if divided and rows > 1 and shape.hidden_size % (layout.shard * layout.context):
        problems.append(
            f"shard x context = {layout.shard * layout.context} must divide the model's hidden_size = "
            f"{shape.hidden_size}"
        )
    if divided and optimizer == "adamw8bit":
        problems.append(
            "optimizer.kind = 'adamw8bit' takes whole weights, but they are divided; use 'muon' or 'adamw', or set "
            "parallel.shard, tensor and expert to 1"
        )
    if tensor > 1 and fp8:
        problems.append("fp8 multiplies whole weights; set fp8 = false or parallel.tensor = 1")
    return problems


def check_model(layout: ParallelConfig, shape: ModelConfig, optimizer: str = "muon", fp8: bool = False) -> None:
    """Refuse a layout that a model cannot be trained in; arguments as those of `misfits`.

    Raises:
        UserError: naming every reason.
    """
    if problems := misfits(layout, shape, optimizer, fp8):
        raise UserError("pretrain.parallel does not fit the model: " + "; ".join(problems))
