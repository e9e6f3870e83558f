"""Context parallelism: every rank of a group holds some of each row's tokens, and sees the keys and values of all.

Each layer gathers the keys and values of whole rows, which with grouped heads are much smaller than the rest, and
attends with its own queries (Llama 3, arXiv 2407.21783, section 3.3.2). Everything else is token by token.

A row is cut into twice as many chunks as there are ranks, of which rank r takes the chunks r and 2 * ranks - 1 - r. An
early chunk sees few keys and a late one many, so all ranks have the same work:

    chunk     0   1   2   3   4   5   6   7
    rank      0   1   2   3   3   2   1   0
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lalia.data.loader import IGNORED, Batch
from lalia.errors import UserError
from lalia.model.attention import Pattern, attend
from lalia.model.cache import KVCache
from lalia.model.config import ModelConfig
from lalia.model.transformer import Context, Transformer
from lalia.training.parallel.world import World


def shard_batch(batch: Batch, world: World) -> Batch:
    """This rank's tokens of each row of a batch, for a model that `apply_context` has been applied to.

    Returns:
        the batch with (batch, sequence / ranks) tokens, targets and document ids. The positions are those of the whole
        rows, (batch, sequence), by which the model knows such a batch; so `single_document` is False, that they may
        get there. Bytes are not counted.

    Raises:
        UserError: if the rows cannot be divided evenly.
    """
    ranks = world.layout.context
    if ranks == 1:
        return batch
    length = batch.tokens.shape[1]
    if length % (2 * ranks):
        raise UserError(
            f"sequence_length = {length} must be a multiple of 2 x pretrain.parallel.context = {2 * ranks}, so that "
            f"each row divides into as many chunks; {length - length % (2 * ranks) or 2 * ranks} would do"
        )
    tokens, targets, document_ids = (
        _own_chunks(x, world.context_rank, ranks) for x in (batch.tokens, batch.targets, batch.document_ids)
    )
    return replace(
        batch,
        tokens=tokens,
        targets=targets,
        document_ids=document_ids,
        single_document=False,
        num_targets=int((targets != IGNORED).sum()),
        num_bytes=None,
    )


def apply_context(model: Transformer, world: World) -> None:
    """Let the model's attention see whole rows where a batch is of `shard_batch`; any other batch is treated as ever.

    All ranks of a group must take part in every forward and backward pass of such batches.
    """
    assert world.mesh is not None
    group = world.mesh.get_group("context")

    def make_context(
        config: ModelConfig,
        x: Tensor,
        positions: Tensor | None,
        document_ids: Tensor | None,
        cache: KVCache | None,
        router_logits: list[Tensor] | None,
    ) -> Context:
        if positions is None or positions.shape[-1] != x.shape[1] * group.size():
            return Context(config, x, positions, document_ids, cache, router_logits)
        assert document_ids is not None and cache is None
        return DividedContext(config, x, positions, document_ids, router_logits, group)

    model.make_context = make_context


class DividedContext(Context):
    """What the layers of one forward pass share where this rank has two chunks of each row."""

    def __init__(
        self,
        config: ModelConfig,
        x: Tensor,
        positions: Tensor,
        document_ids: Tensor,
        router_logits: list[Tensor] | None,
        group: dist.ProcessGroup,
    ) -> None:
        """
        Args:
            x: (batch, seq, hidden_size), this rank's tokens.
            positions: (batch, ranks * seq), of the whole rows.
            document_ids: (batch, seq), of this rank's tokens.
        """
        rank, ranks = group.rank(), group.size()
        super().__init__(config, x, _own_chunks(positions, rank, ranks), document_ids, None, router_logits)
        self.group, self.length = group, positions.shape[1]
        self.starts = tuple(chunk * self.seq // 2 for chunk in (rank, 2 * ranks - 1 - rank))
        """Where this rank's chunks begin in their row."""
        self.row_documents = _whole_rows(document_ids.unsqueeze(-1).contiguous(), group).squeeze(-1)
        self._patterns: dict[tuple[int, int | None], Pattern] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        c = self.config
        key, value = _Gather.apply(torch.stack((key, value)), self.group).unbind()
        parts = []
        for start, chunk in zip(self.starts, query.chunk(2, 2), strict=True):
            pattern = self._pattern(start, c.window_of_layer(layer))
            keys, values = (x[:, :, slice(*pattern.keys)] for x in (key, value))
            parts.append(attend(chunk, keys, values, scale, pattern, c.causal, c.attention_softcap))
        return torch.cat(parts, 2)

    def _pattern(self, start: int, window: int | None) -> Pattern:
        """Of the chunk that begins at `start` in its row, and of the keys that any of its tokens may attend to."""
        if (start, window) not in self._patterns:
            causal, end = self.config.causal, start + self.seq // 2
            first = 0 if window is None else max(0, start - window + 1)
            keys = (first, end if causal else self.length)
            self._patterns[start, window] = Pattern(
                self.length, causal, window, self.row_documents, queries=(start, end), keys=keys
            )
        return self._patterns[start, window]


def _own_chunks(rows: Tensor, rank: int, ranks: int) -> Tensor:
    """A rank's share of whole rows: (batch, ranks * seq) -> (batch, seq)."""
    chunks = rows.chunk(2 * ranks, 1)
    return torch.cat((chunks[rank], chunks[-1 - rank]), 1)


def _whole_rows(share: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All ranks' shares, the chunks in their order: (..., seq, size) -> (..., ranks * seq, size)."""
    shares = [torch.empty_like(share) for _ in range(group.size())]
    dist.all_gather(shares, share, group=group)
    early, late = zip(*(part.chunk(2, -2) for part in shares), strict=True)
    return torch.cat((*early, *reversed(late)), -2)


class _Gather(torch.autograd.Function):
    """Whole rows of what each rank has a share of; backward, the sum of all ranks' gradients of the own share."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, group: dist.ProcessGroup) -> Tensor:
        """(..., seq, head_dim) -> (..., ranks * seq, head_dim)"""
        ctx.group = group
        return _whole_rows(share, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ranks = ctx.group.size()
        chunks = grad.chunk(2 * ranks, -2)
        shares = [torch.cat((chunks[rank], chunks[-1 - rank]), -2) for rank in range(ranks)]
        own = torch.empty_like(shares[0])
        dist.reduce_scatter(own, shares, group=ctx.group)
        return own, None
