"""Rows divided among ranks: losses and gradients are those of one process, whatever rows, layers and layout."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lalia.data.loader import IGNORED, PADDING, Batch
from lalia.errors import UserError
from lalia.model.attention import Pattern, attend, attend_flex
from lalia.model.transformer import Transformer
from lalia.training.objectives import LossModule, next_token, router_loss
from lalia.training.parallel.apply import GradientSync, gradient_norm, parallelize
from lalia.training.parallel.context import shard_batch
from lalia.training.parallel.world import ParallelConfig, World, start
from tests.training.parallel.ranks import run
from tests.training.parallel.training import GPT2, MIXTURE, QWEN3, VOCAB, make_model, whole_gradients

ROWS, LENGTH = 4, 24
LONG: dict[str, Any] = {"max_position_embeddings": LENGTH}
MODELS: dict[str, dict[str, Any]] = {
    "grouped heads, norm before": QWEN3 | LONG,
    "norm after": QWEN3 | LONG | {"qk_norm": "after_rope", "norm_order": "parallel"},
    "windows": QWEN3
    | LONG
    | {"num_hidden_layers": 3, "sliding_window": 5}
    | {"layer_types": ("sliding_attention", "full_attention", "sliding_attention"), "rope_theta_local": 100.0},
    "window of one": QWEN3 | LONG | {"sliding_window": 1},
    "learned positions": GPT2 | LONG,
    "soft-capped": QWEN3 | LONG | {"attention_softcap": 2.0},
    "encoder": QWEN3 | LONG | {"causal": False},
}
SMALL = 1e-5


def rows(packed: bool) -> Batch:
    """Rows of one document, or of several that end anywhere, the last row of short ones and padding."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=generator)
    targets = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=generator)
    targets[torch.rand(ROWS, LENGTH, generator=generator) < 0.3] = IGNORED
    lengths = [[LENGTH]] * ROWS
    if packed:
        lengths = [[7, 17], [LENGTH], [1, 11, 5, 7], [2, 3, 6]]
    ids, positions = torch.full((ROWS, LENGTH), PADDING, dtype=torch.int32), torch.zeros(ROWS, LENGTH).long()
    for row, pieces in enumerate(lengths):
        begin = 0
        for number, length in enumerate(pieces):
            ids[row, begin : begin + length] = number
            positions[row, begin : begin + length] = torch.arange(length)
            begin += length
    targets[ids == PADDING] = IGNORED
    return Batch(tokens, targets, ids, positions, not packed, int((targets != IGNORED).sum()), None)


def leaky(batch: Batch) -> Batch:
    """Negative control: every token sees the documents before its own."""
    return replace(batch, document_ids=torch.zeros_like(batch.document_ids))


def misplaced(batch: Batch) -> Batch:
    """Negative control: the ranks of two have the positions of neighbouring chunks, not of those they took."""
    first, second, third, fourth = batch.positions.chunk(4, 1)
    return replace(batch, positions=torch.cat((first, third, fourth, second), 1))


Step = tuple[float, float, dict[str, Tensor]]
"""Loss sum, gradient norm, and gradients as in one process."""


def step(
    values: dict[str, Any],
    batch: Batch,
    world: World,
    change: Callable[[Batch], Batch] | None = None,
    recompute: bool = False,
    prepare: Callable[[Transformer], None] | None = None,
) -> Step:
    """One forward and backward pass in a layout.

    Args:
        change: of a rank's batch.
        recompute: the layers' activations in backward.
        prepare: changes the weights.
    """
    model = make_model(values)
    if prepare:
        prepare(model)
    parallelize(model, world)
    if recompute:
        for layer in model.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    sync = GradientSync(LossModule(model, next_token), world)
    mine = shard_batch(batch.split(ROWS // world.data_size)[world.data_rank], world)
    assert mine.tokens.shape[1] == LENGTH // world.layout.context
    with sync(last=True):
        loss, weight, _ = sync.module(change(mine) if change else mine)
        loss.backward()
    assert world.sum(weight) == batch.num_targets
    total = world.sum(loss.detach())
    return total.item(), gradient_norm(model, world).item(), whole_gradients(model)


def difference(actual: Step, expected: Step) -> float:
    """Largest, relative to the largest value of each."""
    pairs = [(torch.tensor(a), torch.tensor(b)) for a, b in zip(actual[:2], expected[:2], strict=True)]
    pairs += [(gradient, expected[2][name]) for name, gradient in actual[2].items()]
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-3)) for a, b in pairs)


def _two_ranks() -> dict[str, Any]:
    world = start(ParallelConfig(context=2))
    results: dict[str, Any] = {}
    for packed in (False, True):
        for name, values in MODELS.items():
            results[f"{name}, packed {packed}"] = step(values, rows(packed), world)
    values = MODELS["windows"]
    results["recomputed"] = step(values, rows(True), world, recompute=True)
    results["leaky"] = step(values, rows(True), world, leaky)
    results["misplaced"] = step(values, rows(True), world, misplaced)
    model = make_model(values)
    parallelize(model, world)
    with torch.no_grad():
        results["not divided"] = next_token(model.eval(), rows(True))[0].item() if world.rank else None
        results["divided"] = world.sum(next_token(model, shard_batch(rows(True), world))[0]).item()
    results["router"] = _router(world)
    return results


def _router(world: World) -> float:
    model = make_model(ROUTED)
    parallelize(model, world)
    with torch.no_grad():
        return world.sum(next_token(model.train(), shard_batch(rows(True), world))[0]).item()


