"""Cross-entropy of a linear head without ever holding all logits."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lalia.model.functions import linear

CHUNK_ROWS = 512
"""Rows of logits held at a time, on a CPU; 512 x 4096 float32 values are 8 MiB, which stay in the last-level cache."""

CHUNK_ELEMENTS = 1 << 25
"""Most logits held at a time, 128 MiB in float32. Smaller chunks of a large vocabulary do not pay: each reads and
writes the gradient of the whole head."""

GPU_CHUNK_ELEMENTS = 1 << 28
"""The same on an accelerator, where a chunk has to be large enough to fill the device."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float = 0.0, z_loss: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of -log softmax(hidden weight^T)[target] over the rows whose target is not -100.

    The gradients are computed in the forward pass, chunk by chunk, while the exponentials are at hand; so nothing of
    size (rows, vocabulary) is kept and nothing is computed twice. Without gradients only the loss is computed. On an
    accelerator the host never waits: rows that do not count are computed and weighted with zero; on a CPU they are left
    out.

    Args:
        hidden: (..., hidden_size); its dtype is that of the matrix products, the loss itself is float32.
        weight: (vocab_size, hidden_size)
        targets: (...) int64, -100 = not counted.
        softcap: logits become cap * tanh(logits / cap); 0 = off.
        z_loss: adds z_loss * (log sum exp logits)^2 of each counted row, which keeps the logits from drifting
            (Chowdhery et al. 2022, PaLM, section 5).

    Returns:
        the loss sum in nats (a float32 scalar; 0 if nothing counts), the same without the z-loss and without gradient,
        and the number of rows counted (int64 scalar), all on the device of `hidden`.
    """
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    counted = targets != -100
    count = counted.sum()
    chunk = chunk_rows(len(targets), weight.shape[0], hidden.device)
    if hidden.device.type == "cpu":
        kept = counted.nonzero().squeeze(1)
        padding = -len(kept) % chunk
        if padding or len(kept) < len(targets):
            # Whole chunks only, the last filled up with copies of row 0 that do not count: the library behind the
            # products keeps code and buffers for every shape it meets, a leak where the number of rows differs.
            kept = F.pad(kept, (0, padding))
            hidden, targets = hidden.index_select(0, kept), targets.index_select(0, kept)
            counted = torch.arange(len(kept)) < len(kept) - padding
    targets, counted = targets.clamp_min(0)[:, None], counted[:, None].float()
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        loss, entropy = _LinearCrossEntropy.apply(hidden, weight, targets, counted, chunk, softcap, z_loss)
        return loss, entropy, count
    entropy = torch.zeros((), dtype=torch.float32, device=hidden.device)
    added = torch.zeros_like(entropy)
    cast = weight.to(hidden.dtype)
    for rows, labels, ones in zip(hidden.split(chunk), targets.split(chunk), counted.split(chunk), strict=True):
        logits = _softcap(linear(rows, cast).float(), softcap)
        losses, _, log_sums = _exponentials(logits, labels)
        entropy += (losses * ones).sum()
        added += (log_sums.square() * ones).sum() * z_loss
    return entropy + added, entropy, count


def chunk_rows(num_rows: int, vocab_size: int, device: torch.device) -> int:
    """Rows of logits to hold at a time, in chunks of equal size."""
    if device.type == "cpu":
        most = max(1, min(CHUNK_ROWS, CHUNK_ELEMENTS // vocab_size))
    else:
        most = max(1, GPU_CHUNK_ELEMENTS // vocab_size)
    num_chunks = max(1, math.ceil(num_rows / most))
    return max(1, math.ceil(num_rows / num_chunks))


def _softcap(logits: Tensor, cap: float) -> Tensor:
    return logits.div_(cap).tanh_().mul_(cap) if cap else logits


def _exponentials(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logits become exp(logits - largest of the row).

    Returns:
        (rows, 1) each: cross-entropies, sums of the row's exponentials, log sum exp of its logits.
    """
    chosen, largest = logits.gather(1, labels), logits.amax(1, keepdim=True)
    sums = logits.sub_(largest).exp_().sum(1, keepdim=True)
    log_sums = sums.log() + largest
    return log_sums - chosen, sums, log_sums


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (rows, hidden_size)
        weight: Tensor,
        targets: Tensor,  # (rows, 1), >= 0
        counted: Tensor,  # (rows, 1), 1 or 0
        chunk: int,
        softcap: float,
        z_loss: float,
    ) -> tuple[Tensor, Tensor]:
        cast = weight.to(hidden.dtype)
        transposed = cast.t()  # (hidden_size, vocab_size)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        entropy = torch.zeros((), dtype=torch.float32, device=hidden.device)
        added = torch.zeros_like(entropy)
        for start in range(0, len(targets), chunk):
            rows, labels, ones = (t[start : start + chunk] for t in (hidden, targets, counted))
            logits = _softcap(linear(rows, cast).float(), softcap)  # (rows, vocab)
            slope = 1.0 - (logits / softcap).square_() if softcap else None
            losses, sums, log_sums = _exponentials(logits, labels)
            entropy += (losses * ones).sum()
            added += (log_sums.square() * ones).sum() * z_loss
            # The gradient of the logits is p (1 + 2 z_loss log_sum) - [label], p = exponentials / sums. The division
            # by the sums is done on the narrow side of both products, not on the wide logits.
            if z_loss:
                logits.mul_(1.0 + 2.0 * z_loss * log_sums)
            grad_logits = logits.scatter_add_(1, labels, -sums)
            if slope is not None:
                grad_logits.mul_(slope)
            factor = ones / sums
            grad_logits = grad_logits.to(hidden.dtype)
            grad_hidden[start : start + chunk] = linear(grad_logits, transposed).mul_(factor)
            scaled = (rows * factor).to(rows.dtype)
            if hidden.dtype == grad_weight.dtype:
                grad_weight.addmm_(grad_logits.t(), scaled)
            else:
                grad_weight.add_(torch.mm(grad_logits.t(), scaled))
        ctx.gradients = (grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(entropy)
        return entropy + added, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # Scaled in place and handed over: another copy of the head's gradient may be the largest tensor of a step.
        assert ctx.gradients is not None, "a second backward pass through one loss"
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None
        grad_hidden.mul_(grad)
        grad_weight.mul_(grad)
        return grad_hidden, grad_weight.to(ctx.weight_dtype), None, None, None, None, None
