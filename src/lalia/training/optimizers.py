"""AdamW for embeddings, head and norms; Muon for the matrices in between."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lalia.model.transformer import Transformer

POLAR_EXPRESS = (
    (8.156555, -22.483293, 15.878770),
    (4.042930, -2.808917, 0.500018),
    (3.891668, -2.772484, 0.506065),
    (3.285754, -2.368129, 0.464490),
    (2.346541, -1.709783, 0.423236),
)
"""Coefficients of the odd polynomials of each iteration (Amsel et al. 2025, arXiv 2505.16932)."""


def orthogonalize(matrices: Tensor, dtype: torch.dtype, iterations: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices U V^T of the singular value decompositions, approximately.

    Newton-Schulz iteration with the Polar Express polynomials; singular values end within about 0.7 to 1.2, which
    is all Muon needs (Jordan et al. 2024).

    Args:
        matrices: (count, rows, columns) with rows >= columns.
        dtype: precision of the products.
        iterations: at most 5.

    Returns:
        (count, rows, columns) in `dtype`.
    """
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) * 1.01 + 1e-7)
    x = x.to(dtype)
    for a, b, c in POLAR_EXPRESS[:iterations]:
        gram = torch.bmm(x.transpose(1, 2), x)  # (count, columns, columns)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, polynomial, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix updates are orthogonalized (Jordan et al. 2024), with decoupled weight decay.

    A parameter may hold several matrices stacked along its rows (query, key and value; gate and up); each is
    orthogonalized on its own. All matrices of one shape go through the iteration as one batch. The update is scaled
    by sqrt(max(1, rows / columns)) so that its spectral norm suits a (rows, columns) map whatever its shape.

    Args:
        matrices: pairs (parameter, heights of the stacked matrices).
        lr: learning rate of a square matrix.
        momentum: Nesterov momentum.
        weight_decay: decoupled, multiplied by lr.
        dtype: precision of the Newton-Schulz products.
    """

    def __init__(
        self,
        matrices: Iterable[tuple[nn.Parameter, tuple[int, ...]]],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        pairs = list(matrices)
        super().__init__([p for p, _ in pairs], {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.heights = dict(pairs)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            buffers = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
            for buffer, grad in zip(buffers, grads, strict=True):
                buffer.lerp_(grad, 1 - group["momentum"])
            updates = [torch.lerp(g, b, group["momentum"]) for g, b in zip(grads, buffers, strict=True)]
            by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor, bool]]] = defaultdict(list)
            for p, update in zip(params, updates, strict=True):
                heights = self.heights[p]
                # Experts are stacked along a dimension of their own, which is rows too.
                update, p = update.flatten(0, -2), p.flatten(0, -2)
                for matrix, weight in zip(update.split(heights), p.split(heights), strict=True):
                    wide = matrix.shape[0] < matrix.shape[1]
                    tall = matrix.t() if wide else matrix
                    by_shape[(tall.shape[0], tall.shape[1])].append((tall, weight, wide))
            if group["weight_decay"]:
                for p in params:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
            for entries in by_shape.values():
                stacked = orthogonalize(torch.stack([tall for tall, _, _ in entries]), self.dtype)
                for direction, (_, weight, wide) in zip(stacked, entries, strict=True):
                    rows, columns = weight.shape
                    scale = max(1.0, rows / columns) ** 0.5
                    weight.add_(direction.t() if wide else direction, alpha=-group["lr"] * scale)


def matrix_heights(model: Transformer) -> list[tuple[nn.Parameter, tuple[int, ...]]]:
    """The matrices inside the layers, with the heights of those that are stored stacked."""
    config = model.config
    stacked: Mapping[str, tuple[int, ...]] = {
        "attention.qkv.weight": (config.query_size, config.key_value_size, config.key_value_size),
        "feed_forward.up.weight": (config.intermediate_size,) * (2 if config.gated else 1),
        "feed_forward.up": (config.expert_size or config.intermediate_size,) * (2 if config.gated else 1),
    }
    result = []
    for layer in model.layers:
        for name, parameter in layer.named_parameters():
            if parameter.ndim >= 2:
                heights = stacked.get(name, (parameter.shape[-2],))
                result.append((parameter, heights * (parameter.shape[0] if parameter.ndim == 3 else 1)))
    return result
