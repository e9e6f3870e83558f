"""The chunked loss and bits per byte against what they replace."""

import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from lalia.training import linear_cross_entropy as module
from lalia.training.bits_per_byte import bits_per_byte
from lalia.training.linear_cross_entropy import linear_cross_entropy
from tests.training.conftest import tiny_model


def reference(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float) -> torch.Tensor:
    logits = hidden @ weight.t()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("chunk", [3, 512])
def test_loss_and_gradients_equal_the_plain_ones(softcap: float, chunk: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(4, 10, 16, requires_grad=True)
    weight = torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(0, 50, (4, 10))
    targets[1, 3:] = -100
    expected = reference(hidden, weight, targets, softcap)
    expected_grads = torch.autograd.grad(expected * 0.5, (hidden, weight))
    with mock.patch.object(module, "CHUNK_ROWS", chunk):
        loss, _, count = linear_cross_entropy(hidden, weight, targets, softcap)
        grads = torch.autograd.grad(loss * 0.5, (hidden, weight))
        with torch.no_grad():
            without_grad, *_ = linear_cross_entropy(hidden, weight, targets, softcap)
    assert count == 33
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(without_grad, expected, rtol=1e-6, atol=1e-5)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_nothing_to_predict_gives_zero() -> None:
    hidden, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss, _, count = linear_cross_entropy(hidden, weight, torch.full((2, 3), -100))
    loss.backward()
    assert (float(loss.detach()), count) == (0.0, 0)
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_uniform_byte_model_scores_exactly_eight_bits() -> None:
    model = tiny_model(vocab_size=256)
    with torch.no_grad():
        model.embedding.weight.zero_()
    document = ([0, *range(200)], 200)  # an opening mark, then one token per byte
    assert bits_per_byte(model, [document], window=16) == pytest.approx(8.0, abs=1e-5)


@pytest.mark.parametrize("stride", [None, 8, 3, 1])
def test_every_token_is_scored_once_whatever_the_stride(stride: int | None) -> None:
    """With attention to oneself only, context cannot matter, so every stride must give the same sum."""
    model = tiny_model()
    for layer in model.layers:
        torch.nn.init.zeros_(layer.attention.output.weight)  # type: ignore[union-attr]
    torch.manual_seed(1)
    ids = torch.randint(0, 61, (77,)).tolist()
    with torch.no_grad():
        hidden = model(torch.tensor([ids[:-1]]))
        nats = float(reference(hidden, model.head_weight, torch.tensor([ids[1:]]), 0.0))
    score = bits_per_byte(model, [(ids, 100)], window=16, stride=stride, rows=3)
    assert score == pytest.approx(nats / math.log(2) / 100, rel=1e-5)


def test_context_helps_so_smaller_strides_never_lose_it() -> None:
    """Negative control for the test above: with attention on, the score does depend on the stride."""
    torch.manual_seed(0)
    model = tiny_model()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(0, 61, (77,)).tolist()
    scores = {stride: bits_per_byte(model, [(ids, 100)], window=16, stride=stride) for stride in (16, 4)}
    assert abs(scores[16] - scores[4]) > 1e-3


def test_no_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one byte"):
        bits_per_byte(tiny_model(), [], window=16)


def test_bits_per_byte_goes_through_the_whole_head() -> None:
    """A head bias that makes one token certain, on top of logits that are all alike."""
    model = tiny_model(vocab_size=256, head_bias=True, tie_word_embeddings=False)
    with torch.no_grad():
        assert model.head is not None and model.head_bias is not None
        model.head.weight.zero_()
        model.head_bias.zero_()
        model.head_bias[7] = 100.0
    assert bits_per_byte(model, [([0] + [7] * 20, 20)], window=8) == pytest.approx(0.0, abs=1e-5)
