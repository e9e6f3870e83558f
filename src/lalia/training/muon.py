"""Muon: momentum whose matrix updates are orthogonalized, each by one of the processes that hold parts of it."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lalia.training.optimizer_base import Optimizer
from lalia.training.parallel.state import local

if TYPE_CHECKING:  # the import takes half a second, which a process that is alone does not need to spend
    from torch.distributed.device_mesh import DeviceMesh

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

    On a CPU in float32 by `_halley`, else by the Newton-Schulz iteration with the Polar Express polynomials; singular
    values end within about 0.7 to 1.2, which is all Muon needs (Jordan et al. 2024).

    Args:
        matrices: (count, rows, columns) with rows >= columns.
        dtype: precision of the products.
        iterations: of Newton-Schulz, at most 5.

    Returns:
        (count, rows, columns) in `dtype`.
    """
    if dtype in (torch.float32, torch.float64) and matrices.device.type == "cpu":
        return _halley(matrices.to(dtype))
    return _newton_schulz(matrices, dtype, iterations)


def _newton_schulz(matrices: Tensor, dtype: torch.dtype, iterations: int) -> Tensor:
    norm = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True, dtype=torch.float32)
    x = (matrices / (norm * 1.01 + 1e-7)).to(dtype)
    for a, b, c in POLAR_EXPRESS[:iterations]:
        gram = torch.bmm(x.transpose(1, 2), x)  # (count, columns, columns)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, polynomial, beta=a)
    return x


def _halley(x: Tensor) -> Tensor:
    """Two steps of the dynamically weighted Halley iteration (Nakatsukasa, Bai, Gygi 2010), on X^T X alone.

    A step is X (b/c + (a - b/c) (1 + c X^T X)^-1), so both together are X times a function of X^T X: fewer products
    than five Newton-Schulz steps make (docs/decisions/008; benchmarks/kernels.py measures both).
    X is divided by an upper bound of its largest singular value, the fourth root of the sum of their fourth powers.
    """
    gram = torch.bmm(x.transpose(1, 2), x)
    bound = gram.norm(dim=(1, 2), keepdim=True) * 1.01 + 1e-14  # >= the square of the largest singular value
    gram /= bound
    a, b, c = _halley_step(HALLEY_LOWER[0])
    p, q = b / c, a - b / c
    inverse = _inverse_plus_identity(gram, c)
    # gram * factor, without a product: c gram (1 + c gram)^-1 = 1 - (1 + c gram)^-1
    gram = _add_identity((gram * p).sub_(inverse, alpha=q / c), q / c)
    factor = _add_identity(inverse.mul_(q), p)
    gram = torch.bmm(gram, factor)  # X^T X after the step; all of these commute
    a, b, c = _halley_step(HALLEY_LOWER[1])
    p, q = b / c, a - b / c
    factor = torch.bmm(factor, _add_identity(_inverse_plus_identity(gram, c).mul_(q), p))
    return torch.bmm(x, factor.div_(bound.sqrt()))


HALLEY_LOWER = (2e-3, 0.175)
"""Singular values from which on each step is best: the second is where the first takes its own."""


def _halley_step(lower: float) -> tuple[float, float, float]:
    """a, b, c of the step that maps [lower, 1] closest to 1 (equation 3.6 there)."""
    d = (4 * (1 - lower**2) / lower**4) ** (1 / 3)
    a = (1 + d) ** 0.5 + 0.5 * (8 - 4 * d + 8 * (2 - lower**2) / (lower**2 * (1 + d) ** 0.5)) ** 0.5
    b = (a - 1) ** 2 / 4
    return a, b, a + b - 1


def _inverse_plus_identity(gram: Tensor, c: float) -> Tensor:
    """(1 + c gram)^-1"""
    factor = _inverse_of_cholesky_factor(_add_identity(gram * c, 1.0))
    return torch.bmm(factor.mT, factor)


def _inverse_of_cholesky_factor(x: Tensor) -> Tensor:
    """L^-1 of x = L L^T, symmetric positive definite matrices (count, size, size), lower triangular.

    By halves, so that nearly all of it is products, which use every thread. Halving x^-1 itself would save one more,
    but loses all digits where the gradients have a low rank.
    """
    size = x.shape[-1]
    if size <= LAPACK_SIZE:
        root, _ = torch.linalg.cholesky_ex(x)  # does not raise where gradients are not finite
        return torch.linalg.solve_triangular(root, torch.eye(size, dtype=x.dtype), upper=False)
    half = size // 2
    first = _inverse_of_cholesky_factor(x[:, :half, :half])
    below = torch.bmm(x[:, half:, :half], first.mT)  # of L
    second = _inverse_of_cholesky_factor(torch.baddbmm(x[:, half:, half:], below, below.mT, alpha=-1.0))
    out = torch.zeros_like(x)
    out[:, :half, :half], out[:, half:, half:] = first, second
    out[:, half:, :half] = torch.bmm(second, torch.bmm(below, first)).neg_()
    return out


