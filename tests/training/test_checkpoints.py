"""Checkpoints of one process: what is loaded is what was saved, older ones go, and torch's own reader agrees."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from lalia.errors import CorruptFile, UserError
from lalia.progress import Progress
from lalia.training import checkpoints as module
from lalia.training.checkpoint_files import KINDS, write_part_file
from lalia.training.checkpoints import Checkpoints, read_model
from lalia.training.config import OptimizerConfig
from lalia.training.optimizers import make_optimizers
from lalia.training.parallel.state import saved_state
from lalia.training.parallel.world import World
from tests.training.conftest import tiny_model


class Said(Progress):
    """A progress that remembers its lines."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def make(folder: Path, run: str = "run", **changes: Any) -> Checkpoints:
    return Checkpoints(folder, run, World.alone(), Said(), **changes)


def saved(folder: Path, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    checkpoints = make(folder)
    checkpoints.save(step, tensors, meta)
    checkpoints.wait()


def state(seed: int = 0) -> dict[str, Tensor]:
    """Tensors of every kind: matrices, views, scalars, nothing at all."""
    generator = torch.Generator().manual_seed(seed)
    stacked = torch.randn(6, 4, generator=generator)
    tensors = {
        "model.matrix": torch.randn(5, 3, generator=generator).T,
        "model.stacked/0": stacked[:4],
        "model.stacked/1": stacked[4:],
        "model.empty": torch.empty(0, 3),
        "optimizer.matrix.step": torch.tensor(seed, dtype=torch.int64),
    }
    for dtype in KINDS:
        tensors[f"optimizer.{KINDS[dtype]}"] = torch.randn(3, generator=generator).to(dtype)
    return tensors


def blank() -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in state().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name].double(), other[name].double()) for name in one)


def folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    meta = {
        "tokens": np.int64(7),
        "seconds": np.float32(0.5),
        "rate": torch.tensor(2),
        "rng": [1, 2],
        "nested": {"a": None},
    }
    saved(tmp_path, 100, state(), meta)
    got = blank()
    assert not same(state(), got)
    loaded = make(tmp_path).load(got)
    assert loaded == (100, {"tokens": 7, "seconds": 0.5, "rate": 2, "rng": [1, 2], "nested": {"a": None}})
    assert same(state(), got)
    assert folders(tmp_path) == ["step-00000100"]
    assert folders(tmp_path / "step-00000100") == ["checkpoint.json", "part-00000.safetensors"]


def test_an_empty_folder_has_none(tmp_path: Path) -> None:
    assert make(tmp_path).load(blank()) is None
    assert make(tmp_path / "absent").load(blank()) is None


