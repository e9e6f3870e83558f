"""Elementwise parts of the transformer, each as one differentiable function with few passes over memory.

On a CPU these parts are bound by memory traffic, and PyTorch's eager composites make many passes and keep every
intermediate. Here each saves its inputs and recomputes the rest in backward. tests/model/test_functions.py compares
every one with the textbook expression under double precision.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, with the weights cast to the activation's dtype.

    In float32 on a CPU the products of forward and of the input's gradient go to oneDNN, which PyTorch bundles and
    uses for bfloat16 but not for float32; there it calls MKL, which on AMD processors is a third slower
    (benchmarks/kernels.py). The gradient of the weight is as fast in MKL and stays there.

    Args:
        x: (..., in_features)
        weight: (out_features, in_features)
        bias: (out_features,)

    Returns:
        (..., out_features)
    """
    bias = None if bias is None else bias.to(x.dtype)
    if x.dtype == torch.float32 and weight.dtype == torch.float32 and _use_onednn(x):
        if not torch.is_grad_enabled():
            return _onednn(x, weight, bias)
        y = _Linear.apply(x, weight)
        return y if bias is None else y + bias
    return F.linear(x, weight.to(x.dtype), bias)


def _use_onednn(x: Tensor) -> bool:
    """For products large enough that the call's overhead does not count."""
    return _HAS_ONEDNN and x.device.type == "cpu" and x.numel() >= 1 << 16


_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        grad_x = _onednn(grad, weight.t().contiguous()) if ctx.needs_input_grad[0] else None
        rows = x.reshape(-1, x.shape[-1])
        grad_weight = grad.reshape(-1, grad.shape[-1]).t() @ rows if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, times `weight` (Zhang and Sennrich 2019).

    Args:
        x: (..., size)
        weight: (size,) in any floating dtype, or None for no scale.
        eps: added to the mean square.
    """
    if x.device.type != "cpu":
        return F.rms_norm(x, x.shape[-1:], None if weight is None else weight.to(x.dtype), eps)
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, eps)
    return _rms_norm(x, weight, eps)[0]


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_accumulator(x))
    scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    y = x * scale.to(x.dtype)
    if weight is not None:
        y.mul_(weight.to(x.dtype))
    return y, scale


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        y, scale = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, scale = ctx.saved_tensors
        size = x.shape[-1]
        normed = x * scale.to(x.dtype)
        product = grad * normed
        if weight is None:
            grad_weight = None
            mean = product.sum(-1, keepdim=True, dtype=scale.dtype).div_(size)
            grad_normed = grad.clone()
        else:
            flat = product.reshape(-1, size)
            grad_weight = flat.sum(0, dtype=scale.dtype).to(weight.dtype)
            cast = weight.to(x.dtype)
            mean = (product @ cast).unsqueeze(-1).div_(size)
            grad_normed = grad * cast
        grad_normed.addcmul_(normed, mean.to(x.dtype), value=-1.0)
        return grad_normed.mul_(scale.to(x.dtype)), grad_weight, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, "halves" convention, moving heads in front of positions (Su et al. 2021).

    Args:
        x: (batch, seq, heads, head_dim), any strides.
        cos, sin: (seq, size) or (batch, seq, size), the sine with its first half negated (`lalia.model.rotary`). Of
            each head the first `size` dimensions turn, the others stay.

    Returns:
        (batch, heads, seq, head_dim), contiguous.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rotate.apply(x, cos, sin)
    return _rotate(x.transpose(1, 2), cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # x (batch, heads, seq, head_dim)
    cos, sin = _over_heads(cos), _over_heads(sin)
    size = cos.shape[-1]
    half = size // 2
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if size < x.shape[-1]:
        out[..., size:] = x[..., size:]
    turned, x = out[..., :size], x[..., :size]
    torch.mul(x, cos, out=turned)
    turned[..., :half].addcmul_(x[..., half:], sin[..., :half])
    turned[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


def _over_heads(table: Tensor) -> Tensor:
    return table if table.dim() == 2 else table.unsqueeze(1)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x.transpose(1, 2), cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin).transpose(1, 2), None, None


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, where the last dimension holds gate then up (Shazeer 2020).

    Args:
        gate_up: (..., 2 * size)

    Returns:
        (..., size)
    """
    if torch.is_grad_enabled() and gate_up.requires_grad:
        return _SwiGLU.apply(gate_up)
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        out = torch.empty_like(gate_up)
        grad_gate, grad_up = out.chunk(2, -1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        grad_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        return out


def relu_squared(x: Tensor) -> Tensor:
    """relu(x) ** 2 (So et al. 2021)."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _ReluSquared.apply(x)
    return torch.relu(x).square_()


class _ReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = torch.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (positive,) = ctx.saved_tensors
        return (grad * positive).mul_(2.0)
