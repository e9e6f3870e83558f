"""How many devices along each axis, how many rows at a time, and what is kept for backward: the first that fits."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lalia.errors import UserError
from lalia.planning.memory import Checkpointing, Memory
from lalia.training.parallel.layout import ParallelConfig, resolve

NODE = 8
"""Devices that share fast links: tensor parallelism stays among them (Narayanan et al. 2021; Llama 3, 2024)."""
FILL = 0.92
"""Share of the memory that a plan may fill; the rest is for fragments and what the estimate does not know."""

TOKENS_PER_THREAD = 512
"""Tokens of a micro-batch for each thread of a CPU: as fast as more, and its activations take less memory (LOG.md)."""

LEVELS: tuple[Checkpointing, ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class Placement:
    """How a batch is computed.

    Attributes:
        layout: devices along each axis.
        micro_rows: rows of one forward pass on one device.
        checkpointing: what the layers keep.
        memory: what that takes on one device.
        reasons: why the layout, the micro-batch and the checkpointing are as they are.
    """

    layout: ParallelConfig
    micro_rows: int
    checkpointing: Checkpointing
    memory: Memory
    reasons: tuple[str, str, str]

    def data_groups(self) -> int:
        """Groups of devices that take rows of their own."""
        return (self.layout.replicate or 1) * self.layout.shard


def place(
    sizes: Sequence[int],
    lengths: Sequence[int],
    devices: int,
    limit: float,
    memory: Callable[[int, Checkpointing, ParallelConfig], Memory],
    misfit: Callable[[ParallelConfig], list[str]],
    asked: ParallelConfig | None = None,
    asked_micro_rows: int | None = None,
    levels: Sequence[Checkpointing] = LEVELS,
    most_tokens: int | None = None,
) -> Placement | None:
    """The simplest way to compute the batches of a run within `limit` bytes on each device; None if none fits.

    In this order: copies of the model (data parallelism, Li et al. 2020); weights, gradients and state divided among
    2, 4, ... devices (ZeRO, Rajbhandari et al. 2020; FSDP, Zhao et al. 2023); products kept and the rest computed
    again, then all computed again (Chen et al. 2016; torchtitan); layers divided among 2, 4, 8 neighbours (Megatron,
    Narayanan et al. 2021); rows divided among devices (ring attention, Liu et al. 2023; Llama 3 from 131,072 tokens).

    Args:
        sizes: the different numbers of rows that a step takes over the run, ascending.
        lengths: the different lengths of a row, ascending.
        memory: of (micro-batch rows, checkpointing, layout), on one device.
        misfit: why a layout does not suit the model (`misfits`).
        asked: a layout that the recipe fixes.
        asked_micro_rows: likewise.
        levels: of activation checkpointing that may be chosen, the least first; one alone was set.
        most_tokens: of a micro-batch, where it need not fill the memory; one row is the least.

    Raises:
        UserError: if the asked layout does not fit the devices, the model or the batch.
    """
    if asked is not None:
        asked = resolve(asked, devices)
        _check(asked, misfit(asked), sizes, lengths)
    choices = list(_choices(sizes, lengths, devices, misfit, asked, levels))
    if not choices:
        raise UserError(
            f"a batch of {_listed(sizes)} rows cannot be divided among {devices} devices; set pretrain.batch_size to a "
            f"multiple of {devices} (in all of pretrain.batch_stages)"
        )
    length = lengths[-1]
    for layout, checkpointing in choices:
        groups = (layout.replicate or 1) * layout.shard
        share = sizes[-1] // groups
        most = share
        if most_tokens is not None and layout.shard == 1:  # shards are gathered anew for every micro-batch
            most = rows_within(share, most_tokens * layout.context, length)
        micro = _largest(
            share, most, limit, lambda n, c=checkpointing, w=layout: memory(n, c, w).total, asked_micro_rows
        )
        if micro is None:
            continue
        return Placement(
            layout,
            micro,
            checkpointing,
            memory(micro, checkpointing, layout),
            (
                "set in the recipe" if asked else _why_layout(layout),
                "set in the recipe" if asked_micro_rows else _why_micro(micro, most, share),
                "set in the recipe" if len(levels) == 1 else _why_checkpointing(checkpointing),
            ),
        )
    return None


def _choices(
    sizes: Sequence[int],
    lengths: Sequence[int],
    devices: int,
    misfit: Callable[[ParallelConfig], list[str]],
    asked: ParallelConfig | None,
    levels: Sequence[Checkpointing],
) -> Iterator[tuple[ParallelConfig, Checkpointing]]:
    if asked is not None:
        for level in levels:
            yield asked, level
        return
    for context in _powers(devices):
        if context > 1 and any(length % (2 * context) for length in lengths):
            continue
        for tensor in _powers(min(NODE, devices // context)):
            rest, remainder = divmod(devices, context * tensor)
            if remainder:
                continue
            for level in levels:
                # Dividing the weights costs less time than computing anything twice, so all of it comes first.
                for shard in _powers(rest) if level == levels[0] else (rest,):
                    if rest % shard or any(rows % rest for rows in sizes):
                        continue
                    layout = ParallelConfig(replicate=rest // shard, shard=shard, context=context, tensor=tensor)
                    if not misfit(layout):
                        yield layout, level


def _powers(most: int) -> list[int]:
    """1, 2, 4, ... and `most` itself."""
    return sorted({*(2**i for i in range(most.bit_length()) if 2**i <= most), most})


def rows_within(share: int, tokens: int, length: int) -> int:
    """The most rows of `length` tokens, a divisor of `share`, that hold at most `tokens`; at least one."""
    most = max(1, tokens // length)
    return next(n for n in range(min(share, most), 0, -1) if share % n == 0)


def _largest(share: int, most: int, limit: float, needed: Callable[[int], int], asked: int | None) -> int | None:
    """The most rows up to `most`, a divisor of the device's share, that fit; None if not even one does."""
    if asked is not None:
        asked = min(asked, share)
        return asked if needed(asked) <= limit else None
    return next((n for n in range(most, 0, -1) if share % n == 0 and needed(n) <= limit), None)


