"""Scaled dot-product attention: PyTorch's fused kernel, and a blocked form that trains faster on a CPU."""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_BLOCKS = 4
"""Query blocks of the CPU form. Block i sees the keys up to its own end, so two blocks skip a quarter of the square
and four 3/8; more blocks mean smaller matrix products. benchmarks/kernels.py measures the trade."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None,
    causal: bool = True,
    softcap: float = 0.0,
) -> Tensor:
    """softmax(query key^T * scale + mask) value.

    Args:
        query: (batch, heads, seq, head_dim)
        key, value: (batch, key_value_heads, keys, head_dim); each serves heads / key_value_heads consecutive heads.
        mask: None, or boolean (batch or 1, 1, seq, keys), True where attention is allowed.
        causal: nothing attends to a later position; with no mask, to all up to its own (then seq == keys or seq == 1).
        softcap: scores become softcap * tanh(scores / softcap) before the mask; 0 leaves them alone.

    Returns:
        (batch, heads, seq, head_dim)
    """
    seq, num_keys = query.shape[2], key.shape[2]
    if softcap:
        return _attend_softcapped(query, key, value, scale, mask, causal, softcap)
    trains = torch.is_grad_enabled() and query.requires_grad
    if trains and query.device.type == "cpu" and causal and seq == num_keys:
        key, value = _repeated(query, key, value)
        return _BlockedAttention.apply(query, key, value, _additive(query, mask), scale)
    grouped = query.shape[1] != key.shape[1]
    is_causal = causal and mask is None and seq > 1
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
    )


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
    return (key, value) if repeats == 1 else (key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1))


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


def _additive(query: Tensor, mask: Tensor | None) -> Tensor:
    """Additive form of the mask, (1 or batch, seq, seq); a row's own position is always allowed."""
    length = query.shape[2]
    allowed = torch.ones(1, length, length, dtype=torch.bool).tril_() if mask is None else mask.squeeze(1)
    return torch.zeros(allowed.shape, dtype=query.dtype).masked_fill_(~allowed, float("-inf"))


class _BlockedAttention(torch.autograd.Function):
    """Causal attention by batched matrix products over query blocks, keeping the probabilities for backward.

    PyTorch's flash kernel recomputes the scores in backward and, on CPUs, does its products in float32 tiles; where
    the probabilities fit in memory (short sequences), plain products are two to three times as fast in bfloat16.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
        batch, heads, length, head_dim = query.shape
        q, k, v = (t.reshape(batch * heads, length, head_dim) for t in (query, key, value))
        out = q.new_empty(batch, length, heads, head_dim).transpose(1, 2)  # laid out as the next layer reads it
        probabilities = []
        for start, end in _blocks(length):
            scores = _scores(q[:, start:end], k[:, :end], mask[:, start:end, :end], scale, heads)
            p = torch.softmax(scores, -1)  # (batch * heads, end - start, end)
            out[:, :, start:end] = torch.bmm(p, v[:, :end]).view(batch, heads, end - start, head_dim)
            probabilities.append(p)
        ctx.save_for_backward(q, k, v, *probabilities)
        ctx.scale, ctx.shape = scale, query.shape
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, *probabilities = ctx.saved_tensors
        scale, length = ctx.scale, q.shape[1]
        grad = grad.reshape(q.shape)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (start, end), p in zip(_blocks(length), probabilities, strict=True):
            g = grad[:, start:end]
            # Not baddbmm_: on a slice of the batch it falls back to one product at a time.
            grad_v[:, :end] += torch.bmm(p.transpose(1, 2), g)
            grad_p = torch.bmm(g, v[:, :end].transpose(1, 2))
            grad_scores = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype)
            grad_q[:, start:end] = torch.bmm(grad_scores, k[:, :end]).mul_(scale)
            grad_k[:, :end] += torch.bmm(grad_scores.transpose(1, 2), q[:, start:end])
        return grad_q.view(ctx.shape), grad_k.mul_(scale).view(ctx.shape), grad_v.view(ctx.shape), None, None


def _blocks(length: int) -> list[tuple[int, int]]:
    edges = [round(i * length / NUM_BLOCKS) for i in range(NUM_BLOCKS + 1)]
    return [(start, end) for start, end in pairwise(edges) if end > start]


def _scores(q: Tensor, k: Tensor, mask: Tensor, scale: float, heads: int) -> Tensor:
    if mask.shape[0] == 1:
        return torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale)
    scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale)
    scores.view(-1, heads, *scores.shape[1:]).add_(mask.unsqueeze(1))
    return scores
