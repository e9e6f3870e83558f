"""Disks that are full or not to be written: the error comes at the next call, and what was there stays."""

import errno
import os
import resource
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.parallel.ranks import run
from tests.training.test_checkpoints import blank, folders, make, same, saved, state


@pytest.mark.parametrize("room", range(5))
def test_full_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """Syncs are where a file system that allocates late says that it is full: tensors, receipt, then three folders."""
    saved(tmp_path, 1, state(1), {})
    fsync, left = os.fsync, room

    def fsync_while_there_is_room(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    checkpoints = make(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync_while_there_is_room)
        checkpoints.save(2, state(2), {})  # comes back at once
        if room < 4:
            with pytest.raises(OSError, match="No space left") as caught:
                checkpoints.save(3, state(3), {})
            assert caught.value.errno == errno.ENOSPC
        else:
            checkpoints.wait()
    newest = 1 if room < 3 else 2  # renamed, but perhaps not yet on the disk
    assert folders(tmp_path) == [f"step-{step:08d}" for step in range(1, newest + 1)]
    assert checkpoints.load(got := blank()) == (newest, {})
    assert same(state(newest), got)
    checkpoints.save(4, state(4), {})  # somebody made room
    assert checkpoints.load(got) == (4, {})
    assert same(state(4), got)


def limited(folder: str) -> tuple[int | None, str | None, list[str], Any, float]:
    """A save that the kernel refuses halfway through the tensors."""
    checkpoints = make(Path(folder))
    checkpoints.save(1, {"a": torch.ones(1000)}, {})
    checkpoints.wait()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    checkpoints.save(2, {"a": torch.ones(100_000)}, {})
    try:
        checkpoints.wait()
    except OSError as error:
        got = {"a": torch.zeros(1000)}
        return error.errno, error.filename, folders(Path(folder)), checkpoints.load(got), float(got["a"].sum())
    raise AssertionError("the limit did not bite")


def test_a_limit_of_the_kernel(tmp_path: Path) -> None:
    ((number, name, left, loaded, total),) = run(limited, 1, str(tmp_path))
    assert number == errno.EFBIG
    assert name == str(tmp_path / ".step-00000002.partial" / "part-00000.safetensors")
    assert left == ["step-00000001"]
    assert (loaded, total) == ((1, {}), 1000.0)


def read_only(folder: str) -> tuple[Any, bool, int | None, int | None]:
    """Load from and save to a folder that may be read and not written."""
    path = Path(folder)
    saved(path, 1, state(1), {})
    path.chmod(0o555)
    if os.geteuid() == 0:  # whom modes do not stop
        os.seteuid(65534)
    checkpoints = make(path)
    loaded = checkpoints.load(got := blank())
    right = same(state(1), got)
    refused: list[int | None] = []
    for step in (2, 3):  # the second is refused as well, whatever the first left behind
        try:
            checkpoints.save(step, state(2), {})
            checkpoints.wait()
            refused.append(None)
        except OSError as error:
            refused.append(error.errno)
    os.seteuid(os.getuid())
    path.chmod(0o755)
    return loaded, right, refused[0], refused[1]


def test_a_folder_that_is_read_only(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:  # tmp_path is for its owner alone
        ((loaded, right, first, second),) = run(read_only, 1, folder)
        assert (loaded, right) == ((1, {}), True)
        assert (first, second) == (errno.EACCES, errno.EACCES)
        assert folders(Path(folder)) == ["step-00000001"]


def unreadable(folder: str) -> tuple[int | None, list[str]]:
    path = Path(folder)
    saved(path, 1, state(1), {})
    path.chmod(0o755)
    secret = path / "step-00000001" / "part-00000.safetensors"
    secret.chmod(0o000)
    if os.geteuid() == 0:
        os.seteuid(65534)
    number = None
    try:
        make(path).load(blank())
    except OSError as error:
        number = error.errno
    os.seteuid(os.getuid())
    return number, folders(path / "step-00000001")


def test_a_file_that_may_not_be_read_is_not_taken_for_damaged(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ((number, left),) = run(unreadable, 1, folder)
    assert number == errno.EACCES
    assert left == ["checkpoint.json", "part-00000.safetensors"]
