"""The hand-written functions of the transformer against textbook expressions: values and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lalia.model import attention
from lalia.model.attention import Pattern, attend, attend_flex
from lalia.model.config import ModelConfig
from lalia.model.functions import linear, relu_squared, rms_norm, rotate, swiglu
from lalia.model.rotary import rotary_table

EPS = 1e-2  # large enough to be seen


def rotary_config(head_dim: int, theta: float, direction: Any = 1) -> ModelConfig:
    return ModelConfig(
        vocab_size=1,
        hidden_size=1,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=head_dim,
        intermediate_size=1,
        max_position_embeddings=1,
        rope_theta=theta,
        rope_direction=direction,
    )


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().clone().requires_grad_() for t in tensors)


def gradients(function: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Value and gradients under a random, non-contiguous upstream gradient."""
    tensors = leaves(*tensors)
    out = function(*tensors)
    upstream = random(*reversed(out.shape), dtype=out.dtype, seed=9).permute(*reversed(range(out.dim())))
    return out.detach(), *torch.autograd.grad(out, tensors, upstream)


def assert_close(ours: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    for number, (a, b) in enumerate(zip(ours, expected, strict=True)):
        scale = b.double().abs().max()
        assert (a.double() - b.double()).abs().max() <= tolerance * scale, f"output {number}"


def textbook_rms_norm(x: Tensor, weight: Tensor | None = None) -> Tensor:
    y = x / torch.sqrt(x.square().mean(-1, keepdim=True) + EPS)
    return y if weight is None else y * weight


def textbook_rotate(x: Tensor, positions: Tensor, theta: float, direction: int) -> Tensor:
    """Multiply pair i (dimensions i and i + half) as a complex number by exp(1j * position * theta ** (-i / half))."""
    half = x.shape[-1] // 2
    frequency = torch.tensor([theta ** (-i / half) for i in range(half)], dtype=torch.float64)
    angle = positions.double()[..., None, None] * frequency * direction  # (batch or none, seq, 1, half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), -1).transpose(1, 2)


def textbook_swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return gate * torch.sigmoid(gate) * up


def textbook_relu_squared(x: Tensor) -> Tensor:
    return torch.where(x > 0, x * x, torch.zeros_like(x))


def textbook_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, allowed: Tensor) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    heads = [
        torch.softmax((query[:, h] @ key[:, h // repeats].mT * scale).masked_fill(~allowed[:, 0], -torch.inf), -1)
        @ value[:, h // repeats]
        for h in range(query.shape[1])
    ]
    return torch.stack(heads, 1)


# Value, gradient, and gradient by finite differences, in double precision.


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 2, 6)])
def test_rms_norm(weighted: bool, shape: tuple[int, ...]) -> None:
    x, weight = random(*shape), random(shape[-1], seed=1)
    inputs = (x, weight) if weighted else (x,)

    def ours(x: Tensor, weight: Tensor | None = None) -> Tensor:
        return rms_norm(x, weight, EPS)

    assert_close(gradients(ours, *inputs), gradients(textbook_rms_norm, *inputs), 1e-12)
    assert torch.autograd.gradcheck(ours, leaves(*inputs))
    with torch.no_grad():
        assert_close((ours(*inputs),), (textbook_rms_norm(*inputs),), 1e-12)


def test_rms_norm_of_views_and_of_zeros() -> None:
    x = random(2, 5, 4, 6)
    view = x.split((2, 2), 2)[1]  # as the keys in a fused projection
    assert_close((rms_norm(view, None, EPS),), (textbook_rms_norm(view),), 1e-12)
    (zeros,) = leaves(torch.zeros(2, 4))
    out = rms_norm(zeros, torch.ones(4), 1e-6)
    (gradient,) = torch.autograd.grad(out.sum(), zeros)
    assert torch.equal(out, torch.zeros(2, 4))
    assert bool(torch.isfinite(gradient).all())


def test_rms_norm_keeps_the_dtype_of_x() -> None:
    x, weight = random(4, 16, dtype=torch.bfloat16), random(16, dtype=torch.float32, seed=1)
    out, grad_x, grad_weight = gradients(lambda x, w: rms_norm(x, w, EPS), x, weight)
    assert (out.dtype, grad_x.dtype, grad_weight.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("batched", [True, False])
def test_rotate(direction: int, batched: bool) -> None:
    positions = torch.tensor([[0, 1, 5, 30], [7, 2, 0, 3]]) if batched else torch.tensor([0, 3, 4, 31])
    cos, sin = rotary_table(positions, rotary_config(6, 100.0, direction), 0)
    assert cos.dtype == torch.float32 and cos.shape == (*positions.shape, 6)

    def ours(x: Tensor) -> Tensor:
        return rotate(x, cos.double(), sin.double())

    def textbook(x: Tensor) -> Tensor:
        return textbook_rotate(x, positions, 100.0, direction)

    x = random(2, 4, 3, 6)
    assert_close(gradients(ours, x), gradients(textbook, x), 1e-5)  # the table is float32
    assert torch.autograd.gradcheck(ours, leaves(x))
    with torch.no_grad():
        assert_close((ours(x),), (textbook(x),), 1e-5)
    assert ours(x).is_contiguous()
    wrong = textbook_rotate(x, positions, 100.0, -direction)
    assert (ours(x) - wrong).abs().max() > 0.1


@pytest.mark.parametrize(("ours", "textbook"), [(swiglu, textbook_swiglu), (relu_squared, textbook_relu_squared)])
def test_activations(ours: Callable[[Tensor], Tensor], textbook: Callable[[Tensor], Tensor]) -> None:
    x = random(2, 3, 10)
    assert_close(gradients(ours, x), gradients(textbook, x), 1e-12)
    assert torch.autograd.gradcheck(ours, leaves(x))
    kept = x.clone()
    with torch.no_grad():
        assert_close((ours(x),), (textbook(x),), 1e-12)
    assert torch.equal(x, kept), "the input was overwritten"


def test_swiglu_writes_its_gradient_over_what_nobody_needs_any_more() -> None:
    """And says so to whoever does."""
    (x,) = leaves(random(4, 10))
    expected = gradients(textbook_swiglu, 2.0 * random(4, 10))[1] * 2.0
    upstream = random(5, 4, seed=9).t()
    doubled = x * 2.0
    (gradient,) = torch.autograd.grad(swiglu(doubled), x, upstream)
    assert_close((gradient,), (expected,), 1e-12)
    assert torch.equal(x.detach(), random(4, 10))
    doubled = x * 2.0
    loss = (swiglu(doubled) * upstream).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Attention: the blocked CPU form (training) and PyTorch's kernel (no gradient), against the textbook.


def documents(*lengths: int) -> Tensor:
    return torch.cat([torch.full((length,), number) for number, length in enumerate(lengths)])


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()[None, None]


def document_mask(*rows: tuple[int, ...]) -> Tensor:
    ids = torch.stack([documents(*row) for row in rows])
    return causal(ids.shape[1]) & (ids[:, None, :, None] == ids[:, None, None, :])


MASKS = {
    "causal-8": (8, None),
    "causal-7": (7, None),
    "causal-2": (2, None),
    "window": (7, causal(7).triu(-2)),
    "documents": (7, document_mask((3, 4), (1, 6))),
    "one-row-of-documents": (9, document_mask((2, 4, 3))),
}


@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention(case: str, kv_heads: int) -> None:
    length, mask = MASKS[case]
    allowed = causal(length) if mask is None else mask
    inputs = random(2, 4, length, 6), random(2, kv_heads, length, 6, seed=1), random(2, kv_heads, length, 6, seed=2)

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key, value, 0.7, mask, causal=True)

    def textbook(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return textbook_attention(query, key, value, 0.7, allowed)

    expected = gradients(textbook, *inputs)
    assert "_BlockedAttention" in type(ours(*leaves(*inputs)).grad_fn).__name__
    assert_close(gradients(ours, *inputs), expected, 1e-12)
    with torch.no_grad():
        assert_close((ours(*inputs),), expected[:1], 1e-12)
    single = tuple(t.float() for t in inputs)
    fused = gradients(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=0.7, enable_gqa=True), *single
    )
    assert_close(gradients(ours, *single), fused, 2e-6)


PATTERNS = {
    "window-3": ((3,), None),
    "window-1": ((1,), None),
    "documents": ((None,), ((3, 4, 12), (1, 18))),
    "both": ((4,), ((7, 12), (10, 9))),
}


@pytest.mark.parametrize("case", PATTERNS)
@pytest.mark.parametrize("kernel", ["blocked", "fused", "flex"])
def test_patterns_in_every_kernel(case: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows and documents against the textbook; a window wider by one, or one boundary moved, is noticed."""
    (window,), rows = PATTERNS[case]
    monkeypatch.setattr(attention, "MIN_BLOCK", 4)  # so that the window makes blocks shorter than the sequence
    ids = None if rows is None else torch.stack([documents(*row) for row in rows])
    length = 19
    inputs = random(2, 4, length, 16), random(2, 2, length, 16, seed=1), random(2, 2, length, 16, seed=2)
    allowed = causal(length) if window is None else causal(length).triu(1 - window)
    if ids is not None:
        allowed = allowed & (ids[:, None, :, None] == ids[:, None, None, :])

    def ours(pattern: Pattern) -> Callable[..., Tensor]:
        def compute(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend_flex(q, k, v, 0.7, pattern) if kernel == "flex" else attend(q, k, v, 0.7, pattern)

        return compute

    leaking_ids = None if ids is None else torch.where(torch.arange(length) == 7, ids[:, 6:7], ids)
    leaking = Pattern(length, True, window and window + 1, leaking_ids)
    if kernel == "blocked":
        assert_close(
            gradients(ours(Pattern(length, True, window, ids)), *inputs),
            gradients(lambda q, k, v: textbook_attention(q, k, v, 0.7, allowed), *inputs),
            1e-12,
        )
    expected = textbook_attention(*inputs, 0.7, allowed)
    with torch.no_grad():
        tolerance = 1e-6 if kernel == "flex" else 1e-12
        assert_close((ours(Pattern(length, True, window, ids))(*inputs),), (expected,), tolerance)
        assert (ours(leaking)(*inputs) - expected).abs().max() > 0.05


def test_windows_cost_what_they_see() -> None:
    """Scores computed, in multiples of the sequence: about 1.5 windows a query, whatever the length."""
    for length in (2048, 8192):
        scores = sum((end - start) * (end - first) for first, start, end in attention._blocks(length, 256))
        assert 256 <= scores / length <= 400
    assert attention._blocks(2048, None)[-1] == (0, 1536, 2048)


def test_what_backward_keeps() -> None:
    """Of norm -> product -> activation -> product: what each gives and the norm's scale; the textbook keeps more."""
    x, weight = random(512, 128, dtype=torch.float32), random(128, dtype=torch.float32, seed=1)
    up, down = random(512, 128, dtype=torch.float32, seed=2), random(128, 256, dtype=torch.float32, seed=3)

    def kept(norm: Any, linear: Any, activation: Any) -> list[int]:
        inputs = leaves(x, weight, up, down)
        sizes: dict[int, int] = {}
        tensors = []  # so that no address is used twice

        def keep(t: Tensor) -> Tensor:
            tensors.append(t)
            sizes[t.data_ptr()] = t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            linear(activation(linear(norm(inputs[0], inputs[1]), inputs[2])), inputs[3])
        for leaf in inputs:
            sizes.pop(leaf.data_ptr(), None)
        return sorted(sizes.values())

    assert kept(lambda x, w: rms_norm(x, w, EPS), linear, swiglu) == [512, 512 * 128, 512 * 256, 512 * 512]
    assert sum(kept(textbook_rms_norm, F.linear, textbook_swiglu)) > 1.5 * 512 * (128 + 256 + 512)


def test_attention_by_finite_differences() -> None:
    mask = document_mask((2, 3))
    inputs = random(1, 2, 5, 4), random(1, 1, 5, 4, seed=1), random(1, 1, 5, 4, seed=2)
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, 0.5, mask, False), leaves(*inputs))
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, 0.5, None, True), leaves(*inputs))


