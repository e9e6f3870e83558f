"""Experts divided among ranks: losses and gradients are those of one process, and are summed over the right ranks."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard

from lalia.model.experts import MixtureOfExperts
from lalia.model.transformer import Block, Transformer
from lalia.training.objectives import next_token
from lalia.training.parallel.apply import parallelize
from lalia.training.parallel.state import full_state, local, saved_state, whole
from lalia.training.parallel.world import ParallelConfig, World, start
from tests.training.parallel.ranks import run
from tests.training.parallel.test_context import LONG, ROWS, SMALL, Step, difference, rows, step
from tests.training.parallel.training import MIXTURE, make_model, make_optimizer, whole_gradients

FOUR = MIXTURE | LONG | {"num_experts": 4}
"""4 experts, 2 for each token."""
MODELS: dict[str, dict[str, Any]] = {
    "two of four": FOUR,
    "one of two, not gated": FOUR
    | {"num_experts": 2, "num_experts_per_token": 1, "gated": False, "activation": "gelu", "dense_layers": (0,)},
    "all of four": FOUR | {"num_experts_per_token": 4, "normalize_expert_weights": False},
}


ROUTED = FOUR | {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}


def collapse(model: Transformer) -> None:
    """All tokens choose the first two experts, so the second of two ranks has nothing to compute."""
    with torch.no_grad():
        for layer in model.layers:
            assert isinstance(layer, Block) and isinstance(layer.feed_forward, MixtureOfExperts)
            norm = layer.feed_forward_norm
            assert norm.weight is not None and norm.bias is not None
            norm.weight[0], norm.bias[0] = 0.0, 1.0
            layer.feed_forward.router[:, 0] = torch.tensor([9.0, 9.0, -9.0, -9.0])


COLLAPSED = FOUR | {"norm": "layer"}


def _two_ranks() -> dict[str, Any]:
    world = start(ParallelConfig(expert=2))
    results: dict[str, Any] = {name: step(values, rows(True), world) for name, values in MODELS.items()}
    results["recomputed"] = step(FOUR, rows(True), world, recompute=True)
    results["collapsed"] = step(COLLAPSED, rows(True), world, prepare=collapse)
    results["routed"] = step(ROUTED, rows(True), world)
    results["wrong sum"] = _wrong_sum(world)
    results["state"] = _state(world)
    return results


def _wrong_sum(world: World) -> Step:
    """Negative control: the gradients of experts summed over all ranks."""
    model = make_model(FOUR)
    parallelize(model, world)
    loss = next_token(model, rows(True).split(ROWS // 2)[world.rank])[0]
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if name.endswith(("feed_forward.up", "feed_forward.down")):
            assert parameter.grad is not None
            dist.all_reduce(local(parameter.grad))
            gradients[name] = whole(model.config, name, parameter.grad)
    return world.sum(loss.detach()).item(), 0.0, gradients


def _state(world: World) -> dict[str, Any]:
    model = make_model(FOUR)
    parallelize(model, world)
    saved: Any = saved_state(model, [make_optimizer(model)])
    name = "layers.0.feed_forward.up"
    return {
        "whole": full_state(model),
        "placements": [saved[key].placements for key in (f"model.{name}/0", f"optimizer.{name}/1.exp_avg")],
        "shapes": {key: tuple(value.shape) for key, value in saved.items()},
        "held": sum(p.to_local().numel() for key, p in saved.items() if key.startswith(f"model.{name}")),
    }


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    return run(_two_ranks, 2)


def alone(values: dict[str, Any], **how: Any) -> Step:
    return step(values, rows(True), World.alone(), **how)


def test_gradients_are_those_of_one_process(two_ranks: list[dict[str, Any]]) -> None:
    expected = {name: alone(values) for name, values in MODELS.items()}
    for result in two_ranks:
        for name in MODELS:
            assert difference(result[name], expected[name]) < SMALL, name
        assert difference(result["recomputed"], expected["two of four"]) < SMALL


def test_sum_over_all_ranks_is_noticed(two_ranks: list[dict[str, Any]]) -> None:
    """It would add the gradients of different experts."""
    expected = alone(FOUR)
    for result in two_ranks:
        loss, _, gradients = result["wrong sum"]
        assert difference((loss, expected[1], {}), expected) < SMALL
        assert all(difference((loss, expected[1], {name: g}), expected) > 0.1 for name, g in gradients.items())


def test_a_rank_that_nobody_chooses(two_ranks: list[dict[str, Any]]) -> None:
    expected = alone(COLLAPSED, prepare=collapse)
    assert not any(g[2:].any() for name, g in expected[2].items() if name.endswith("feed_forward.up"))
    for result in two_ranks:
        assert difference(result["collapsed"], expected) < SMALL


def test_balance_is_judged_among_the_rows_of_a_rank(two_ranks: list[dict[str, Any]]) -> None:
    """As it is among those of a micro-batch: two ranks are as two micro-batches, not as one batch."""
    parts = rows(True).split(ROWS // 2)
    model = make_model(ROUTED)
    loss = torch.stack([next_token(model, part)[0] for part in parts]).sum()
    loss.backward()
    gradients = whole_gradients(model)
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    for result in two_ranks:
        assert difference(result["routed"], (loss.item(), norm.item(), gradients)) < SMALL
        assert difference(result["routed"], alone(ROUTED)) > 1e-3


def test_state_has_the_names_and_shapes_of_one_process(two_ranks: list[dict[str, Any]]) -> None:
    model = make_model(FOUR)
    for result in two_ranks:
        found = result["state"]
        assert found["placements"] == [(Replicate(), Shard(0))] * 2
        saved = saved_state(model, [make_optimizer(model)])
        assert found["shapes"] == {key: tuple(value.shape) for key, value in saved.items()}
        assert found["held"] == model.get_parameter("layers.0.feed_forward.up").numel() // 2
    for name, weight in two_ranks[0]["state"]["whole"].items():
        assert torch.equal(weight, model.get_parameter(name).detach())


LAYOUTS: dict[str, dict[str, int]] = {
    "expert 4": {"expert": 4},
    "expert 2, replicate 4": {"expert": 2, "replicate": 4},
    "expert 2, shard 2": {"expert": 2, "shard": 2},
    "expert 2, context 2": {"expert": 2, "context": 2},
}


def _four_ranks() -> dict[str, Step]:
    worlds = {name: start(ParallelConfig(**layout)) for name, layout in LAYOUTS.items()}
    return {name: step(FOUR, rows(True), world) for name, world in worlds.items()}


def test_products_with_other_axes() -> None:
    expected = alone(FOUR)
    for result in run(_four_ranks, 4):
        for name in LAYOUTS:
            assert difference(result[name], expected) < SMALL, name
