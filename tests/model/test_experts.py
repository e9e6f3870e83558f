"""Mixtures of experts against one loop over rows, soft-capped attention, activations, norms, learned positions."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lalia.model.attention import attend
from lalia.model.config import ModelConfig
from lalia.model.experts import MixtureOfExperts, activate, choose_experts, elementwise, grouped_linear
from lalia.model.transformer import Norm, Transformer

CONFIG = ModelConfig(
    family="mixtral",
    vocab_size=31,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    intermediate_size=24,
    max_position_embeddings=32,
    num_experts=5,
    num_experts_per_token=2,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def experts(**changes: Any) -> MixtureOfExperts:
    module = MixtureOfExperts(CONFIG.model_copy(update=changes))
    for number, weight in enumerate(module.parameters()):
        weight.data.copy_(random(*weight.shape, seed=number) * weight.shape[-1] ** -0.5)
    return module


def row_by_row(module: MixtureOfExperts, x: Tensor, normalize: bool, chosen: int) -> Tensor:
    """Every expert for every row, in the plainest way."""
    out = []
    for row in x.reshape(-1, x.shape[-1]):
        weights = torch.softmax(module.router @ row, -1)
        order = weights.argsort(descending=True)[:chosen]
        total = weights[order].sum() if normalize else 1.0
        y = torch.zeros_like(row)
        for expert in order.tolist():
            gate, up = (module.up[expert] @ row).chunk(2)
            y = y + weights[expert] / total * (module.down[expert] @ (F.silu(gate) * up))
        out.append(y)
    return torch.stack(out).view(x.shape)


@pytest.mark.parametrize(("normalize", "chosen"), [(True, 2), (False, 2), (True, 1), (False, 5)])
def test_experts_equal_a_loop_over_rows(normalize: bool, chosen: int) -> None:
    module = experts(normalize_expert_weights=normalize, num_experts_per_token=chosen)
    x = random(2, 7, 16, seed=9).requires_grad_()
    parameters = [x, *module.parameters()]
    ours, plain = module(x), row_by_row(module, x, normalize, chosen)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    upstream = random(2, 7, 16, seed=10)
    found = torch.autograd.grad(ours, parameters, upstream, allow_unused=True, materialize_grads=True)
    expected = torch.autograd.grad(plain, parameters, upstream, allow_unused=True, materialize_grads=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    other = row_by_row(module, x, not normalize, chosen)
    assert (ours - other).abs().max() > 1e-3 or chosen == 5


def test_an_expert_that_nobody_chooses_has_no_gradient() -> None:
    module, x = experts(), random(3, 16, seed=9).requires_grad_()
    with torch.no_grad():
        module.router[:, 0] = torch.tensor([50.0, 50.0, -50.0, -50.0, -50.0])
        x[:, 0] = 1.0
    module(x).sum().backward()
    assert module.up.grad is not None
    assert module.up.grad[:2].abs().amax((1, 2)).min() > 0 and not module.up.grad[2:].any()


def test_products_in_one_kernel_equal_one_per_expert() -> None:
    """The kernel that CUDA takes, which torch also has for the CPU; an expert without rows has no gradient."""
    rows, weight = random(32, 16).bfloat16().requires_grad_(), random(4, 24, 16, seed=1).requires_grad_()
    upstream, counts = random(32, 24, seed=2).bfloat16(), [10, 0, 15, 7]
    ends = torch.tensor(counts).cumsum(0).int()

    def looped(counts: list[int]) -> Tensor:
        return torch.cat([x @ w.bfloat16().t() for x, w in zip(rows.split(counts), weight, strict=True)])

    ours, expected = grouped_linear(rows, weight, ends), looped(counts)
    torch.testing.assert_close(ours, expected)
    found = torch.autograd.grad(ours, (rows, weight), upstream)
    for a, b in zip(found, torch.autograd.grad(expected, (rows, weight), upstream), strict=True):
        torch.testing.assert_close(a, b)
    assert not found[1][1].any() and (ours - looped([11, 0, 14, 7])).abs().max() > 0.1


def test_the_router_computes_in_float32_under_bfloat16() -> None:
    module, logits = experts(), []
    x = random(40, 16, seed=3).bfloat16()
    out = module(x, logits)
    assert out.dtype == torch.bfloat16 and logits[0].dtype == torch.float32
    assert torch.equal(logits[0], x.float() @ module.router.t())
    low = (x @ module.router.bfloat16().t()).float()
    assert (logits[0] - low).abs().max() > 1e-3, "the control: bfloat16 logits differ"
    assert choose_experts(low.bfloat16(), 2, True)[0].dtype == torch.float32


def test_logits_of_the_layers_with_experts_are_collected() -> None:
    config = CONFIG.model_copy(update={"num_hidden_layers": 3, "dense_layers": (1,)})
    model = Transformer(config)
    for number, weight in enumerate(model.parameters()):
        weight.data.copy_(0.3 * random(*weight.shape, seed=number))
    logits: list[Tensor] = []
    model(torch.zeros(2, 6, dtype=torch.int64), router_logits=logits)
    assert [tuple(x.shape) for x in logits] == [(12, 5), (12, 5)]


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_softcapped_attention(kv_heads: int) -> None:
    """Values and gradients against the formula in double precision; the cap comes before the mask."""
    query, key, value = random(2, 2, 5, 4), 4 * random(2, kv_heads, 5, 4, seed=1), random(2, kv_heads, 5, 4, seed=2)
    inputs = [t.double().requires_grad_() for t in (query, key, value)]
    window = torch.ones(5, 5, dtype=torch.bool).tril().triu(-2)
    for mask in (None, window[None, None]):
        allowed = torch.ones(5, 5, dtype=torch.bool).tril() if mask is None else mask
        q, k, v = inputs
        k, v = (t.repeat_interleave(2 // kv_heads, 1) for t in (k, v))
        scores = 3.0 * torch.tanh(q @ k.transpose(2, 3) * 0.7 / 3.0)
        expected = scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ v
        ours = attend(inputs[0], inputs[1], inputs[2], 0.7, mask, True, softcap=3.0)
        # The softmax is float32 by design, whatever the inputs.
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
        upstream = random(2, 2, 5, 4, seed=5).double()
        for a, b in zip(
            torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        uncapped = attend(inputs[0], inputs[1], inputs[2], 0.7, mask, True)
        assert (ours - uncapped).abs().max() > 0.01


FORMULAS = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "relu_squared": lambda x: torch.where(x > 0, x * x, torch.zeros_like(x)),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("gated", [True, False])
def test_activations(name: str, gated: bool) -> None:
    x = (3 * random(4, 10)).double().requires_grad_()

    def textbook(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return FORMULAS[name](gate) * up if gated else FORMULAS[name](x)

    ours, expected = activate(x, name, gated), textbook(x)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    a, b = (torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, expected))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    for other in FORMULAS.keys() - {name}:
        assert (elementwise(x, name) - FORMULAS[other](x)).abs().max() > 1e-4


@pytest.mark.parametrize(("kind", "weight"), [("rms", "plain"), ("rms", "offset"), ("rms", "none"), ("layer", "plain")])
def test_norms(kind: Any, weight: Any) -> None:
    norm = Norm(16, CONFIG.model_copy(update={"norm": kind, "norm_weight": weight, "norm_eps": 0.1}))
    for number, parameter in enumerate(norm.parameters()):
        parameter.data.copy_(random(16, seed=number))
    x = 0.5 * random(3, 16, seed=4) + 0.3
    centred = x - x.mean(-1, keepdim=True) if kind == "layer" else x
    expected = centred / (centred.square().mean(-1, keepdim=True) + 0.1).sqrt()
    if norm.weight is not None:
        expected = expected * (norm.weight + (1.0 if weight == "offset" else 0.0))
    if norm.bias is not None:
        expected = expected + norm.bias
    torch.testing.assert_close(norm(x), expected, rtol=1e-5, atol=1e-6)
    assert (norm.weight is None, norm.bias is None) == (weight == "none", kind == "rms")


def learned(causal: bool = True) -> Transformer:
    switches = {"positions": "learned", "norm": "layer", "num_experts": 0, "causal": causal, "type_vocab_size": 2}
    model = Transformer(CONFIG.model_copy(update=switches))
    for number, weight in enumerate(model.parameters()):
        weight.data.copy_(0.3 * random(*weight.shape, seed=number))
    return model.eval()


def test_learned_positions_and_segments_are_added_to_the_embedding() -> None:
    model, tokens = learned(), torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = model(tokens)
        moved = model(tokens, positions=torch.arange(9) + 3)
        assert (plain - moved).abs().max() > 1e-2
        # A table whose rows were moved likewise gives the same back.
        model.position_embedding.weight.copy_(model.position_embedding.weight.roll(-3, 0))
        torch.testing.assert_close(model(tokens), moved)
        typed = model(tokens, token_types=torch.ones_like(tokens))
        assert (typed - moved).abs().max() > 1e-2
        model.type_embedding.weight.copy_(model.type_embedding.weight.flip(0))
        torch.testing.assert_close(model(tokens), typed)


@pytest.mark.parametrize("causal", [True, False])
def test_padding_changes_nothing(causal: bool) -> None:
    """As a document of its own, on either side; in an encoder tokens see those behind them, but no padding."""
    model, tokens = learned(causal), torch.randint(0, 31, (1, 9), generator=torch.Generator().manual_seed(1))
    padding = torch.full((1, 4), 7)
    with torch.no_grad():
        alone = model(tokens)
        for side in ("left", "right"):
            parts = (padding, tokens) if side == "left" else (tokens, padding)
            own = (torch.full((1, 4), -1), torch.zeros(1, 9, dtype=torch.int64))
            ids = torch.cat(own if side == "left" else own[::-1], 1)
            place = slice(4, None) if side == "left" else slice(0, 9)
            positions = (ids == 0).long().cumsum(1).sub(1).clamp_min(0)
            padded = model(torch.cat(parts, 1), positions=positions, document_ids=ids)[:, place]
            torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-5)
            seen = model(torch.cat(parts, 1), positions=positions)[:, place]
            hidden_by_order = causal and side == "right"
            assert ((seen - alone).abs().max() < 1e-5) == hidden_by_order
