"""Elementwise parts of the transformer, each as one differentiable function with few passes over memory.

On a CPU these parts are bound by memory traffic, and PyTorch's eager composites make many passes and keep every
intermediate. Here each keeps what is dear to compute again and nothing else. tests/model/test_functions.py compares
every one with the textbook expression under double precision. What torch.compile traces is that expression itself:
it joins the passes, forward and backward.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, with the weights cast to the activation's dtype.

    On an AMD processor with AVX-512, float32 products of forward and of the input's gradient go to oneDNN, which
    PyTorch bundles and uses for bfloat16 but not for float32; there it calls MKL, which on those does without AVX-512
    and is a third slower. On Intel's, MKL is the faster one (benchmarks/kernels.py), and on both for the gradient of
    the weight.

    Args:
        x: (..., in_features)
        weight: (out_features, in_features)
        bias: (out_features,)

    Returns:
        (..., out_features)
    """
    # Small inputs: there the overhead of the call counts for more.
    if x.device.type == "cpu" and x.numel() >= 1 << 16 and not is_compiling():
        if torch.is_grad_enabled():
            return _Linear.apply(x, weight, bias)
        return _product(x, weight, bias)
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _is_amd() -> bool:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return "AuthenticAMD" in file.read(4096)
    except OSError:  # not Linux
        return False


_PREFERS_ONEDNN = _HAS_ONEDNN and torch.backends.cpu.get_cpu_capability() == "AVX512" and _is_amd()


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if _PREFERS_ONEDNN and x.dtype == torch.float32:
        return _onednn(x, weight.contiguous(), bias)
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = _product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_weight = (rows.t() @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, times `weight` (Zhang and Sennrich 2019).

    Args:
        x: (..., size)
        weight: (size,) in any floating dtype, or None for no scale.
        eps: added to the mean square.
    """
    if x.device.type != "cpu" or is_compiling():
        return F.rms_norm(x, x.shape[-1:], None if weight is None else weight.to(x.dtype), eps)
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, eps)
    return _scaled(x, _rms_scale(x, eps), weight)


def _rms_scale(x: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_accumulator(x))
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _scaled(x: Tensor, scale: Tensor, weight: Tensor | None = None) -> Tensor:
    y = x * scale.to(x.dtype)
    return y if weight is None else y.mul_(weight.to(x.dtype))


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        scale = _rms_scale(x, eps)
        ctx.save_for_backward(x, weight, scale)
        return _scaled(x, scale, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, scale = ctx.saved_tensors
        size = x.shape[-1]
        product = (grad * x).mul_(scale.to(x.dtype))
        grad_weight = None
        if weight is None:
            mean = product.sum(-1, keepdim=True, dtype=scale.dtype)
        else:
            grad_weight = product.reshape(-1, size).sum(0, dtype=scale.dtype).to(weight.dtype)
            cast = weight.to(x.dtype)
            mean = (product @ cast).unsqueeze(-1).to(scale.dtype)
            grad = torch.mul(grad, cast, out=product)
        grad_x = torch.mul(grad, scale.to(x.dtype), out=product)
        return grad_x.addcmul_(x, (mean * scale.square()).div_(-size).to(x.dtype)), grad_weight, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, "halves" convention, moving heads in front of positions (Su et al. 2021).

    Args:
        x: (batch, seq, heads, head_dim), any strides.
        cos, sin: (seq, size) or (batch, seq, size), the sine with its first half negated (`lalia.model.rotary`). Of
            each head the first `size` dimensions turn, the others stay.

    Returns:
        (batch, heads, seq, head_dim), contiguous.
    """
    if is_compiling():
        return _rotate_textbook(x.transpose(1, 2), cos, sin)
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


def _rotate_textbook(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # x (batch, heads, seq, head_dim)
    cos, sin = _over_heads(cos), _over_heads(sin)
    turned, rest = x.tensor_split((cos.shape[-1],), -1)
    first, second = turned.chunk(2, -1)
    turned = turned * cos + torch.cat((second, first), -1) * sin
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned.contiguous()


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

    On a CPU backward writes the gradient over `gate_up`, unless that is a leaf: it is a layer's largest activation, and
    fresh memory of that size costs page faults. Whoever still needs `gate_up` afterwards (a second backward pass) is
    told so by autograd.

    Args:
        gate_up: (..., 2 * size)

    Returns:
        (..., size)
    """
    if is_compiling():
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up
    if torch.is_grad_enabled() and gate_up.requires_grad:
        on_cpu = gate_up.device.type == "cpu"
        return _SwiGLU.apply(gate_up, on_cpu and not gate_up.is_leaf and gate_up.is_contiguous())
    return _swiglu(gate_up)


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


CACHE_ELEMENTS = 1 << 17
"""Elements in a block of rows, whose several passes then stay in the second-level cache of each core."""


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, overwrite: bool) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.overwrite = overwrite
        return _swiglu(gate_up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gate_up,) = ctx.saved_tensors
        out = gate_up if ctx.overwrite else torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
        width = gate_up.shape[-1]
        num_rows = gate_up.numel() // width
        block = max(1, CACHE_ELEMENTS // width) if gate_up.device.type == "cpu" else num_rows
        pieces = zip(*(t.reshape(-1, t.shape[-1]).split(block) for t in (gate_up, grad, out)), strict=True)
        for gate_up_piece, g, out_piece in pieces:
            gate, up = gate_up_piece.chunk(2, -1)
            grad_gate, grad_up = out_piece.chunk(2, -1)
            sigmoid = torch.sigmoid(gate)
            silu = gate * sigmoid
            grad_silu = g * up
            torch.mul(g, silu, out=grad_up)
            # d silu / d gate = sigmoid + silu (1 - sigmoid)
            sigmoid.add_(silu.addcmul_(silu, sigmoid, value=-1.0))
            torch.mul(grad_silu, sigmoid, out=grad_gate)
        return (out if out is not gate_up else out.detach()), None


def relu_squared(x: Tensor) -> Tensor:
    """relu(x) ** 2 (So et al. 2021)."""
    if is_compiling():
        return torch.relu(x).square()
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
