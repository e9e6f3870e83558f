"""Scaled dot-product attention: PyTorch's fused kernel, and a blocked form that trains faster on a CPU."""

import math
from functools import cache, cached_property
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_BLOCKS = 4
"""Query blocks of the CPU form. Block i sees the keys up to its own end, so two blocks skip a quarter of the square
and four 3/8; more blocks mean smaller matrix products. benchmarks/kernels.py measures the trade."""

MIN_BLOCK = 64
"""Fewest queries of a block where a window, of whose length a block has half, makes more blocks than that."""


class Pattern:
    """Which positions of a sequence may attend to which, as a rule: no square of it exists until a kernel needs one.

    Args:
        seq: length of the sequence.
        causal: nothing attends to a later position.
        window: nothing attends to a position `window` or more before its own; None = no limit.
        document_ids: (batch, seq), nothing attends to a position with another number; None = one document.
        device: of the masks; that of `document_ids` if they are given.
        queries, keys: begin and end of those that are at hand; None = all.
    """

    def __init__(
        self,
        seq: int,
        causal: bool = True,
        window: int | None = None,
        document_ids: Tensor | None = None,
        device: torch.device | str = "cpu",
        queries: tuple[int, int] | None = None,
        keys: tuple[int, int] | None = None,
    ) -> None:
        self.causal, self.window, self.document_ids = causal, window, document_ids
        self.queries, self.keys = queries or (0, seq), keys or (0, seq)
        self.device = torch.device(device) if document_ids is None else document_ids.device

    def allowed(self, queries: tuple[int, int], keys: tuple[int, int]) -> Tensor:
        """Boolean (batch or 1, queries, keys) of two ranges of those at hand, True where attention is allowed."""
        (first_query, last_query), (first_key, last_key) = queries, keys
        queries = self.queries[0] + first_query, self.queries[0] + last_query
        keys = self.keys[0] + first_key, self.keys[0] + last_key
        query = torch.arange(*queries, device=self.device)[:, None]
        key = torch.arange(*keys, device=self.device)
        allowed = (
            key <= query if self.causal else torch.ones(len(query), len(key), dtype=torch.bool, device=self.device)
        )
        if self.window is not None:
            allowed = allowed & (key > query - self.window)
        if self.document_ids is None:
            return allowed[None]
        ids = self.document_ids
        return allowed & (ids[:, slice(*queries), None] == ids[:, None, slice(*keys)])

    @property
    def dense(self) -> Tensor:
        """Boolean (batch or 1, 1, queries, keys), made once; anew in code that is compiled, so that all layers are
        alike."""
        if torch.compiler.is_compiling():
            return self._make_dense()
        return self._dense

    @cached_property
    def _dense(self) -> Tensor:
        return self._make_dense()

    def _make_dense(self) -> Tensor:
        return self.allowed((0, self._num_queries), (0, self._num_keys)).unsqueeze(1)

    @property
    def _num_queries(self) -> int:
        return self.queries[1] - self.queries[0]

    @property
    def _num_keys(self) -> int:
        return self.keys[1] - self.keys[0]

    @cached_property
    def block_mask(self) -> Any:
        """For FlexAttention, which then skips the blocks that nothing may see."""
        from torch.nn.attention.flex_attention import create_block_mask

        first_query, first_key = self.queries[0], self.keys[0]

        def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            query, key = query + first_query, key + first_key
            result = key <= query if self.causal else key >= 0
            if self.window is not None:
                result = result & (key > query - self.window)
            if self.document_ids is not None:
                result = result & (self.document_ids[batch, query] == self.document_ids[batch, key])
            return result

        batch = None if self.document_ids is None else self.document_ids.shape[0]
        return create_block_mask(allowed, batch, None, self._num_queries, self._num_keys, device=str(self.device))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | Pattern | None,
    causal: bool = True,
    softcap: float = 0.0,
) -> Tensor:
    """softmax(query key^T * scale + mask) value.

    Args:
        query: (batch, heads, seq, head_dim)
        key, value: (batch, key_value_heads, keys, head_dim); each serves heads / key_value_heads consecutive heads.
        mask: None, or a pattern, or boolean (batch or 1, 1, seq, keys), True where attention is allowed.
        causal: nothing attends to a later position; with no mask, to all up to its own (then seq == keys or seq == 1).
        softcap: scores become softcap * tanh(scores / softcap) before the mask; 0 leaves them alone.

    Returns:
        (batch, heads, seq, head_dim)
    """
    kernel = choose_kernel(query, key, mask, causal, softcap)
    if kernel == "blocked":
        key, value = _repeated(query, key, value)
        return _BlockedAttention.apply(query, key, value, mask, scale)
    if kernel == "flex":
        assert isinstance(mask, Pattern)
        return attend_flex(query, key, value, scale, mask)
    dense = mask.dense if isinstance(mask, Pattern) else mask
    if kernel == "plain":
        return _attend_softcapped(query, key, value, scale, dense, causal, softcap)
    grouped = query.shape[1] != key.shape[1]
    is_causal = causal and dense is None and query.shape[2] > 1
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=dense, is_causal=is_causal, scale=scale, enable_gqa=grouped
    )


