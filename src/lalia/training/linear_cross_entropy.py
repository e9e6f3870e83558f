"""Cross-entropy of a linear head without ever holding all logits."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lalia.model.functions import linear

CHUNK_ROWS = 512
"""Rows of logits held at a time; 512 x 4096 float32 values are 8 MiB, which stays in a CPU's last-level cache."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float = 0.0, z_loss: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of -log softmax(hidden weight^T)[target] over the rows whose target is not -100.

    The gradients are computed in the forward pass, chunk by chunk, while the probabilities are at hand; so nothing
    of size (rows, vocabulary) is kept and nothing is computed twice. Without gradients only the loss is computed.

    Args:
        hidden: (..., hidden_size); its dtype is that of the matrix products, the loss itself is float32.
        weight: (vocab_size, hidden_size)
        targets: (...) int64, -100 = not counted.
        softcap: logits become cap * tanh(logits / cap); 0 = off.
        z_loss: coefficient of the sum of squared log-partitions, which is added to the loss.

    Returns:
        the loss sum in nats (a float32 scalar; 0 if nothing counts), the same without the z-loss and without gradient,
        and the number of rows counted (int64 scalar).
    """
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    kept = (targets != -100).nonzero().squeeze(1)
    count = len(kept)
    padding = -count % CHUNK_ROWS
    if padding or count < len(targets):
        # Whole chunks only, the last filled up with copies of row 0 that do not count: the library behind the products
        # keeps code and buffers for every shape it meets, which is a leak where the number of rows differs each step.
        kept = F.pad(kept, (0, padding))
        hidden, targets = hidden.index_select(0, kept), targets.index_select(0, kept).clamp_min(0)
    counted = torch.tensor(count, device=hidden.device)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        loss, entropy = _LinearCrossEntropy.apply(hidden, weight, targets, count, softcap, z_loss)
        return loss, entropy, counted
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    added = torch.zeros((), dtype=torch.float32, device=hidden.device)
    cast = weight.to(hidden.dtype)
    for start in range(0, count, CHUNK_ROWS):
        logits = _softcap(linear(hidden[start : start + CHUNK_ROWS], cast).float(), softcap)
        end = min(count - start, CHUNK_ROWS)
        total += F.cross_entropy(logits[:end], targets[start : start + end], reduction="sum")
        if z_loss:
            added += logits[:end].logsumexp(-1).square().sum() * z_loss
    return total + added, total, counted


def _softcap(logits: Tensor, cap: float) -> Tensor:
    return logits.div_(cap).tanh_().mul_(cap) if cap else logits


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, count: int, softcap: float, z_loss: float
    ) -> tuple[Tensor, Tensor]:  # hidden (rows, hidden_size), of which the first `count` count
        cast = weight.to(hidden.dtype)
        transposed = cast.t().contiguous()  # (hidden_size, vocab_size)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        added = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(targets), CHUNK_ROWS):
            rows, labels = hidden[start : start + CHUNK_ROWS], targets[start : start + CHUNK_ROWS, None]
            logits = _softcap(linear(rows, cast).float(), softcap)  # (rows, vocab)
            slope = 1.0 - (logits / softcap).square_() if softcap else None
            log_partition = logits.logsumexp(-1, keepdim=True) if z_loss else None
            log_probs = logits.log_softmax(-1)
            end = min(count - start, CHUNK_ROWS)
            total -= log_probs[:end].gather(1, labels[:end]).sum()
            grad_logits = log_probs.exp_()  # the probabilities
            if log_partition is not None:
                added += log_partition[:end].square().sum() * z_loss
                grad_logits.mul_(1.0 + 2.0 * z_loss * log_partition)
            grad_logits.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=grad_logits.dtype))
            grad_logits[end:] = 0.0
            if slope is not None:
                grad_logits.mul_(slope)
            grad_logits = grad_logits.to(hidden.dtype)
            grad_hidden[start : start + CHUNK_ROWS] = linear(grad_logits, transposed)
            if hidden.dtype == torch.float32:
                grad_weight.addmm_(grad_logits.t(), rows)
            else:
                grad_weight.add_(torch.mm(grad_logits.t(), rows))
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(total)
        return total + added, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            grad_hidden * grad.to(grad_hidden.dtype),
            (grad_weight * grad).to(ctx.weight_dtype),
            None,
            None,
            None,
            None,
        )
