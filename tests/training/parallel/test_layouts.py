"""Every layout trains as one process does, on batches whose ranks and micro-batches have very different weights."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lalia.errors import UserError
from lalia.model.config import ModelConfig
from lalia.training.parallel import apply, tensor
from lalia.training.parallel.apply import GradientSync, parallelize
from lalia.training.parallel.world import ParallelConfig, World, resolve, start
from tests.training.parallel import training
from tests.training.parallel.ranks import run
from tests.training.parallel.training import (
    GPT2,
    MIXTURE,
    QWEN2,
    QWEN3,
    LossModule,
    alone,
    largest_difference,
    together,
)

TOLERANCE = 1e-5
UNTIED = QWEN3 | {"tie_word_embeddings": False, "norm_weight": "offset", "qk_norm": "after_rope"}
LAYOUTS: dict[str, dict[str, int]] = {
    "DDP 2": {},
    "FSDP 2": {"shard": 2},
    "TP 2": {"tensor": 2},
    "HSDP 2 x 2": {"shard": 2},
    "FSDP 2 x TP 2": {"shard": 2, "tensor": 2},
    "DDP 2 x TP 2": {"tensor": 2},
}
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "qwen3": (QWEN3, 2),
    "untied": (UNTIED, 1),
    "gpt2": (GPT2, 1),
    "qwen2": (QWEN2, 2),
    "mixture": (MIXTURE, 2),
}
"""Settings and number of micro-batches."""


def _differences(names: list[str], models: list[str]) -> dict[tuple[str, str], float]:
    result = {}
    for name in names:
        world = start(ParallelConfig(**LAYOUTS[name]))
        for model in models:
            values, micro_batches = MODELS[model]
            if model == "mixture" and world.layout.tensor > 1:
                continue
            outcome = together(values, world, micro_batches)
            result[name, model] = largest_difference(outcome, alone(values, micro_batches))
        if world.size == 2:
            outcome, expected = together(QWEN3, world, 1, torch.bfloat16), alone(QWEN3, 1, torch.bfloat16)
            result[name, "bfloat16"] = largest_difference(outcome, expected)
    return result


def _checked(ranks: list[dict[tuple[str, str], float]]) -> None:
    for rank, differences in enumerate(ranks):
        for case, difference in differences.items():
            # The sums of a rank's bfloat16 parts have 8 bits.
            limit = 2e-2 if case[1] == "bfloat16" else TOLERANCE
            assert difference < limit, (rank, case, difference)


def test_two_ranks_equal_one_process() -> None:
    _checked(run(_differences, 2, ["DDP 2", "FSDP 2", "TP 2"], list(MODELS)))


def test_four_ranks_equal_one_process() -> None:
    _checked(run(_differences, 4, ["HSDP 2 x 2", "FSDP 2 x TP 2", "DDP 2 x TP 2"], ["qwen2"]))


def _broken() -> dict[str, float]:
    """Differences of layouts with one thing wrong."""
    result = {}
    data, shards, heads = (start(ParallelConfig(**LAYOUTS[name])) for name in ("DDP 2", "FSDP 2", "TP 2"))
    expected = training.train(training.make_model(QWEN3), World.alone(), 2, steps=1)

    def measure(name: str, world: World, sync: GradientSync | None = None, mean: bool = False) -> None:
        model = training.make_model(QWEN3)
        parallelize(model, world)
        if name == "FSDP averages":
            for module in (*model.layers, model):
                module.set_gradient_divide_factor(2.0)  # pyright: ignore[reportCallIssue]
        outcome = training.train(model, world, 2, steps=1, mean=mean)
        result[name] = largest_difference(outcome, expected)

    measure("DDP of means", data, mean=True)
    measure("FSDP of means", shards, mean=True)
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


def _refused() -> str:
    model = training.make_model(QWEN3 | {"hidden_size": 33})
    with pytest.raises(UserError) as error:
        parallelize(model, start(ParallelConfig(shard=2)))
    return str(error.value)


def test_layouts_that_do_not_fit_are_refused() -> None:
    assert "shard x context = 2 must divide the model's hidden_size = 33" in run(_refused, 2)[0]
    with pytest.raises(UserError, match=r"tensor = 3 .* num_attention_heads = 4 .*; num_key_value_heads = 2 "):
        tensor._check(ModelConfig.parse(QWEN3), 3)
    with pytest.raises(UserError, match="num_experts = 3 are divided by pretrain.parallel.expert"):
        tensor._check(ModelConfig.parse(MIXTURE), 2)
    with pytest.raises(UserError, match="replicate 1 x shard 3 .* = 3 does not fit the 4 processes"):
        resolve(ParallelConfig(shard=3), 4)
    with pytest.raises(UserError, match="expert = 2 with tensor = 2 is not supported"):
        resolve(ParallelConfig(shard=2, expert=2, tensor=2), 4)


def test_alone_nothing_happens() -> None:
    model = training.make_model(QWEN3)
    parameters = list(model.parameters())
    parallelize(model, World.alone())
    module = LossModule(model)
    assert GradientSync(module, World.alone()).module is module
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(type(p) is nn.Parameter for p in parameters)
    assert not any(m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())
