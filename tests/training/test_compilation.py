"""Compiled layers: what is traced gives the same losses and gradients, once for all layers, and says when it cannot."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters

from lalia.errors import UserError
from lalia.model.transformer import Transformer
from lalia.training.compilation import compile_layers, compiler_failure, find_compiler, uncompiled
from lalia.training.linear_cross_entropy import linear_cross_entropy
from tests.training.conftest import tiny_model

REPOSITORY = Path(__file__).resolve().parents[2]
LENGTH = 64
SHAPES: list[dict[str, Any]] = [
    {},
    {"sliding_window": 24, "activation": "gelu_tanh", "norm_order": "sandwich"},
    {"gated": False, "activation": "relu_squared", "qk_norm": "none"},
]


def wide(**changes: Any) -> Transformer:
    """Wide enough that products take our own function, where it is not compiled."""
    settings = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 4}
    model = tiny_model(**settings | {"max_position_embeddings": LENGTH} | changes).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05, generator=generator)
    return model


def step(model: Transformer, documents: bool, rows: int = 8) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients."""
    tokens = torch.randint(0, model.config.vocab_size, (rows, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    ids = (torch.arange(LENGTH) // 20).expand(rows, -1) if documents else None
    model.zero_grad()
    hidden = model(tokens[:, :-1], document_ids=ids)
    loss, *_ = linear_cross_entropy(hidden, model.head_weight, tokens[:, 1:].contiguous())
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def _forget() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize("documents", [False, True])
def test_what_is_traced_is_what_is_written(changes: dict[str, Any], documents: bool) -> None:
    model = wide(**changes)
    loss, gradients = step(model, documents)
    for layer in model.layers:
        layer.compile(dynamic=False, backend="eager")  # traces, and generates no code
    same_loss, same_gradients = step(model, documents)
    assert graphs() == 1
    assert same_loss == pytest.approx(loss, rel=1e-6)
    for ours, traced in zip(gradients, same_gradients, strict=True):
        torch.testing.assert_close(traced, ours, rtol=1e-4, atol=1e-5 * float(ours.abs().max()))
    other_loss, _ = step(model, not documents)
    assert other_loss != pytest.approx(loss, rel=1e-6)  # a mask that had been left out would not be noticed otherwise


@pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler")
def test_all_layers_share_one_compilation_and_evaluation_has_none() -> None:
    # In a process of its own: the compiler imports setuptools, which does not load where another test has imported the
    # standard library's distutils.
    code = "from tests.training.test_compilation import compile_and_compare; compile_and_compare()"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def compile_and_compare() -> None:
    model = wide()
    loss, gradients = step(model, documents=False)
    compile_layers(model)
    same_loss, same_gradients = step(model, documents=False)
    assert graphs() == 1
    assert same_loss == pytest.approx(loss, rel=1e-5)
    for ours, compiled in zip(gradients, same_gradients, strict=True):
        torch.testing.assert_close(compiled, ours, rtol=1e-3, atol=1e-4 * float(ours.abs().max()))
    with uncompiled(True):
        step(model, documents=False, rows=3)
    assert graphs() == 1


def test_layers_that_fill_the_context_themselves_are_compiled_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lalia.model.transformer.Context.prepare", lambda self: None)
    model = wide()
    for layer in model.layers:
        layer.compile(dynamic=False, backend="eager")
    step(model, documents=False)
    assert graphs() == 2


def test_a_machine_without_a_compiler_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"C\+\+ compiler"):
        compile_layers(wide())


def test_other_errors_are_no_failure_of_the_compiler() -> None:
    assert compiler_failure(RuntimeError("out of memory")) is None
    assert compiler_failure(TorchDynamoException("\n g++ failed\n at line 3")) == "g++ failed"
