"""Which optimizer a weight gets, what each does to it, and that none does anything where a step is called off."""

import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lalia.errors import UserError
from lalia.model.transformer import Transformer
from lalia.training.adamw import AdamW, AdamW8bit
from lalia.training.config import OptimizerConfig
from lalia.training.muon import Muon, orthogonalize
from lalia.training.optimizer_base import Optimizer
from lalia.training.optimizers import learning_rates, make_optimizers, matrix_heights, weight_decay
from tests.training.conftest import tiny_model


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 64, 24)])
def test_singular_values_end_near_one_and_vectors_stay(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    result = orthogonalize(matrices, torch.float32)
    singular = torch.linalg.svdvals(result)
    assert singular.min() > 0.6
    assert singular.max() < 1.3
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    nearest = u @ v
    cosine = (result * nearest).sum() / (result.norm() * nearest.norm())
    assert cosine > 0.99


@pytest.mark.parametrize("rank", [1, 20, 256])
def test_gradients_of_a_low_rank_lose_few_digits(rank: int) -> None:
    """As accurate as float32 allows, 1 + c X^T X having a condition of 6e3."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(2, 256, rank, dtype=torch.float64, generator=generator) for _ in range(2))
    matrices = left @ right.mT
    exact = orthogonalize(matrices, torch.float64)
    assert (orthogonalize(matrices, torch.float32) - exact).norm() < 2e-3 * exact.norm()
    singular = torch.linalg.svdvals(exact)
    assert singular[:, :rank].max() < 1.01
    assert singular[:, rank:].sum() < 1e-3


def test_plain_momentum_is_not_orthogonal() -> None:
    """Negative control: without the iteration the singular values spread widely."""
    torch.manual_seed(0)
    singular = torch.linalg.svdvals(torch.randn(1, 32, 32) / 32**0.5)
    assert singular.max() / singular.min() > 10


def test_stacked_matrices_are_updated_as_separate_ones() -> None:
    torch.manual_seed(0)
    grads = [torch.randn(8, 8), torch.randn(4, 8), torch.randn(4, 8)]
    stacked = torch.nn.Parameter(torch.zeros(16, 8))
    stacked.grad = torch.cat(grads)
    Muon([(stacked, (8, 4, 4))], lr=0.1).step()
    separate = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    for parameter, grad in zip(separate, grads, strict=True):
        parameter.grad = grad.clone()
    Muon([(p, (p.shape[0],)) for p in separate], lr=0.1).step()
    torch.testing.assert_close(stacked.detach(), torch.cat([p.detach() for p in separate]), rtol=1e-4, atol=1e-5)


def test_heights_cover_every_matrix_of_the_layers() -> None:
    model = tiny_model(num_key_value_heads=1)
    for parameter, heights in matrix_heights(model):
        assert sum(heights) == parameter.shape[0]
    counted = sum(p.numel() for p, _ in matrix_heights(model))
    assert counted + model.head_weight.numel() == model.config.num_matrix_parameters()


def test_weight_decay_shrinks_weights_without_a_gradient_direction() -> None:
    parameter = torch.nn.Parameter(torch.ones(4, 4))
    parameter.grad = torch.zeros(4, 4)
    Muon([(parameter, (4,))], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(parameter.detach(), torch.full((4, 4), 0.95))


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_every_parameter_has_one_role(kind: str) -> None:
    model = tiny_model(tie_word_embeddings=False)
    groups = [group for optimizer in _optimizers(model, kind) for group in optimizer.param_groups]
    roles = {name: group["role"] for group in groups for name in group["names"]}
    names = dict(model.named_parameters())
    assert sorted(name for group in groups for name in group["names"]) == sorted(names)
    assert all(names[n] is p for group in groups for n, p in zip(group["names"], group["params"], strict=True))
    assert roles["embedding.weight"] == "embedding"
    assert roles["head.weight"] == "head"
    assert roles["layers.1.attention.qkv.weight"] == "matrix"
    assert roles["layers.0.attention.query_norm.weight"] == "scalar"
    tied = [group for optimizer in _optimizers(tiny_model(), kind) for group in optimizer.param_groups]
    assert ("head", ["embedding.weight"]) in [(group["role"], group["names"]) for group in tied]


KINDS = ["muon", "adamw", "adamw8bit"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_called_off_changes_nothing(kind: str) -> None:
    """And the same step that is not called off does (negative control)."""
    model = _wide_model()
    optimizers = _optimizers(model, kind, weight_decay=0.1)
    _step(model, optimizers, seed=1)
    before = _everything(model, optimizers)
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
        p.grad.view(-1)[0] = float("inf")
    for optimizer in optimizers:
        optimizer.step(torch.zeros(()))
    after = _everything(model, optimizers)
    assert before.keys() == after.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    _step(model, optimizers, seed=2, keep=torch.ones(()))
    changed = _everything(model, optimizers)
    assert [key for key in before if torch.equal(before[key], changed[key])] == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_is_kept_is_an_ordinary_one(kind: str) -> None:
    results = []
    for keep in (None, torch.ones(())):
        model = _wide_model()
        optimizers = _optimizers(model, kind)
        for seed in range(3):
            _step(model, optimizers, seed, keep)
        results.append(_everything(model, optimizers))
    assert [key for key, value in results[0].items() if not torch.equal(value, results[1][key])] == []


def test_the_compiler_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would cost every run seconds at its start. PyTorch's own way imports it (negative control)."""
    plain = torch.optim.Optimizer.add_param_group.__wrapped__  # pyright: ignore[reportFunctionMemberAccess]
    monkeypatch.delattr(plain, "__dynamo_disable", raising=False)  # what an earlier test has left
    monkeypatch.setitem(sys.modules, "torch._dynamo", None)
    model = tiny_model()
    _step(model, _optimizers(model, "muon"), seed=0)
    with pytest.raises(ImportError):
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)


