"""The next-token loss of every kind of head, and what experts add to it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from lalia.data.loader import IGNORED, PADDING, Batch
from lalia.model.transformer import Transformer
from lalia.training.objectives import load_balancing_loss, next_token, router_loss, router_z_loss
from tests.training.conftest import RandomBatches, make_trainer, tiny_model

EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_token": 2, "expert_size": 32}


def random_logits(rows: int, experts: int, seed: int) -> torch.Tensor:
    return 2 * torch.randn(rows, experts, generator=torch.Generator().manual_seed(seed))


def padded_batch() -> Batch:
    """The second row ends with padding."""
    batch = RandomBatches(masked=0.0).batch(0)
    batch.document_ids[1, 9:] = PADDING
    batch.targets[1, 8:] = IGNORED
    return batch


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_bias": True, "tie_word_embeddings": False},
        {"output_multiplier": 3**-0.5},
        {"head_bias": True, "output_multiplier": 0.7, "logit_softcap": 2.0},
        {"head_transform": True, "activation": "gelu", "head_bias": True},
    ],
    ids=str,
)
def test_the_loss_is_that_of_the_models_logits(changes: dict[str, Any]) -> None:
    model = tiny_model(**changes)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    batch = padded_batch()
    logits = model.logits(model(batch.tokens))
    expected = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")
    loss, weight, _ = next_token(model, batch)
    assert weight == int((batch.targets != IGNORED).sum())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for ours, theirs in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("experts", "chosen"), [(4, 2), (8, 1), (8, 3)])
def test_load_balancing_loss_is_that_of_transformers(experts: int, chosen: int) -> None:
    mask = torch.ones(3, 20)
    mask[1, 13:] = 0
    for seed in range(3):
        logits = random_logits(60, experts, seed)
        kept = mask.reshape(-1, 1)
        theirs: Any = load_balancing_loss_func((logits,), experts, chosen, mask)
        assert load_balancing_loss(logits, chosen, kept).item() == pytest.approx(theirs.item(), abs=1e-6)
        unmasked: Any = load_balancing_loss_func((logits,), experts, chosen)
        assert load_balancing_loss(logits, chosen, torch.ones(60, 1)).item() == pytest.approx(unmasked.item(), abs=1e-6)
        assert abs(theirs.item() - unmasked.item()) > 1e-4, "padding counts"


def test_load_balancing_loss_at_its_ends() -> None:
    balanced = torch.eye(4).repeat(3, 1) * 1e-4
    assert load_balancing_loss(balanced, 1, torch.ones(12, 1)).item() == pytest.approx(1.0, abs=1e-4)
    collapsed = torch.tensor([[20.0, 0.0, 0.0, 0.0]]).repeat(8, 1)
    assert load_balancing_loss(collapsed, 1, torch.ones(8, 1)).item() == pytest.approx(4.0, abs=1e-4)
    assert load_balancing_loss(torch.zeros(3, 4), 2, torch.zeros(3, 1)).item() == 0.0
    assert router_z_loss(torch.zeros(3, 4), torch.zeros(3, 1)).item() == 0.0


def test_layers_are_judged_one_by_one() -> None:
    """Two layers that collapse onto different experts are not balanced; counted together they would seem to be."""
    model = tiny_model(**EXPERTS | {"num_experts": 2, "num_experts_per_token": 1, "router_aux_loss_coef": 1.0})
    layers: Any = [torch.tensor([[20.0, 0.0]]).repeat(6, 1), torch.tensor([[0.0, 20.0]]).repeat(6, 1)]
    kept = torch.ones(2, 3, dtype=torch.bool)
    assert router_loss(model, layers, kept).item() == pytest.approx(2.0, abs=1e-4)
    together: Any = load_balancing_loss_func(tuple(layers), 2, 1)
    assert together.item() == pytest.approx(1.0, abs=1e-4)


def test_z_loss_is_the_mean_squared_log_partition() -> None:
    logits = random_logits(30, 4, 0).requires_grad_()
    expected = torch.log(logits.exp().sum(-1)).pow(2).mean()
    assert router_z_loss(logits, torch.ones(30, 1)).item() == pytest.approx(expected.item(), rel=1e-6)
    ours, theirs = (
        torch.autograd.grad(loss, logits)[0] for loss in (router_z_loss(logits, torch.ones(30, 1)), expected)
    )
    torch.testing.assert_close(ours, theirs)


def test_router_losses_join_in_training_only() -> None:
    batch = padded_batch()
    plain = tiny_model(**EXPERTS, router_aux_loss_coef=0.0)
    routed = tiny_model(**EXPERTS, router_aux_loss_coef=0.5, router_z_loss_coef=0.25)
    routed.load_state_dict(plain.state_dict())
    logits: list[torch.Tensor] = []
    plain(batch.tokens, router_logits=logits)
    kept = (batch.document_ids != PADDING).reshape(-1)
    ones = torch.ones(int(kept.sum()), 1)  # padding taken out, not weighted
    added = sum(0.5 * load_balancing_loss(x[kept], 2, ones) + 0.25 * router_z_loss(x[kept], ones) for x in logits) / 2
    added = float(torch.as_tensor(added).detach())
    base, weight, _ = next_token(plain.train(), batch)
    loss, same_weight, _ = next_token(routed.train(), batch)
    assert weight == same_weight
    assert loss.item() == pytest.approx(base.item() + int(weight) * added, rel=1e-6)
    assert next_token(routed.eval(), batch)[0].item() == pytest.approx(base.item(), rel=1e-6)
    loss.backward()
    assert all(layer.feed_forward.router.grad.abs().max() > 0 for layer in routed.layers)  # pyright: ignore


def test_micro_batches_give_the_weighted_mean_of_their_router_losses() -> None:
    model, batch = tiny_model(**EXPERTS, router_aux_loss_coef=1.0).train(), padded_batch()
    parts = [next_token(model, part) for part in batch.split(2)]
    plain = [next_token(model.eval(), part)[0].item() for part in batch.split(2)]
    weights = [int(weight) for _, weight, _ in parts]
    router = [(loss.item() - base) / w for (loss, *_), base, w in zip(parts, plain, weights, strict=True)]
    combined = sum(loss.item() for loss, *_ in parts) / sum(weights)
    base = sum(plain) / sum(weights)
    mean = sum(value * weight for value, weight in zip(router, weights, strict=True)) / sum(weights)
    assert combined == pytest.approx(base + mean, rel=1e-6)
    assert all(1.9 < value < 4.0 for value in router)


class FewBatches:
    """The same four batches over and over, to be learnt by heart."""

    def batch(self, step: int) -> Batch:
        return RandomBatches(rows=8, length=16, masked=0.0).batch(step % 4)


def expert_shares(model: Transformer) -> torch.Tensor:
    """(layers, experts) share of the choices, which is 1 / num_experts where routing is even."""
    logits: list[torch.Tensor] = []
    with torch.no_grad():
        model(FewBatches().batch(0).tokens, router_logits=logits)
    counts = [torch.bincount(x.topk(1, -1).indices.flatten(), minlength=x.shape[1]) / len(x) for x in logits]
    return torch.stack(counts)


def test_a_small_mixture_trains_and_uses_all_its_experts(tmp_path: Path) -> None:
    """60 steps of the real Trainer; without the balancing loss the same steps end less balanced."""
    shares, losses = {}, {}
    for coefficient in (0.5, 0.0):
        folder = tmp_path / str(coefficient)
        folder.mkdir()
        model = tiny_model(
            **EXPERTS | {"num_experts_per_token": 1}, router_aux_loss_coef=coefficient, router_z_loss_coef=0.001
        )
        first = next_token(model.eval(), FewBatches().batch(0))
        make_trainer(folder, 60, model=model, batches=FewBatches()).train()
        last = next_token(model.eval(), FewBatches().batch(0))
        losses[coefficient] = (first[0].item() / first[1], last[0].item() / last[1])
        shares[coefficient] = expert_shares(model)
    print(losses, shares, sep="\n")
    for before, after in losses.values():
        assert after < 0.8 * before
    assert shares[0.5].min() > 0.1
    assert shares[0.0].std() > 1.5 * shares[0.5].std()
