"""TensorBoard's own reader finds what metrics.jsonl holds."""

import json
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lalia.errors import UserError
from lalia.progress import Progress
from lalia.training.tensorboard import TensorBoard


def process(folder: Path, steps: range, shift: float = 0.0) -> None:
    progress = Progress(folder / "metrics.jsonl", quiet=True)
    progress.listeners.append(TensorBoard(folder / "tensorboard"))
    progress.record("start", attempt=1)
    for step in steps:
        progress.record("step", step=step, loss=1.0 / step + shift, tokens=step * 100, whole=True)
    progress.record("evaluation", step=steps[-1], bits_per_byte=2.5, sample="To be")


def read(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return found


def test_both_hold_the_same_numbers(tmp_path: Path) -> None:
    process(tmp_path, range(1, 6))
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = read(tmp_path)
    for name in ("loss", "tokens"):
        expected = [(e["step"], pytest.approx(e[name])) for e in events if e["event"] == "step"]
        assert [(e.step, e.value) for e in found.Scalars(f"step/{name}")] == expected
    assert found.Scalars("evaluation/bits_per_byte")[0].value == 2.5
    assert set(found.Tags()["scalars"]) == {"step/loss", "step/tokens", "evaluation/bits_per_byte"}
    assert [e.tensor_proto.string_val[0] for e in found.Tensors("evaluation/sample/text_summary")] == [b"To be"]


def test_steps_that_are_run_again_count_once(tmp_path: Path) -> None:
    process(tmp_path, range(1, 8))
    process(tmp_path, range(4, 10), shift=0.5)
    values = {e.step: e.value for e in read(tmp_path).Scalars("step/loss")}
    assert sorted(values) == list(range(1, 10))
    assert (values[3], values[4]) == (pytest.approx(1 / 3), pytest.approx(1 / 4 + 0.5))


def test_steps_after_going_back_count_once(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path / "tensorboard")
    for step in range(1, 6):
        board("step", {"step": step, "loss": 1.0})
    board("rewind", {"step": 2, "from_step": 5})
    board("step", {"step": 3, "loss": 2.0})
    assert {e.step: e.value for e in read(tmp_path).Scalars("step/loss")} == {1: 1.0, 2: 1.0, 3: 2.0}


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    with pytest.raises(UserError, match=r"lalia\[tensorboard\]"):
        TensorBoard(tmp_path)