def test_attention_sees_a_mask_that_is_off_by_one() -> None:
    """The comparison above notices a single position too many."""
    inputs = random(1, 2, 7, 6), random(1, 2, 7, 6, seed=1), random(1, 2, 7, 6, seed=2)
    right, wrong = document_mask((3, 4)), document_mask((4, 3))
    out, *_ = gradients(lambda q, k, v: attend(q, k, v, 0.7, wrong, False), *inputs)
    assert (out - textbook_attention(*inputs, 0.7, right)).abs().max() > 0.1


def test_attention_over_more_keys_than_queries() -> None:
    """Decoding behind a cache, where gradients are off."""
    query, key, value = random(2, 4, 2, 6), random(2, 2, 5, 6, seed=1), random(2, 2, 5, 6, seed=2)
    allowed = torch.ones(2, 5, dtype=torch.bool).tril(3)[None, None]
    with torch.no_grad():
        out = attend(query, key, value, 0.7, allowed, causal=False)
    assert_close((out,), (textbook_attention(query, key, value, 0.7, allowed),), 1e-12)


# bfloat16: not further from the truth than the textbook expression evaluated in bfloat16 is.


def bfloat16_error(function: Callable[..., Tensor], truth: tuple[Tensor, ...], *inputs: Tensor) -> list[float]:
    found = gradients(function, *(t.bfloat16() for t in inputs))
    return [
        ((a.double() - b).pow(2).mean().sqrt() / b.pow(2).mean().sqrt()).item()
        for a, b in zip(found, truth, strict=True)
    ]


