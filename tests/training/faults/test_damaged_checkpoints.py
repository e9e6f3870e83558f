"""Files of checkpoints that are damaged or gone: the checkpoint before them continues, and says so."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lalia.errors import UserError
from lalia.training import checkpoints as module
from tests.training.test_checkpoints import blank, folders, make, same, saved, state

Damage = Callable[[Path], None]


def part(folder: Path) -> Path:
    return folder / "part-00000.safetensors"


def flip(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def flip_a_weight(folder: Path) -> None:
    flip(part(folder))


def flip_the_header(folder: Path) -> None:
    flip(part(folder), 40)


def truncate(folder: Path) -> None:
    part(folder).write_bytes(part(folder).read_bytes()[:-8])


def empty(folder: Path) -> None:
    part(folder).write_bytes(b"")


def lose_the_tensors(folder: Path) -> None:
    part(folder).unlink()


def lose_the_receipt(folder: Path) -> None:
    (folder / "checkpoint.json").unlink()


def cut_the_receipt(folder: Path) -> None:
    path = folder / "checkpoint.json"
    path.write_bytes(path.read_bytes()[:100])


def replace_the_receipt(folder: Path) -> None:
    (folder / "checkpoint.json").write_text("[]")


def change_a_number(folder: Path) -> None:
    """Valid JSON with another data position: training would repeat or lose samples."""
    path = folder / "checkpoint.json"
    facts = json.loads(path.read_text())
    facts["meta"]["position"] += 1
    path.write_text(json.dumps(facts, indent=2))


DAMAGES = [
    flip_a_weight,
    flip_the_header,
    truncate,
    empty,
    lose_the_tensors,
    lose_the_receipt,
    cut_the_receipt,
    replace_the_receipt,
    change_a_number,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_one_before_continues(tmp_path: Path, damage: Damage) -> None:
    for step in (100, 200):
        saved(tmp_path, step, state(step), {"position": step})
    damage(tmp_path / "step-00000200")
    checkpoints = make(tmp_path)
    assert checkpoints.load(got := blank()) == (100, {"position": 100})
    assert same(state(100), got)
    (line,) = checkpoints.progress.lines  # pyright: ignore[reportAttributeAccessIssue]
    assert line.startswith(f"warning: checkpoint {tmp_path / 'step-00000200'} is damaged (")
    assert line.endswith("); falling back to the one before it")
    assert folders(tmp_path) == ["step-00000100"]  # or it would push out the new steps, which are lower
    saved(tmp_path, 150, state(150), {})
    assert folders(tmp_path) == ["step-00000100", "step-00000150"]


def test_without_the_checksum_the_flipped_weight_would_be_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: it is the checksum that finds it."""
    saved(tmp_path, 200, state(200), {"position": 200})
    flip_a_weight(tmp_path / "step-00000200")
    monkeypatch.setattr(module, "damage", lambda *arguments: None)
    assert make(tmp_path).load(got := blank()) == (200, {"position": 200})
    assert not same(state(200), got)


def test_when_none_is_whole_training_starts_at_step_0_and_says_so(tmp_path: Path) -> None:
    for step, damage in ((100, truncate), (200, lose_the_receipt)):
        saved(tmp_path, step, state(step), {})
        damage(tmp_path / f"step-{step:08d}")
    checkpoints = make(tmp_path)
    assert checkpoints.load(got := blank()) is None
    assert same(blank(), got)  # untouched
    lines = checkpoints.progress.lines  # pyright: ignore[reportAttributeAccessIssue]
    assert [line.startswith("warning: checkpoint") for line in lines] == [True, True, False]
    assert lines[2] == "warning: no checkpoint is whole; this stage starts at step 0 again"
    assert folders(tmp_path) == []


def test_a_damaged_one_of_another_run_is_passed_over_and_a_whole_one_refused(tmp_path: Path) -> None:
    saved(tmp_path, 100, state(), {})
    other = make(tmp_path, run="another")
    other.save(200, state(), {})
    other.wait()
    truncate(tmp_path / "step-00000200")
    with pytest.raises(UserError, match=r"step-00000200 belongs to a run with other settings or data; delete"):
        make(tmp_path).load(blank())
    assert folders(tmp_path) == ["step-00000100", "step-00000200"]  # what is refused is left alone
    flip(tmp_path / "step-00000200" / "checkpoint.json")
    assert make(tmp_path).load(blank()) == (100, {})
