"""Disks that are full or not to be written, and Ctrl-C: a message, and the same command continues afterwards."""

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.conftest import SETTINGS, Main, command, environment, lalia, refused
from tests.end_to_end.test_kill import digests


def test_a_disk_that_fills_up_again_and_again(
    main: Main, corpus: Path, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt may write a few files more than the one before; all of them together make the same run."""
    fsync, left = os.fsync, 0

    def fsync_while_there_is_room(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync_while_there_is_room)
    run = tmp_path / "run"
    attempts = 0
    while True:
        attempts += 1
        left = 4 * attempts
        answer = main("run", str(corpus), *SETTINGS, "pretrain.checkpoint_seconds=0.2", "--run", str(run))
        if answer.code == 0:
            break
        refused(answer, "no space left while writing", "MiB free", "run the same command again")
        assert not [path for path in run.rglob(".*") if re.fullmatch(r"\..+\.[a-z0-9_]{8}", path.name)]  # temporaries
    assert attempts > 4
    assert digests(run) == digests(finished_run)


def test_a_limit_on_the_size_of_files(corpus: Path, tmp_path: Path) -> None:
    """The kernel refuses the writes itself, in a process of its own."""
    arguments = ["pretrain", str(corpus), *SETTINGS, "--run", str(tmp_path / "run")]

    def limit_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, 120_000))  # tokens fit, weights do not

    limited = subprocess.run(
        command(*arguments),
        cwd=tmp_path,
        env=environment(),
        preexec_fn=limit_files,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert limited.returncode == 1, limited.stderr
    assert "lalia: no space left while writing" in limited.stderr
    assert "stage base" in limited.stderr
    assert "Traceback" not in limited.stderr
    done = lalia(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tokens: done" in done.stderr


@pytest.mark.parametrize("library", ["weights", "index"])
def test_libraries_that_hide_the_reason(
    main: Main, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    """safetensors and numpy report a full disk in words of their own."""
    from safetensors import SafetensorError

    run = Path(shutil.copytree(finished_run, tmp_path / "run"))

    def fail(*arguments: object, **options: object) -> None:
        if library == "weights":
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise OSError("31 requested and 0 written")

    target = "lalia.formats.hf_folder.save_file" if library == "weights" else "numpy.save"
    change = "pretrain.seed=9" if library == "weights" else "tokenizer.vocab_size=448"
    with monkeypatch.context() as patch:
        patch.setattr(target, fail)
        refused(main("pretrain", str(run), change), "no space left while writing")
    assert main("pretrain", str(run), change).code == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 100 kB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = os.geteuid() == 0 and _mount("mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(folder))
    if not mounted:
        pytest.skip("mounting a small disk needs root and permission to mount")
    yield folder
    assert _mount("umount", "-l", str(folder))  # lazily: token shards may still be mapped


def _mount(*arguments: str) -> bool:
    program = shutil.which(arguments[0])
    return bool(program) and subprocess.run([program, *arguments[1:]], capture_output=True, check=False).returncode == 0


def test_a_small_disk(main: Main, corpus: Path, finished_run: Path, small_disk: Path) -> None:
    arguments = ["pretrain", str(corpus), *SETTINGS, "--run", str(small_disk / "run")]
    for size in ("100k", "300k", "600k"):
        assert _mount("mount", "-o", f"remount,size={size}", str(small_disk))
        refused(main(*arguments), "no space left", "run the same command again")
    (small_disk / "filler").write_bytes(b"")
    with pytest.raises(OSError, match="No space"), (small_disk / "filler").open("ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    refused(main(*arguments), str(small_disk))  # not one byte left
    assert _mount("mount", "-o", "remount,size=50m", str(small_disk))
    answer = main(*arguments)
    assert answer.code == 0, answer.err
    ours = (small_disk / "run" / "base" / "model.safetensors").read_bytes()
    assert ours == (finished_run / "base" / "model.safetensors").read_bytes()


def test_a_run_folder_that_cannot_be_written(main: Main, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    for place in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        answer = main("collect", str(corpus), "--run", str(place))
        refused(answer, f"cannot write to the run folder {place}", "--run FOLDER")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "not a folder"


def test_a_run_folder_on_a_disk_that_is_read_only(main: Main, corpus: Path, small_disk: Path) -> None:
    assert _mount("mount", "-o", "remount,ro", str(small_disk))
    refused(main("collect", str(corpus), "--run", str(small_disk / "run")), "Read-only", "--run FOLDER")


def test_a_file_of_the_run_that_cannot_be_written(main: Main, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "recipe.toml").mkdir(parents=True)
    refused(main("collect", str(corpus), "--run", str(tmp_path / "run")), "recipe.toml")


def test_ctrl_c_stops_with_a_message_and_keeps_the_checkpoint(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        command("pretrain", str(corpus), *SETTINGS, "pretrain.steps=100000", "--run", str(run)),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts us in the background has SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 300  # only against hanging: a busy machine may take long
    while (
        not list(run.glob(".base.partial/step-*/checkpoint.json"))
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130
    assert said.endswith("lalia: stopped; the same command continues where it left off\n")
    assert "Traceback" not in said
    assert list(run.glob(".base.partial/step-*/checkpoint.json"))


def test_ctrl_c_while_generating(main: Main, finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lalia.inference.engine.Engine.step", interrupt)
    answer = main("generate", str(finished_run), "The")
    assert (answer.code, answer.err) == (130, "lalia: stopped\n")


def test_a_reader_that_goes_away(finished_run: Path) -> None:
    """`lalia generate ... | head`: no traceback."""
    line = " ".join(command("generate", str(finished_run), "The")) + " | true"
    done = subprocess.run(
        ["sh", "-c", line], env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert "Traceback" not in done.stderr
