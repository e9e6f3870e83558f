"""Determinism: what varies is refused, what we train with is not."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lalia.devices import CUBLAS_WORKSPACE, make_deterministic
from lalia.errors import UserError
from lalia.training.objectives import next_token
from tests.training.conftest import RandomBatches, tiny_model


@pytest.fixture(autouse=True)
def settings_of_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.delenv(CUBLAS_WORKSPACE, raising=False)
    yield
    torch.use_deterministic_algorithms(False)


def test_an_operation_without_a_deterministic_form_is_refused() -> None:
    def write_twice() -> torch.Tensor:
        return torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))

    write_twice()
    make_deterministic()
    with pytest.raises(RuntimeError, match="deterministic"):
        write_twice()


@pytest.mark.parametrize("changes", [{}, {"num_experts": 4, "num_experts_per_token": 2}, {"sliding_window": 4}])
def test_training_works_under_it(changes: dict[str, Any]) -> None:
    make_deterministic()
    model = tiny_model(**changes).train()
    found = next_token(model, RandomBatches().batch(0))[0]
    found.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("asked", "begun", "works"),
    [(None, False, True), (":16:8", True, True), (None, True, False), (":0:0", False, False)],
)
def test_cublas_must_have_fixed_buffers(
    asked: str | None, begun: bool, works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: begun)
    if asked:
        monkeypatch.setenv(CUBLAS_WORKSPACE, asked)
    if works:
        make_deterministic()
        assert os.environ.pop(CUBLAS_WORKSPACE) == (asked or ":4096:8")
    else:
        with pytest.raises(UserError, match=CUBLAS_WORKSPACE):
            make_deterministic()