def test_bfloat16() -> None:
    x, weight = random(4, 64).bfloat16().double(), random(64, seed=1).bfloat16().double()
    positions = torch.arange(4)
    cos, sin = rotary_table(positions, rotary_config(16, 100.0), 0)
    q, k, v = (random(2, 2, 32, 16, seed=seed).bfloat16().double() for seed in range(3))
    allowed = causal(32)
    cases: list[tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (lambda x, w: rms_norm(x, w, EPS), textbook_rms_norm, (x, weight)),
        (swiglu, textbook_swiglu, (x,)),
        (relu_squared, textbook_relu_squared, (x,)),
        (
            lambda x: rotate(x, cos.to(x.dtype), sin.to(x.dtype)),
            lambda x: textbook_rotate(x.double(), positions, 100.0, 1).to(x.dtype),
            (x.view(1, 4, 4, 16),),
        ),
        (
            lambda q, k, v: attend(q, k, v, 0.25, None, True),
            lambda q, k, v: textbook_attention(q, k, v, 0.25, allowed),
            (q, k, v),
        ),
    ]
    for ours, textbook, inputs in cases:
        truth = gradients(textbook, *inputs)
        yardstick = bfloat16_error(textbook, truth, *inputs)
        for error, theirs in zip(bfloat16_error(ours, truth, *inputs), yardstick, strict=True):
            assert error < max(2 * theirs, 0.004), (ours, error, theirs)
            assert error < 0.02
