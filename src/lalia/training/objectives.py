"""Objectives: functions (model, batch) -> (loss sum, weight sum, metrics). The Trainer divides by the total weight."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lalia.data.loader import PADDING, Batch
from lalia.model.transformer import Transformer
from lalia.training.linear_cross_entropy import linear_cross_entropy

Metrics = dict[str, Tensor]
"""Parts of a loss worth a line of their own in the log: sums like the loss, divided by the same weight."""
Objective = Callable[[Transformer, Batch], tuple[Tensor, Tensor, Metrics]]
"""Loss sum and weight sum, 0-d tensors on the model's device, the weight int64; metrics carry no gradient."""


class LossModule(nn.Module):
    """An objective of a model as one module, which a data-parallel wrapper can hold whole."""

    def __init__(self, model: Transformer, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Metrics]:
        return self.objective(self.model, batch)


def next_token(model: Transformer, batch: Batch, z_loss: float = 0.0) -> tuple[Tensor, Tensor, Metrics]:
    """Sum of next-token cross-entropies in nats and the number of predicted tokens.

    A row of several documents is masked so that no token sees another document; a batch without such rows takes the
    cheaper causal path, which is then exact.

    In training, `z_loss` times the squared log-partition of every prediction is added (Chowdhery et al. 2022), and a
    model with experts adds its router losses, times the number of predicted tokens: the Trainer's division then leaves
    the mean cross-entropy plus the weighted mean of the micro-batches' router losses. That mean is not quite the router
    loss of the whole batch, because balance is judged micro-batch by micro-batch. The metric `cross_entropy` is the
    loss without what was added.
    """
    c = model.config
    routed = c.num_experts and model.training and (c.router_aux_loss_coef or c.router_z_loss_coef)
    router_logits: list[Tensor] | None = [] if routed else None
    if batch.single_document:
        hidden = model(batch.tokens, router_logits=router_logits)
    else:
        hidden = model(
            batch.tokens, positions=batch.positions, document_ids=batch.document_ids, router_logits=router_logits
        )
    z_loss = z_loss if model.training else 0.0
    loss, entropy, weight = cross_entropy(model, hidden, batch.targets, z_loss)
    if router_logits:
        loss = loss + weight * router_loss(model, router_logits, batch.document_ids != PADDING)
    return loss, weight, {"cross_entropy": entropy} if router_logits or z_loss else {}


def cross_entropy(
    model: Transformer, hidden: Tensor, targets: Tensor, z_loss: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of -log p(target) under the model's whole head.

    Args:
        hidden: (batch, seq, hidden_size) from the model's forward pass.
        targets: (batch, seq)
        z_loss: coefficient of the squared log-partition, summed over the predictions.

    Returns:
        the sum with the z-loss, the sum without it (no gradient), and the number of targets that are not IGNORED.
    """
    c = model.config
    hidden, weight = model.before_head(hidden), model.head_weight
    if model.head_bias is not None:  # as one more column, which a 1 in every row multiplies
        hidden = torch.cat((hidden, torch.ones_like(hidden[..., :1])), -1)
        weight = torch.cat((weight, model.head_bias[:, None]), -1)
    if c.output_multiplier != 1.0:
        hidden = hidden * c.output_multiplier
    return linear_cross_entropy(hidden, weight, targets, c.logit_softcap, z_loss)


def router_loss(model: Transformer, router_logits: Sequence[Tensor], kept: Tensor) -> Tensor:
    """The load-balancing and z losses times their coefficients in the model's config, averaged over its layers.

    Args:
        router_logits: (batch * seq, num_experts) of each layer that has experts.
        kept: (batch, seq) bool, False in padding, which counts for nothing.
    """
    c = model.config
    counted = kept.reshape(-1, 1).float()
    losses = []
    for logits in router_logits:
        balance = load_balancing_loss(logits, c.num_experts_per_token, counted) * c.router_aux_loss_coef
        losses.append(balance + router_z_loss(logits, counted) * c.router_z_loss_coef)
    return torch.stack(losses).mean()


def load_balancing_loss(logits: Tensor, num_chosen: int, counted: Tensor) -> Tensor:
    """num_experts * sum over experts of (choices per token) * (mean probability), for one layer.

    Fedus et al. 2021 (Switch Transformer), equations 4 to 6, counting all `num_chosen` choices of a token: a balanced
    router gives `num_chosen`, one that always takes the same experts up to `num_experts`.

    Args:
        logits: (rows, num_experts); no rows give 0.
        counted: (rows, 1), 1.0 for rows that count and 0.0 for the others: not an index of them, whose length an
            accelerator would have to be waited for.
    """
    num_rows = counted.sum().clamp(min=1)
    probabilities = logits.float().softmax(-1)
    choices = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(num_chosen, -1).indices, 1.0)
    share = (choices * counted).sum(0) / num_rows  # carries no gradient
    return logits.shape[1] * (share * (probabilities * counted).sum(0) / num_rows).sum()


def router_z_loss(logits: Tensor, counted: Tensor) -> Tensor:
    """Mean squared log-partition of the router, which keeps its logits small (Zoph et al. 2022, equation 5).

    Args:
        logits: (rows, num_experts); no rows give 0.
        counted: as in `load_balancing_loss`.
    """
    squares = logits.float().logsumexp(-1, keepdim=True).square()
    return (squares * counted).sum() / counted.sum().clamp(min=1)