def choose_kernel(
    query: Tensor, key: Tensor, mask: Tensor | Pattern | None, causal: bool, softcap: float
) -> Literal["blocked", "flex", "fused", "plain"]:
    """Which computation `attend` uses, by device.

    CPU: blocked products to train a causal model, else (and where torch.compile has fused what is around it) PyTorch's
    fused kernel. CUDA: FlexAttention for windows and
    documents, whose cost is that of the allowed blocks; PyTorch's fused kernel where no mask is needed. Elsewhere the
    fused kernel, with a square mask. Plain products for a soft-cap, everywhere.
    """
    if softcap:
        return "plain"
    if query.device.type == "cuda" and isinstance(mask, Pattern):
        return "flex"
    trains = torch.is_grad_enabled() and query.requires_grad and not torch.compiler.is_compiling()
    square = causal and query.shape[2] == key.shape[2]
    return "blocked" if trains and square and query.device.type == "cpu" else "fused"


def attend_flex(query: Tensor, key: Tensor, value: Tensor, scale: float, pattern: Pattern) -> Tensor:
    """`attend` by FlexAttention: compiled on CUDA; on a CPU, where it has no backward pass, for tests only."""
    return _flex(query.device.type == "cuda")(
        query, key, value, block_mask=pattern.block_mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


@cache
def _flex(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention


def attend_behind(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention, without gradients and on a CPU, of a piece of one sequence whose keys are the last of many.

    Two fused passes, over the earlier keys, all of which every token of the piece may see, and over its own ones; then
    the two results weighted by their shares of the sum under the softmax. So no mask is needed: with one over all keys
    the same kernel takes 1.7 times as long, and over 131,072 keys a mask of 512 rows takes 256 MiB.

    Args:
        query: (1, heads, seq, head_dim)
        key, value: (1, key_value_heads, keys, head_dim) with keys > seq; the last seq are the piece's own.

    Returns:
        (1, heads, seq, head_dim)
    """
    _, heads, seq, head_dim = query.shape
    kv_heads, before = key.shape[1], key.shape[2] - seq
    assert before > 0, "without earlier keys the kernel divides by zero"
    groups = heads // kv_heads
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # scaled_dot_product_attention's, with the sums
    # Heads that share keys stand one behind the other as one longer sequence, or as batches: keys are never repeated.
    rows = query.reshape(1, kv_heads, groups * seq, head_dim)
    earlier, log_earlier = flash(rows, key[:, :, :before], value[:, :, :before], scale=scale)
    own_key, own_value = (t[0, :, None, before:].expand(-1, groups, -1, -1) for t in (key, value))
    own, log_own = flash(rows.view(kv_heads, groups, seq, head_dim), own_key, own_value, is_causal=True, scale=scale)
    share = torch.sigmoid(log_earlier.reshape(heads, seq, 1) - log_own.reshape(heads, seq, 1))
    earlier, own = (t.reshape(heads, seq, head_dim).to(share.dtype) for t in (earlier, own))
    return torch.lerp(own, earlier, share).to(query.dtype).unsqueeze(0)


def _repeated(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """key and value with as many heads as the query."""
    repeats = query.shape[1] // key.shape[1]
    if repeats == 1:
        return key, value
    return key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)


def _attend_softcapped(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None, causal: bool, softcap: float
) -> Tensor:
    """By plain products: the fused kernels know no soft-cap."""
    key, value = _repeated(query, key, value)
    scores = (query @ key.transpose(2, 3)) * scale
    scores = torch.tanh(scores / softcap) * softcap
    seq, num_keys = scores.shape[2:]
    if mask is None and causal and seq > 1:
        mask = torch.ones(seq, num_keys, dtype=torch.bool, device=query.device).tril_()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype) @ value


class _BlockedAttention(torch.autograd.Function):
    """Causal attention by batched matrix products over query blocks, keeping the probabilities for backward.

    PyTorch's flash kernel recomputes the scores in backward and, on CPUs, does its products in float32 tiles; where
    the probabilities fit in memory (short sequences, or a window), plain products are two to three times as fast in
    bfloat16. A block of queries meets only the keys that its first and its last may see, so with a window the cost is
    that of the window, not of the sequence.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | Pattern | None, scale: float
    ) -> Tensor:
        batch, heads, length, head_dim = query.shape
        blocks = _blocks(length, mask.window if isinstance(mask, Pattern) else None)
        q, k, v = _flat(query, key, value, scale)
        out = q.new_empty(batch, length, heads, head_dim).transpose(1, 2)  # laid out as the next layer reads it
        probabilities = []
        for first, start, end in blocks:
            scores = torch.bmm(q[:, start:end], k[:, first:end].transpose(1, 2))
            _add_mask(scores.view(batch, heads, end - start, end - first), mask, first, start, end)
            p = torch.softmax(scores, -1)  # (batch * heads, end - start, end - first)
            out[:, :, start:end] = torch.bmm(p, v[:, first:end]).view(batch, heads, end - start, head_dim)
            probabilities.append(p)
        ctx.save_for_backward(query, key, value, *probabilities)
        ctx.scale, ctx.shape, ctx.blocks = scale, query.shape, blocks
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, *probabilities = ctx.saved_tensors
        q, k, v = _flat(query, key, value, ctx.scale)
        grad = grad.reshape(q.shape)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (first, start, end), p in zip(ctx.blocks, probabilities, strict=True):
            g = grad[:, start:end]
            # Not baddbmm_: on a slice of the batch it falls back to one product at a time.
            grad_v[:, first:end] += torch.bmm(p.transpose(1, 2), g)
            grad_p = torch.bmm(g, v[:, first:end].transpose(1, 2))
            grad_scores = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype)
            grad_q[:, start:end] = torch.bmm(grad_scores, k[:, first:end]).mul_(ctx.scale)
            grad_k[:, first:end] += torch.bmm(grad_scores.transpose(1, 2), q[:, start:end])
        return grad_q.view(ctx.shape), grad_k.view(ctx.shape), grad_v.view(ctx.shape), None, None


def _flat(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Each as (batch * heads, seq, head_dim), the query scaled."""
    q, k, v = (t.reshape(-1, *t.shape[2:]) for t in (query, key, value))
    return q * scale, k, v


def _blocks(length: int, window: int | None) -> list[tuple[int, int, int]]:
    """(first key, first query, end of both) of each block."""
    count = NUM_BLOCKS
    if window is not None:
        count = max(count, math.ceil(length / max(MIN_BLOCK, window // 2)))
    edges = [round(i * length / count) for i in range(count + 1)]
    return [
        (0 if window is None else max(0, start - window + 1), start, end)
        for start, end in pairwise(edges)
        if end > start
    ]


def _add_mask(scores: Tensor, mask: Tensor | Pattern | None, first: int, start: int, end: int) -> None:
    """-inf where attention is not allowed, in scores (batch, heads, end - start, end - first)."""
    if mask is None:  # keys before the block are all allowed
        square = torch.full((end - start, end - start), float("-inf"), dtype=scores.dtype).triu_(1)
        scores[..., start - first :].add_(square)
        return
    if isinstance(mask, Pattern):
        allowed = mask.allowed((start, end), (first, end)).unsqueeze(1)
    else:
        allowed = mask[:, :, start:end, first:end]
    scores.add_(torch.zeros(allowed.shape, dtype=scores.dtype).masked_fill_(~allowed, float("-inf")))
