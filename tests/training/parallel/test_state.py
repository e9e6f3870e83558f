"""Checkpoints of one layout load in any other; whole weights; weights that evaluation gathered."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from lalia.training.parallel.apply import parallelize
from lalia.training.parallel.layout import ParallelConfig
from lalia.training.parallel.state import full_state, is_divided, release, saved_state
from lalia.training.parallel.world import World, start
from tests.training.parallel.ranks import run
from tests.training.parallel.training import MIXTURE, QWEN2, QWEN3, make_batch, make_model, make_optimizer, train

CASES: dict[str, tuple[dict[str, Any], dict[str, int], dict[str, int]]] = {
    "qwen2": (QWEN2, {"shard": 2}, {"tensor": 2}),
    "qwen3": (QWEN3, {"tensor": 2}, {"shard": 2}),
    "mixture": (MIXTURE, {"shard": 2}, {}),
}
"""Model, the layout that saves and the one that loads."""


def _save_and_load(folder: str) -> dict[str, dict[str, Tensor]]:
    """Weights after two steps, of which a checkpoint was saved after the first and loaded in another layout."""
    result = {}
    for name, (values, saving, loading) in CASES.items():
        outcomes = []
        saved: dict[str, Tensor] = {}
        for layout in (saving, loading):
            world = start(ParallelConfig(**layout))
            model = make_model(values)
            parallelize(model, world)
            optimizer = make_optimizer(model)
            if layout is saving:
                train(model, world, steps=1, optimizer=optimizer)
                save(saved_state(model, [optimizer]), checkpoint_id=f"{folder}/{name}")
                saved = {key: value.clone() for key, value in full_state(model).items()}
            else:
                load(saved_state(model, [optimizer]), checkpoint_id=f"{folder}/{name}")
                loaded = full_state(model)
                assert loaded.keys() == saved.keys() == (loaded.keys() if world.is_main else set())
                assert [key for key in saved if not torch.equal(loaded[key], saved[key])] == []
            outcomes.append(train(model, world, steps=1, optimizer=optimizer).weights)
        for key in outcomes[0]:
            torch.testing.assert_close(outcomes[0][key], outcomes[1][key], atol=1e-5, rtol=0)
        result[name] = outcomes[0]
    return result


def test_any_layout_loads_any_other(tmp_path: Path) -> None:
    weights = run(_save_and_load, 2, str(tmp_path))[0]
    for name, (values, _, _) in CASES.items():
        model = make_model(values)
        optimizer = make_optimizer(model)
        load(saved_state(model, [optimizer]), checkpoint_id=tmp_path / name, no_dist=True)
        outcome = train(model, World.alone(), steps=1, optimizer=optimizer)
        for key, expected in weights[name].items():
            torch.testing.assert_close(outcome.weights[key], expected, atol=1e-5, rtol=0)
        unread = make_model(values)
        fresh = train(unread, World.alone(), steps=1)  # negative control
        assert (fresh.weights["embedding.weight"] - weights[name]["embedding.weight"]).abs().max() > 1e-3


def _described(layout: dict[str, int], values: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    model = make_model(values)
    parallelize(model, start(ParallelConfig(**layout)))
    return {key: tuple(value.shape) for key, value in saved_state(model, [make_optimizer(model)]).items()}


def _all_described() -> list[dict[str, tuple[int, ...]]]:
    return [_described(layout, QWEN2) for layout in ({}, {"shard": 2}, {"tensor": 2})]


def test_names_and_shapes_know_no_layout() -> None:
    model = make_model(QWEN2)
    expected = {key: tuple(value.shape) for key, value in saved_state(model, [make_optimizer(model)]).items()}
    assert expected["model.layers.1.attention.qkv.weight/1"] == (16, 32)
    assert expected["optimizer.layers.1.feed_forward.up.weight/0.exp_avg"] == (48, 32)
    assert expected["optimizer.norm.weight.step"] == ()
    for described in run(_all_described, 2)[0]:
        assert described == expected


def test_an_optimizer_without_state_is_no_checkpoint() -> None:
    model = make_model(QWEN3)
    with pytest.raises(AssertionError, match=r"embedding.weight has no state yet"):
        saved_state(model, [torch.optim.AdamW(model.parameters())])


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.logits(model(make_batch(0).tokens))


def _evaluated() -> None:
    model, plain = make_model(QWEN2), make_model(QWEN2)
    parallelize(model, start(ParallelConfig(shard=2)))
    torch.testing.assert_close(_logits(model), _logits(plain))
    assert not is_divided(model.head_weight), "gathered for whoever needs the head"
    release(model)
    assert all(is_divided(p) or p.ndim == 1 for p in model.parameters())
    _logits(model)
    for tensor in saved_state(model, []).values():  # as an average of weights takes their place
        tensor.mul_(0.5)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(0.5)
    torch.testing.assert_close(_logits(model), _logits(plain))


def test_evaluation_gathers_weights_and_lets_them_go() -> None:
    run(_evaluated, 2)
