"""Muon's orthogonalization and its treatment of stacked matrices."""

import pytest
import torch

from lalia.training.optimizers import Muon, matrix_heights, orthogonalize
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