ROUTED = MIXTURE | LONG | {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    return run(_two_ranks, 2)


def alone(values: dict[str, Any], packed: bool) -> Step:
    return step(values, rows(packed), World.alone())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_whole_rows(two_ranks: list[dict[str, Any]], name: str, packed: bool) -> None:
    for result in two_ranks:
        assert difference(result[f"{name}, packed {packed}"], alone(MODELS[name], packed)) < SMALL


def test_controls_are_noticed(two_ranks: list[dict[str, Any]]) -> None:
    expected = alone(MODELS["windows"], True)
    for result in two_ranks:
        assert difference(result["recomputed"], expected) < SMALL
        assert difference(result["leaky"], expected) > 1e-3
        assert difference(result["misplaced"], expected) > 1e-3


def test_evaluation_of_whole_and_of_divided_rows(two_ranks: list[dict[str, Any]]) -> None:
    """Whole rows need no other rank: here only the second evaluates them."""
    expected = alone(MODELS["windows"], True)[0]
    assert two_ranks[0]["not divided"] is None
    assert two_ranks[1]["not divided"] == pytest.approx(expected, rel=1e-6)
    assert two_ranks[0]["divided"] == two_ranks[1]["divided"] == pytest.approx(expected, rel=1e-6)


def test_balance_is_judged_among_the_tokens_of_a_rank(two_ranks: list[dict[str, Any]]) -> None:
    """Router losses are those of each rank's tokens, weighted by its targets, not those of whole rows."""
    model, batch, ranks = make_model(ROUTED), rows(True), 2
    logits: list[Tensor] = []
    with torch.no_grad():
        model(batch.tokens, batch.positions, batch.document_ids, router_logits=logits)
        base = next_token(model.eval(), batch)[0].item()
        expected = base
        for rank in range(ranks):
            part = shard_batch(batch, world_of(rank, ranks))
            own = columns(rank, ranks)
            of_rank = [x.view(ROWS, LENGTH, -1)[:, own].flatten(0, 1) for x in logits]
            expected += part.num_targets * router_loss(model, of_rank, part.document_ids != PADDING).item()
        whole = base + batch.num_targets * router_loss(model, logits, batch.document_ids != PADDING).item()
    for result in two_ranks:
        assert result["router"] == pytest.approx(expected, rel=1e-6)
    assert abs(whole - expected) > 1e-3 * expected


LAYOUTS: dict[str, dict[str, int]] = {
    "context 4": {"context": 4},
    "context 2, replicate 2": {"context": 2, "replicate": 2},
    "context 2, shard 2": {"context": 2, "shard": 2},
    "context 2, tensor 2": {"context": 2, "tensor": 2},
}


def _four_ranks() -> dict[str, Step]:
    worlds = {name: start(ParallelConfig(**layout)) for name, layout in LAYOUTS.items()}
    return {name: step(MODELS["windows"], rows(True), world) for name, world in worlds.items()}


def test_products_with_other_axes() -> None:
    expected = alone(MODELS["windows"], True)
    for result in run(_four_ranks, 4):
        for name in LAYOUTS:
            assert difference(result[name], expected) < SMALL, name


def world_of(rank: int, ranks: int) -> World:
    return World(ParallelConfig(replicate=1, context=ranks), torch.device("cpu"), rank, ranks)


def columns(rank: int, ranks: int) -> list[int]:
    """Of its rows, the columns that a rank takes."""
    numbered = replace(rows(False), tokens=torch.arange(LENGTH).expand(ROWS, -1))
    return shard_batch(numbered, world_of(rank, ranks)).tokens[0].tolist()


def test_a_chunk_attends_as_it_does_in_its_row() -> None:
    """By a mask as by FlexAttention, which skips what lies outside."""
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(ROWS, 2, LENGTH, 16, generator=generator) for _ in range(3))
    ids, queries, keys = rows(True).document_ids, (12, 18), (8, 18)
    whole = Pattern(LENGTH, True, 5, ids)
    pattern = Pattern(LENGTH, True, 5, ids, queries=queries, keys=keys)
    assert torch.equal(pattern.dense, whole.dense[:, :, slice(*queries), slice(*keys)])
    expected = attend(query, key, value, 0.25, whole)[:, :, slice(*queries)]
    chunk = (query[:, :, slice(*queries)], key[:, :, slice(*keys)], value[:, :, slice(*keys)])
    torch.testing.assert_close(attend(*chunk, 0.25, pattern), expected)
    torch.testing.assert_close(attend_flex(*chunk, 0.25, pattern), expected)
    moved = Pattern(LENGTH, True, 5, ids, queries=(11, 17), keys=keys)
    assert (attend_flex(*chunk, 0.25, moved) - expected).abs().max() > 0.01


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_all_ranks_have_the_same_work(ranks: int) -> None:
    taken = [columns(rank, ranks) for rank in range(ranks)]
    assert sorted(itertools.chain.from_iterable(taken)) == list(range(LENGTH))
    assert len({sum(own) for own in taken}) == 1  # a token sees the keys up to its own column


def test_a_part_counts_its_own_targets() -> None:
    parts = [shard_batch(rows(True), world_of(rank, 3)) for rank in range(3)]
    assert [part.num_targets for part in parts] == [int((part.targets != IGNORED).sum()) for part in parts]
    assert sum(part.num_targets for part in parts) == rows(True).num_targets
    assert not any(part.single_document for part in parts)
    assert shard_batch(rows(True), World.alone()).num_targets == rows(True).num_targets


def test_rows_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match=r"sequence_length = 24 must be a multiple of 2 x .*context = 10.* 20 would do"):
        shard_batch(rows(False), world_of(0, 5))


def test_a_divided_batch_needs_a_divided_model() -> None:
    """Not silently something else: the positions do not fit the tokens."""
    part = shard_batch(rows(True), world_of(0, 2))
    with pytest.raises(RuntimeError):
        Transformer.forward(make_model(QWEN3 | LONG), part.tokens, part.positions, part.document_ids)