def test_the_copy_is_of_the_moment_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training changes weights and meta while they are being written."""
    go = threading.Event()

    def write_late(*arguments: Any) -> dict[str, Any]:
        go.wait(60)
        return write_part_file(*arguments)

    monkeypatch.setattr(module, "write_part_file", write_late)
    tensors, meta = state(), {"seen": [1]}
    checkpoints = make(tmp_path)
    checkpoints.save(1, tensors, meta)
    for tensor in tensors.values():
        tensor.copy_(torch.ones_like(tensor))
    meta["seen"].append(2)
    assert not list(tmp_path.glob("step-*"))  # the call came back before anything was written
    go.set()
    got = blank()
    assert checkpoints.load(got) == (1, {"seen": [1]})
    assert same(state(), got)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torchs_reader_reads_the_same(tmp_path: Path) -> None:
    """torch.distributed.checkpoint, which knows nothing of Lalia, fills the same tensors from the same files."""
    saved(tmp_path, 3, state(), {})
    got = {name: tensor for name, tensor in blank().items() if tensor.numel()}
    dcp_load(got, storage_reader=HuggingFaceStorageReader(str(tmp_path / "step-00000003")), no_dist=True)
    assert same({name: state()[name] for name in got}, got)
    assert not same({name: state(1)[name] for name in got}, got)


def test_the_newest_and_the_milestones_stay(tmp_path: Path) -> None:
    checkpoints = make(tmp_path, keep=2, milestone_steps={2})
    for step in (1, 2, 3, 4, 100_000_000):
        checkpoints.save(step, state(step), {})
    checkpoints.wait()
    assert folders(tmp_path) == ["step-00000002", "step-00000004", "step-100000000"]
    assert checkpoints.load(got := blank()) == (100_000_000, {})
    assert same(state(100_000_000), got)


def test_the_step_counts_and_not_the_clock(tmp_path: Path) -> None:
    checkpoints = make(tmp_path, keep=3)
    for step, time in ((1, 3000.0), (2, 2000.0), (3, 1000.0)):  # the clock went backwards
        checkpoints.save(step, state(step), {})
        checkpoints.wait()
        os.utime(tmp_path / f"step-{step:08d}", (time, time))
    checkpoints.save(4, state(4), {})
    assert checkpoints.load(got := blank()) == (4, {})
    assert same(state(4), got)
    assert folders(tmp_path) == ["step-00000002", "step-00000003", "step-00000004"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoints = make(tmp_path)
    checkpoints.save(1, state(1), {"try": 1})
    checkpoints.save(1, state(2), {"try": 2})
    assert checkpoints.load(got := blank()) == (1, {"try": 2})
    assert same(state(2), got)
    assert folders(tmp_path) == ["step-00000001"]


def test_another_run_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, 1, state(), {})
    with pytest.raises(UserError, match="other settings"):
        make(tmp_path, run="another").load(blank())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.matrix"), "it has a tensor model.matrix, which this model lacks"),
        (lambda t: t.update({"model.more": torch.zeros(1)}), "it lacks the tensor model.more"),
        (
            lambda t: t.update({"model.matrix": torch.zeros(3, 6)}),
            r"model.matrix has shape \[3, 5\], this model's \[3, 6\]",
        ),
    ],
)
def test_another_model_is_refused_and_nothing_is_filled(tmp_path: Path, change: Any, message: str) -> None:
    saved(tmp_path, 1, state(), {})
    tensors = blank()
    change(tensors)
    with pytest.raises(UserError, match=message):
        make(tmp_path).load(tensors)
    assert same({"a": tensors["model.stacked/0"]}, {"a": torch.zeros(4, 4)})
    assert make(tmp_path).load(blank()) == (1, {})


def test_meta_that_is_no_json_is_our_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="object does not belong"):
        make(tmp_path).save(1, state(), {"what": object()})


def test_read_model_joins_the_pieces(tmp_path: Path) -> None:
    saved(tmp_path, 1, state(), {})
    weights = read_model(tmp_path / "step-00000001")
    assert weights.keys() == {"matrix", "stacked", "empty"}
    assert torch.equal(weights["matrix"], state()["model.matrix"])
    assert torch.equal(weights["stacked"], torch.cat([state()["model.stacked/0"], state()["model.stacked/1"]]))
    with pytest.raises(UserError, match="holds no tensors average"):
        read_model(tmp_path / "step-00000001", "average.")


def test_read_model_gives_the_weights_of_a_model(tmp_path: Path) -> None:
    model = tiny_model(seed=1)
    saved(tmp_path, 1, saved_state(model, make_optimizers(model, OptimizerConfig())), {})
    other = tiny_model(seed=2)
    assert not same(dict(model.state_dict()), dict(other.state_dict()))
    other.load_state_dict(read_model(tmp_path / "step-00000001"))
    assert same(dict(model.state_dict()), dict(other.state_dict()))


def test_read_model_refuses_what_is_not_whole(tmp_path: Path) -> None:
    saved(tmp_path, 1, state(), {})
    path = tmp_path / "step-00000001" / "part-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptFile, match="not a whole checkpoint: part-00000.safetensors has"):
        read_model(path.parent)
    with pytest.raises(CorruptFile, match="not a whole checkpoint: checkpoint.json: No such file"):
        read_model(tmp_path)


def test_the_receipt_says_what_is_in_it(tmp_path: Path) -> None:
    saved(tmp_path, 1, {"model.a": torch.zeros(2, 3, dtype=torch.bfloat16)}, {"tokens": 5})
    facts = json.loads((tmp_path / "step-00000001" / "checkpoint.json").read_text())
    assert facts["tensors"] == {
        "model.a": {"dtype": "BF16", "shape": [2, 3], "parts": [["part-00000.safetensors", [0, 0], [2, 3]]]}
    }
    assert (facts["step"], facts["world_size"], facts["meta"]) == (1, 1, {"tokens": 5})