def test_adamw_is_that_of_pytorch() -> None:
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4)) for _ in range(2))
    settings = {"lr": 0.05, "betas": (0.8, 0.95), "weight_decay": 0.1}
    optimizer = AdamW([{"params": [ours], **settings}])
    reference = torch.optim.AdamW([theirs], eps=1e-10, foreach=False, **settings)
    for seed in range(5):
        ours.grad = theirs.grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
        optimizer.step(torch.ones(()))
        reference.step()
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-6, atol=1e-6)


def test_moments_of_8_bits_follow_those_of_32() -> None:
    pytest.importorskip("torchao")
    weights, optimizers = [], []
    for kind in (AdamW, AdamW8bit):
        weight = torch.nn.Parameter(torch.zeros(64, 128))
        optimizer = kind([{"params": [weight], "lr": 0.01}])
        for seed in range(20):
            noise = torch.randn(64, 128, generator=torch.Generator().manual_seed(seed))
            weight.grad = (1.0 + 0.5 * noise) * torch.logspace(-6, 0, 128)  # columns of very different sizes
            optimizer.step()
        weights.append(weight.detach())
        optimizers.append(optimizer)
    assert weights[0].abs().min() > 0.05
    assert ((weights[1] - weights[0]).abs()[:, 96:] / 0.2).max() < 0.1  # the large ones
    assert weights[1].abs().max() < 0.5  # no second moment became zero
    sizes = [sum(t.nbytes for t in optimizer.state[p].values()) for optimizer, p in _owners(optimizers)]
    assert sizes[1] < 0.3 * sizes[0]


def _owners(optimizers: Sequence[torch.optim.Optimizer]) -> list[tuple[torch.optim.Optimizer, Tensor]]:
    return [(optimizer, optimizer.param_groups[0]["params"][0]) for optimizer in optimizers]


def test_without_torchao_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UserError, match=r"lalia\[lowbit\]"):
        _optimizers(tiny_model(), "adamw8bit")


def test_rates_follow_the_width() -> None:
    """Which rates move and how: Yang et al. 2022 for AdamW's matrices, one learning rate times decay for all."""
    for kind, factor in (("muon", 1.0), ("adamw", 0.25)):
        settings = OptimizerConfig.parse({"kind": kind, "weight_decay": 0.1})
        narrow, wide = (learning_rates(settings, width) for width in (256, 1024))
        assert {role: wide[role] / narrow[role] for role in narrow} == {
            "matrix": factor,
            "head": 1.0,
            "embedding": 0.5,
            "scalar": 1.0,
        }
        products = [learning_rates(settings, w)["matrix"] * weight_decay(settings, w) for w in (64, 256, 1024)]
        assert products == pytest.approx([products[0]] * 3)


@pytest.mark.parametrize(
    ("kind", "rates", "transfers"),
    [
        ("muon", [0.0125, 0.025, 0.05, 0.1], True),
        ("adamw", [0.002, 0.008, 0.032], True),  # times 64 / width
        ("one rate", [0.004, 0.016], False),  # negative control: AdamW at the same rate for every width
    ],
)
def test_the_best_rate_of_a_narrow_network_is_that_of_a_wide_one(
    kind: str, rates: list[float], transfers: bool
) -> None:
    best = {}
    for width in (32, 128):
        losses = [sum(_loss_of_network(kind, width, rate, seed) for seed in range(4)) for rate in rates]
        best[width] = rates[losses.index(min(losses))]
    assert (best[32] == best[128]) == transfers, best


def _loss_of_network(kind: str, width: int, rate: float, seed: int, steps: int = 60) -> float:
    """Of a network of four matrices that learns sines of its inputs, at the end of linear decay."""
    generator = torch.Generator().manual_seed(seed)
    frequencies, mixture = torch.randn(16, 24, generator=generator) / 2, torch.randn(24, 8, generator=generator) / 5
    shapes = [(width, 16), (width, width), (width, width), (8, width)]
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator) / shape[1] ** 0.5) for shape in shapes]
    if kind == "muon":
        optimizer = Muon([(weight, (weight.shape[0],)) for weight in weights], rate, momentum=0.9)
    else:
        optimizer = AdamW([{"params": weights, "lr": rate * (64 / width if kind == "adamw" else 1.0)}])
    peak, last = optimizer.param_groups[0]["lr"], []
    for step in range(steps):
        x = torch.randn(128, 16, generator=generator)
        hidden = x
        for weight in weights[:-1]:
            hidden = torch.relu(hidden @ weight.T) * 2**0.5
        loss = (hidden @ weights[-1].T - torch.sin(x @ frequencies) @ mixture).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = peak * (1 - step / steps)
        optimizer.step()
        last.append(float(loss.detach()))
    return sum(last[-10:]) / 10


def _wide_model() -> Transformer:
    """With a matrix large enough for moments of 8 bits."""
    return tiny_model(tie_word_embeddings=False, hidden_size=64, num_hidden_layers=1)


def _optimizers(model: Transformer, kind: str, **settings: Any) -> list[Optimizer]:
    if kind == "adamw8bit" and sys.modules.get("torchao", ...) is not None:
        pytest.importorskip("torchao")
    return make_optimizers(model, OptimizerConfig.parse({"kind": kind, **settings}))


def _step(model: Transformer, optimizers: Sequence[Optimizer], seed: int, keep: Tensor | None = None) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    for optimizer in optimizers:
        optimizer.step(keep)


def _everything(model: Transformer, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    result = {name: p.detach().clone() for name, p in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for name, p in zip(group["names"], group["params"], strict=True):
                result |= {f"{name} {key}": value.clone() for key, value in optimizer.state[p].items()}
    return result