def _check(layout: ParallelConfig, problems: list[str], sizes: Sequence[int], lengths: Sequence[int]) -> None:
    groups = (layout.replicate or 1) * layout.shard
    if any(rows % groups for rows in sizes):
        problems.append(
            f"a batch of {_listed(sizes)} rows cannot be divided among {groups} groups of devices; set "
            f"pretrain.batch_size to a multiple of {groups} (in all of pretrain.batch_stages)"
        )
    chunks = 2 * layout.context
    if layout.context > 1 and any(length % chunks for length in lengths):
        problems.append(
            f"rows of {_listed(lengths)} tokens cannot be divided by 2 x parallel.context = {chunks}; set "
            f"pretrain.sequence_length to a multiple of {chunks} (in all of pretrain.sequence_stages)"
        )
    if problems:
        raise UserError("pretrain.parallel does not fit: " + "; ".join(problems))


def _listed(values: Sequence[int]) -> str:
    return " or ".join(map(str, values))


def _why_layout(layout: ParallelConfig) -> str:
    parts = []
    if layout.context > 1:
        parts.append(f"rows over {layout.context} devices, as one does not fit or rows are too few (Llama 3, 2024)")
    if layout.tensor > 1:
        parts.append(
            f"layers over {layout.tensor} neighbours, as shards or rows are not enough (Narayanan et al. 2021)"
        )
    if layout.shard > 1:
        parts.append(f"weights and state over {layout.shard}, as one device cannot hold them (Rajbhandari et al. 2020)")
    if (layout.replicate or 1) > 1:
        parts.append(f"{layout.replicate} copies, each on rows of its own (Li et al. 2020)")
    return "; ".join(parts) or "one device"


def _why_micro(micro: int, most: int, share: int) -> str:
    if micro == share:
        return "the device's whole share at once"
    if micro == most:
        return f"at most {TOKENS_PER_THREAD} tokens a thread, at least a row: as fast on a CPU, in less memory (LOG.md)"
    return f"the most of {share} rows that fit the memory"


def _why_checkpointing(level: Checkpointing) -> str:
    return {
        "none": "all activations fit",
        "selective": "feed-forward networks are computed again in backward, a fifth more work (Chen et al. 2016)",
        "full": "layers are computed again in backward, a third more work (Chen et al. 2016)",
    }[level]
