"""kill -9 before every single thing that a save does to the disk: a whole checkpoint is always there."""

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lalia.training import checkpoint_files, checkpoints
from lalia.training.checkpoints import Checkpoints
from lalia.training.parallel.world import ParallelConfig, start
from tests.training.parallel.ranks import run
from tests.training.test_checkpoints import Said, folders, make

EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")
"""What Python announces before it does it."""


def state(value: int) -> dict[str, torch.Tensor]:
    return {name: torch.full((50,), float(value)) for name in ("a", "b", "c")}


def save_and_die(folder: Path, step: int, value: int, keep: int, moment: int) -> bool:
    """Save in a process that is killed before its `moment`th operation; whether it got to the end before."""
    child = os.fork()
    if child == 0:
        left = moment

        def count(*_: Any) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event in EVENTS:
                count()

        fsync, tensor_bytes = os.fsync, checkpoint_files._bytes
        os.fsync = lambda descriptor: (count(), fsync(descriptor))[1]
        checkpoint_files._bytes = lambda tensor: (count(), tensor_bytes(tensor))[1]  # between two tensors of a file
        sys.addaudithook(hook)
        saver = make(folder, keep=keep)
        saver.save(step, state(value), {"value": value})
        saver.wait()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFEXITED(status)


def kill_everywhere(folder: str, old: list[int], new: int, keep: int) -> list[tuple[int, int, list[float]]]:
    """Step, value and weights found after a kill at each moment of saving step `new` beside the steps `old`."""
    path, template = Path(folder, "run"), Path(folder, "template")
    for step in old:
        assert save_and_die(template, step, 1, len(old), 0)
    found = []
    for moment in range(1, 200):
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(template, path)
        done = save_and_die(path, new, 2, keep, moment)
        loader = make(path)
        tensors = state(0)
        loaded = loader.load(tensors)
        assert loaded is not None
        assert not loader.progress.lines  # pyright: ignore[reportAttributeAccessIssue] (nothing looked damaged)
        assert not list(path.glob(".*"))  # what the dead process left is gone
        step, meta = loaded
        found.append((step, meta["value"], sorted({float(v) for tensor in tensors.values() for v in tensor})))
        if done:
            return found
    raise AssertionError("a save does not do that much")


@pytest.mark.parametrize(("old", "new", "keep"), [([1, 2], 3, 2), ([3], 3, 1)])
def test_killed_at_every_moment(tmp_path: Path, old: list[int], new: int, keep: int) -> None:
    """Beside older checkpoints, and in place of the only one there is, of the same step."""
    (found,) = run(kill_everywhere, 1, str(tmp_path), old, new, keep)
    before = (old[-1], 1, [1.0])
    after = (new, 2, [2.0])
    turn = found.index(after)
    assert found == [before] * turn + [after] * (len(found) - turn)  # nothing in between, and never back
    assert turn > 8 and len(found) - turn > 3  # moments on both sides


def die_while_writing(folder: str) -> None:
    """Process 1 dies instead of writing its part."""
    world = start(ParallelConfig())
    saver = Checkpoints(Path(folder), "run", world, Said())
    saver.save(1, state(1), {"value": 1})
    saver.wait()
    if world.rank == 1:
        checkpoints.write_part_file = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)  # pyright: ignore
    saver.save(2, state(2), {"value": 2})
    saver.wait()


def test_one_of_two_processes_is_killed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"rank [01] of 2"):
        run(die_while_writing, 2, str(tmp_path), timeout_seconds=30.0)
    assert not (tmp_path / "step-00000002").exists()
    assert (tmp_path / ".step-00000002.partial").exists()
    tensors = state(0)
    assert make(tmp_path).load(tensors) == (1, {"value": 1})
    assert torch.equal(tensors["a"], state(1)["a"])
    assert folders(tmp_path / "step-00000001") == [
        "checkpoint.json",
        "part-00000.safetensors",
        "part-00001.safetensors",
    ]
    assert not list(tmp_path.glob(".step-*"))
