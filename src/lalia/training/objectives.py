"""Objectives: functions (model, batch) -> (loss sum, weight). The Trainer divides by the total weight."""

from collections.abc import Callable

from torch import Tensor

from lalia.data.loader import Batch
from lalia.model.transformer import Transformer
from lalia.training.linear_cross_entropy import linear_cross_entropy

Objective = Callable[[Transformer, Batch], tuple[Tensor, int]]


def next_token(model: Transformer, batch: Batch) -> tuple[Tensor, int]:
    """Sum of next-token cross-entropies in nats and the number of predicted tokens.

    A row of several documents is masked so that no token sees another document; a batch without such rows takes the
    cheaper causal path, which is then exact.
    """
    if batch.single_document:
        hidden = model(batch.tokens)
    else:
        hidden = model(batch.tokens, positions=batch.positions, document_ids=batch.document_ids)
    return linear_cross_entropy(hidden, model.head_weight, batch.targets, model.config.logit_softcap)
