"""Activation checkpointing and float8: the same losses and gradients, less memory, clear refusals."""

from typing import Any
from unittest import mock

import pytest
import torch

from lalia.errors import UserError
from lalia.model.transformer import Transformer
from lalia.planning.memory import layer_activations
from lalia.training.activation_checkpointing import _checkpoint, checkpoint_activations
from lalia.training.fp8 import convert_to_fp8
from lalia.training.linear_cross_entropy import linear_cross_entropy
from tests.training.conftest import tiny_model


def wide_model(**settings: Any) -> Transformer:
    """Layers of 128 channels with random weights everywhere."""
    model = tiny_model(hidden_size=128, intermediate_size=256, head_dim=64, **settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.05, generator=generator)
    return model


def step(model: Transformer) -> tuple[float, dict[str, torch.Tensor], int]:
    """Loss, gradients, and bytes of the activations that the forward pass keeps for the backward pass."""
    tokens = torch.randint(0, model.config.vocab_size, (8, 65), generator=torch.Generator().manual_seed(1))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        hidden = model(tokens[:, :-1])
    loss, *_ = linear_cross_entropy(hidden, model.head_weight, tokens[:, 1:].contiguous())
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients, sum(kept.values())


@pytest.mark.parametrize("experts", [False, True])
def test_losses_and_gradients_stay_and_memory_falls(experts: bool) -> None:
    model = wide_model(**({"num_experts": 4, "num_experts_per_token": 2} if experts else {}))
    loss, gradients, most = step(model)
    names = list(model.state_dict())
    memory = [most]
    for mode in ("full",) if experts else ("selective", "full"):
        checkpoint_activations(model, mode)
        same_loss, same_gradients, kept = step(model)
        assert same_loss == loss
        assert same_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert torch.equal(same_gradients[name], gradient), name
        memory.append(kept)
    assert memory == sorted(memory, reverse=True) and memory[-1] < 0.4 * memory[0], memory
    assert list(model.state_dict()) == names
    checkpoint_activations(model, "none")
    assert step(model)[2] == most


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_what_a_layer_keeps_is_what_a_plan_expects(mode: Any) -> None:
    kept = []
    for layers in (2, 4):
        model = wide_model(num_hidden_layers=layers)
        checkpoint_activations(model, mode)
        kept.append(step(model)[2])
    expected, _ = layer_activations(model.config, 64, mode, accelerator=False)
    assert (kept[1] - kept[0]) / (2 * 4 * 8 * 64) == pytest.approx(expected, rel=0.09)  # of 8 rows of 64, 4 bytes each


def test_the_comparison_notices_a_layer_that_computes_something_else_the_second_time() -> None:
    """Negative control: a forward pass that is not the same twice gives other gradients."""
    model = wide_model()
    _, gradients, _ = step(model)
    layer = model.layers[0]
    forward, calls = layer.forward, []

    def changing(x: torch.Tensor, context: Any) -> torch.Tensor:
        calls.append(1)
        return forward(x * (1.0 if len(calls) == 1 else 1.01), context)

    with mock.patch.object(layer, "forward", changing):
        _checkpoint(layer)
        _, changed, _ = step(model)
    assert len(calls) == 2
    assert any(not torch.equal(changed[name], gradient) for name, gradient in gradients.items())


def test_refusals() -> None:
    with pytest.raises(UserError, match="none, selective or full"):
        checkpoint_activations(tiny_model(), "some")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="choose full or none"):
        checkpoint_activations(wide_model(num_experts=4, num_experts_per_token=2), "selective")
    with pytest.raises(UserError, match="on cpu"):
        convert_to_fp8(wide_model())


def test_fp8_rounds_the_products_of_the_layers_and_nothing_else() -> None:
    pytest.importorskip("torchao")
    model = wide_model()
    names = list(model.state_dict())
    loss, gradients, _ = step(model)
    converted = convert_to_fp8(model, emulate=True)
    assert {name.split(".", 2)[2] for name in converted} == {
        "attention.qkv",
        "attention.output",
        "feed_forward.up",
        "feed_forward.down",
    }
    rounded_loss, rounded, _ = step(model)
    assert rounded_loss != loss
    assert rounded_loss == pytest.approx(loss, rel=1e-3)
    for name, gradient in gradients.items():
        error = (rounded[name] - gradient).norm() / gradient.norm()
        assert error < 0.25, (name, error)  # 3 bits of mantissa forward, 2 backward
    assert (rounded["layers.0.attention.qkv.weight"] - gradients["layers.0.attention.qkv.weight"]).norm() > 0
    assert list(model.state_dict()) == names


def test_fp8_needs_layers_that_fit() -> None:
    pytest.importorskip("torchao")
    with pytest.raises(UserError, match="multiples of 16"):
        convert_to_fp8(tiny_model(), emulate=True)
