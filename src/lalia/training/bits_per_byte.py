"""Bits per byte of held-out text: the loss in a unit that no tokenizer can flatter."""

import math
from collections.abc import Iterable, Sequence

import torch

from lalia.model.transformer import Transformer
from lalia.training.objectives import cross_entropy


@torch.no_grad()
def bits_per_byte(
    model: Transformer,
    documents: Iterable[tuple[Sequence[int], int]],
    window: int,
    stride: int | None = None,
    rows: int = 16,
) -> float:
    """Mean of -log2 p(token | context) per byte of text.

    Every token after a document's first (the end-of-text mark that opens it) is predicted exactly once. Windows of
    `window` tokens advance by `stride`; from the second window on, only the last `stride` predictions count, so each
    has at least `window - stride` tokens of context.

    Args:
        model: in evaluation, any dtype of activations; the sum is taken in float64.
        documents: pairs (token ids, UTF-8 bytes of the text they encode).
        window: tokens per forward pass, at most the model's context.
        stride: tokens between window starts; None means `window` (no overlap: the cheapest, most pessimistic score).
        rows: windows per forward pass.
    """
    stride = stride or window
    nats, num_bytes = 0.0, 0
    inputs: list[list[int]] = []
    labels: list[list[int]] = []

    def flush() -> None:
        nonlocal nats
        if inputs:
            hidden = model(torch.tensor(inputs, device=model.device))
            total, _, _ = cross_entropy(model, hidden, torch.tensor(labels, device=model.device))
            nats += float(total)
            inputs.clear()
            labels.clear()

    for ids, size in documents:
        num_bytes += size
        ids = list(ids)
        scored = 0  # predictions of ids[1..scored] are done
        start = 0
        while scored < len(ids) - 1:
            end = min(start + window, len(ids) - 1)
            row, row_labels = ids[start:end], ids[start + 1 : end + 1]
            row_labels = [-100] * (scored - start) + row_labels[scored - start :]
            padding = window - len(row)
            inputs.append(row + [0] * padding)
            labels.append(row_labels + [-100] * padding)
            scored = end
            start += stride
            if len(inputs) == rows:
                flush()
    flush()
    if num_bytes == 0:
        raise ValueError("bits_per_byte needs at least one byte of text")
    return nats / math.log(2) / num_bytes
