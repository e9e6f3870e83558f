"""Every layout trains as one process does, on batches whose ranks and micro-batches have very different weights."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lalia.errors import UserError
from lalia.model.config import ModelConfig
from lalia.training.objectives import LossModule, Objective, next_token
from lalia.training.parallel import apply, tensor
from lalia.training.parallel.apply import GradientSync, parallelize
from lalia.training.parallel.layout import ParallelConfig, check_model, misfits, resolve
from lalia.training.parallel.world import World, start
from tests.training.parallel import training
from tests.training.parallel.ranks import run
from tests.training.parallel.training import (
    GPT2,
    MIXTURE,
    QWEN2,
    QWEN3,
    alone,
    largest_difference,
    mean_objective,
    together,
)

TOLERANCE = 1e-5
UNTIED = QWEN3 | {"tie_word_embeddings": False, "norm_weight": "offset", "qk_norm": "after_rope"}
MODELS: dict[str, tuple[dict[str, Any], int, torch.dtype]] = {
    "qwen3": (QWEN3, 2, torch.float32),
    "untied": (UNTIED, 1, torch.float32),
    "gpt2": (GPT2, 1, torch.float32),
    "qwen2": (QWEN2, 2, torch.float32),
    "mixture": (MIXTURE, 2, torch.float32),
    "bfloat16": (QWEN3, 1, torch.bfloat16),
}
"""Settings, number of micro-batches, activations."""
LAYOUTS: dict[str, tuple[dict[str, int], list[str]]] = {
    "DDP 2": ({}, ["qwen3", "mixture", "bfloat16"]),
    "FSDP 2": ({"shard": 2}, ["qwen3", "gpt2", "qwen2", "mixture", "bfloat16"]),
    "TP 2": ({"tensor": 2}, ["qwen3", "untied", "gpt2", "qwen2", "bfloat16"]),
    "HSDP 2 x 2": ({"shard": 2}, ["qwen2"]),
    "FSDP 2 x TP 2": ({"shard": 2, "tensor": 2}, ["qwen3"]),
    "DDP 2 x TP 2": ({"tensor": 2}, ["qwen2"]),
}


def _differences(names: list[str]) -> dict[tuple[str, str], float]:
    result = {}
    for name in names:
        layout, models = LAYOUTS[name]
        world = start(ParallelConfig(**layout))
        for model in models:
            result[name, model] = largest_difference(together(*MODELS[model], world), alone(*MODELS[model]))
    return result


def _check(size: int, names: list[str]) -> None:
    for rank, differences in enumerate(run(_differences, size, names)):
        for case, difference in differences.items():
            limit = 3e-2 if case[1] == "bfloat16" else TOLERANCE  # the sums of a rank's bfloat16 parts have 8 bits
            assert difference < limit, (rank, case, difference)


def test_two_ranks_equal_one_process() -> None:
    _check(2, ["DDP 2", "FSDP 2", "TP 2"])


def test_four_ranks_equal_one_process() -> None:
    _check(4, ["HSDP 2 x 2", "FSDP 2 x TP 2", "DDP 2 x TP 2"])


def _broken() -> dict[str, float]:
    """Differences of layouts with one thing wrong."""
    result = {}
    data, shards, heads = (start(ParallelConfig(**LAYOUTS[name][0])) for name in ("DDP 2", "FSDP 2", "TP 2"))
    expected = training.train(training.make_model(QWEN3), World.alone(), 2, steps=1)

    def measure(name: str, world: World, objective: Objective = next_token) -> None:
        model = training.make_model(QWEN3)
        parallelize(model, world)
        if name == "FSDP averages":
            for module in (*model.layers, model):
                module.set_gradient_divide_factor(2.0)  # pyright: ignore[reportCallIssue]
        outcome = training.train(model, world, 2, steps=1, objective=objective)
        result[name] = largest_difference(outcome, expected)

    measure("DDP of means", data, mean_objective)
    measure("FSDP of means", shards, mean_objective)
    measure("FSDP averages", shards)

    summed, calls = apply._sum_bucket, 0

    def averaged(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # pyright: ignore[reportPrivateImportUsage]
        nonlocal calls
        calls += 1
        return summed(state, bucket).then(lambda future: future.value() / 2)

    apply._sum_bucket = averaged
    measure("DDP averages", data)
    result["DDP messages"] = calls
    tensor._OfEveryHead._apply = lambda self, module, device_mesh: module
    measure("heads keep their gradients", heads)
    return result


def test_broken_layouts_differ() -> None:
    """Negative controls of the above."""
    for differences in run(_broken, 2):
        assert differences.pop("DDP messages") == 1, "gradients are sent once a step, not once a micro-batch"
        for name, difference in differences.items():
            assert difference > 10 * TOLERANCE, name


@pytest.mark.parametrize(
    ("model", "layout", "settings", "message"),
    [
        ({"hidden_size": 33}, {"shard": 2}, {}, "shard x context = 2 must divide the model's hidden_size = 33"),
        ({"hidden_size": 34}, {"shard": 2, "context": 2}, {}, "shard x context = 4 must divide .* 34"),
        ({}, {"tensor": 3}, {}, r"4 query heads cannot be divided by parallel.tensor = 3; .* 2 key and value heads"),
        (
            {"intermediate_size": 45},
            {"tensor": 2},
            {},
            r"45 feed-forward units \(intermediate_size\) cannot be divided",
        ),
        (MIXTURE, {"tensor": 2}, {}, "num_experts = 3 are divided by parallel.expert, not by tensor"),
        (MIXTURE, {"replicate": 2, "expert": 2}, {}, "expert = 2 must divide the model's num_experts = 3"),
        ({}, {"replicate": 2, "expert": 2}, {}, "expert = 2 divides experts, but the model has none"),
        ({}, {"shard": 2}, {"optimizer": "adamw8bit"}, "'adamw8bit' takes whole weights"),
        ({}, {"tensor": 2}, {"fp8": True}, "set fp8 = false or parallel.tensor = 1"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(
    model: dict[str, Any], layout: dict[str, int], settings: dict[str, Any], message: str
) -> None:
    shape = ModelConfig.parse(QWEN3 | model)
    with pytest.raises(UserError, match=message):
        check_model(ParallelConfig(**{"replicate": 1, **layout}), shape, **settings)


def test_layouts_that_fit() -> None:
    shape = ModelConfig.parse(QWEN3)
    for layout in ({"shard": 2, "context": 2}, {"tensor": 2}, {"replicate": 3, "context": 3}, {"replicate": 5}):
        assert misfits(ParallelConfig(**{"replicate": 1, **layout}), shape) == []
    assert misfits(ParallelConfig(replicate=2), shape, "adamw8bit", fp8=True) == []


def test_processes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="replicate 1 x shard 3 .* = 3 does not fit the 4 processes"):
        resolve(ParallelConfig(shard=3), 4)
    with pytest.raises(UserError, match="expert = 2 with tensor = 2 is not supported"):
        resolve(ParallelConfig(shard=2, expert=2, tensor=2), 4)


def test_alone_nothing_happens() -> None:
    model = training.make_model(QWEN3)
    parameters = list(model.parameters())
    parallelize(model, World.alone())
    module = LossModule(model, next_token)
    assert GradientSync(module, World.alone()).module is module
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(type(p) is nn.Parameter for p in parameters)
    assert not any(m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())