LAPACK_SIZE = 64
"""Size up to which LAPACK is as fast as dividing further."""


def _add_identity(x: Tensor, value: float) -> Tensor:
    x.diagonal(dim1=1, dim2=2).add_(value)
    return x


class Muon(Optimizer):
    """Momentum whose matrix updates are orthogonalized (Jordan et al. 2024), with decoupled weight decay.

    A parameter may hold several matrices stacked along its rows (query, key and value; gate and up) and experts along
    a dimension of their own; each matrix is orthogonalized by itself, those of one shape as one batch. The update is
    scaled by sqrt(max(1, rows / columns)), so that its spectral norm suits a (rows, columns) map whatever its size:
    by the spectral condition of Yang et al. 2023 (arXiv 2310.17813) one learning rate then serves every width.

    Where processes hold parts (DTensors) or copies (plain tensors, along the axes of `mesh`), momentum and weights
    stay where they are; of the matrices of one shape, each process receives its share whole, orthogonalizes it and
    sends the parts back (Liu et al. 2025, arXiv 2502.16982). All processes must have gradients for the same parameters.

    Args:
        matrices: pairs (parameter, heights of the matrices in it), as `matrix_heights` gives them.
        lr: learning rate of a square matrix.
        momentum: Nesterov momentum.
        weight_decay: decoupled, multiplied by lr.
        dtype: precision of the Newton-Schulz products, and of what is sent.
        mesh: axes along which plain parameters are equal copies, and DTensors on fewer of them too.
    """

    def __init__(
        self,
        matrices: Iterable[tuple[nn.Parameter, tuple[int, ...]]],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
        mesh: "DeviceMesh | None" = None,
    ) -> None:
        pairs = list(matrices)
        super().__init__([p for p, _ in pairs], {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype
        self._layouts = {p: _layout(p, heights, mesh) for p, heights in pairs}
        for p, _ in pairs:  # at once, so that a checkpoint finds where to load it
            self.state[p]["momentum"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, keep: Tensor | None = None) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            buffers = [local(self.state[p]["momentum"]) for p in params]
            weights = [local(p) for p in params]
            grads = [local(p.grad) for p in params]
            if keep is not None:  # the momentum in a gradient's place leaves the momentum as it is
                applies = keep > 0
                grads = [torch.where(applies, g, b) for g, b in zip(grads, buffers, strict=True)]
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])  # pyright: ignore[reportPrivateImportUsage]
            updates = torch._foreach_lerp(grads, buffers, group["momentum"])  # pyright: ignore[reportPrivateImportUsage]
            if group["weight_decay"]:
                decay = group["lr"] * group["weight_decay"]
                torch._foreach_mul_(weights, 1 - decay if keep is None else 1 - decay * keep)  # pyright: ignore[reportPrivateImportUsage]
            self._descend(params, weights, list(updates), group["lr"], keep)

    def _descend(
        self, params: list[nn.Parameter], weights: list[Tensor], updates: list[Tensor], lr: float, keep: Tensor | None
    ) -> None:
        batches: dict[_Kind, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for p, weight, update in zip(params, weights, updates, strict=True):
            shape = (-1, *weight.shape[-2:])  # (experts, rows, columns)
            for kind, rows in self._layouts[p]:
                batches[kind].append((update.reshape(shape)[:, rows], weight.view(shape)[:, rows]))
        for kind, entries in batches.items():
            stack = torch.stack([update.mT if kind.wide else update for update, _ in entries]).to(self.dtype)
            whole = kind.gather(stack)  # (this process's share of the count, experts, rows, columns)
            directions = kind.scatter(orthogonalize(whole.flatten(0, 1), self.dtype).view(whole.shape), len(entries))
            if keep is not None:
                directions = directions * keep.to(directions.dtype)
            for direction, (_, weight) in zip(directions, entries, strict=True):
                weight.add_(direction.mT if kind.wide else direction, alpha=-lr * kind.scale)


@dataclass(frozen=True)
class _Move:
    """Between dividing dimension `dim` of a stack among the processes of `mesh` (None: copies) and dividing the first.

    `size` is the whole size of that dimension.
    """

    mesh: "DeviceMesh"
    dim: int | None
    size: int

    def there(self, local: Tensor) -> Tensor:
        return self._redistribute(local, local.shape[0], forth=True)

    def back(self, local: Tensor, count: int) -> Tensor:
        return self._redistribute(local, count, forth=False)

    def share(self, count: int) -> int:
        """How many of `count` matrices this process has after the move."""
        largest = -(-count // self.mesh.size())
        return max(0, min(largest, count - largest * self.mesh.get_local_rank()))

    def _redistribute(self, local: Tensor, count: int, forth: bool) -> Tensor:
        from torch.distributed.tensor import DTensor, Replicate, Shard

        shape = [count, *local.shape[1:]]
        if self.dim is not None:
            shape[self.dim] = self.size
        stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        parts, share = (Replicate() if self.dim is None else Shard(self.dim)), Shard(0)
        source, target = (parts, share) if forth else (share, parts)
        whole = DTensor.from_local(
            local.contiguous(), self.mesh, [source], run_check=False, shape=torch.Size(shape), stride=stride
        )
        return whole.redistribute(placements=[target]).to_local()


@dataclass(frozen=True)
class _Kind:
    """Matrices of one shape and layout, which are orthogonalized together; wide ones are turned, so rows >= columns.

    A stack of them is (count, experts, rows, columns).
    """

    shape: tuple[int, int]
    experts: int
    wide: bool
    moves: tuple[_Move, ...]

    @property
    def scale(self) -> float:
        return 1.0 if self.wide else (self.shape[0] / self.shape[1]) ** 0.5

    def gather(self, stack: Tensor) -> Tensor:
        """From this process's part of every matrix to its share of the matrices, whole."""
        for move in self.moves:
            stack = move.there(stack)
        return stack

    def scatter(self, share: Tensor, count: int) -> Tensor:
        """The way back, to a part of every one of the `count` matrices."""
        counts = [count]
        for move in self.moves[:-1]:
            counts.append(move.share(counts[-1]))
        for move, whole in zip(reversed(self.moves), reversed(counts), strict=False):
            share = move.back(share, whole)
        return share


def _layout(parameter: nn.Parameter, heights: tuple[int, ...], mesh: "DeviceMesh | None") -> list[tuple[_Kind, slice]]:
    """The kind of each matrix in a parameter, and its rows in this process's part of it.

    Where several are stacked, axes that divide the rows divide those of each matrix (`lalia.training.parallel.state`).
    """
    own = getattr(parameter, "device_mesh", None)
    placements = dict(zip(own.mesh_dim_names, parameter.placements, strict=True)) if own is not None else {}  # pyright: ignore[reportAttributeAccessIssue]
    if mesh is None or not set(placements) <= set(mesh.mesh_dim_names or ()):
        mesh = own
    axes: list[tuple[DeviceMesh, int | None]] = []
    for name in (mesh.mesh_dim_names or ()) if mesh is not None else ():
        assert mesh is not None
        dim = getattr(placements.get(name), "dim", None)
        axes.append((mesh[name], None if dim is None else dim - parameter.ndim + 4))
    axes = [(axis, dim) for axis, dim in axes if axis.size() > 1]
    num_experts = parameter.shape[0] if parameter.ndim == 3 else 1
    experts = local(parameter).shape[0] if parameter.ndim == 3 else 1
    result, start = [], 0
    for height in heights[: len(heights) // num_experts]:
        columns = parameter.shape[-1]
        wide = height < columns
        moves = []
        for number, (axis, dim) in enumerate(axes):
            if dim == 1:  # whole experts
                continue
            size = {None: 0, 2: height, 3: columns}[dim]
            for later, other in axes[number + 1 :]:
                size //= later.size() if other == dim else 1
            turned = {None: None, 2: 3, 3: 2}[dim] if wide else dim
            moves.append(_Move(axis, turned, size))
        here = height // math.prod(axis.size() for axis, dim in axes if dim == 2)
        shape = (columns, height) if wide else (height, columns)
        result.append((_Kind(shape, experts, wide, tuple(moves)), slice(start, start + here)))
        start += here
    assert start == local(parameter).shape[-2], "the rows of stacked matrices must divide evenly"
    return result
