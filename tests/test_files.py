"""Files are whole or absent, whatever happens in between."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lalia.errors import CorruptFile, UserError
from lalia.files import (
    fingerprint,
    read_json,
    replace_directory,
    run_lock,
    sha256_file,
    write_bytes,
    write_json,
    write_text,
)


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.json"
    write_json(path, {"b": 1, "a": "\u00fc"})
    assert path.read_text(encoding="utf-8") == '{\n  "b": 1,\n  "a": "\u00fc"\n}\n'
    assert read_json(path) == {"b": 1, "a": "\u00fc"}
    write_text(path, "shorter")
    assert path.read_bytes() == b"shorter"
    assert path.stat().st_mode & 0o777 == 0o644
    assert os.listdir(path.parent) == ["file.json"]


@pytest.mark.parametrize("moment", ["fsync", "chmod", "replace"])
def test_a_failure_before_the_rename_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def fail(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, moment, fail)
        with pytest.raises(KeyboardInterrupt):
            write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]  # no temporary stays
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"


def test_killed_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")
    code = (
        "import os, sys, pathlib, lalia.files\n"
        "os.replace = lambda *a: os.kill(os.getpid(), 9)\n"
        "lalia.files.write_bytes(pathlib.Path(sys.argv[1]), b'new')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], env=_environment(), timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_damaged_json_is_a_corrupt_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(CorruptFile, match=r"file\.json is not valid JSON .* run the same command again"):
        read_json(path)


def test_json_that_is_not_there_or_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CorruptFile, match="is missing"):
        read_json(tmp_path / "none.json")
    with pytest.raises(CorruptFile, match="cannot read"):
        read_json(tmp_path)


def test_replace_directory(tmp_path: Path) -> None:
    target = tmp_path / "stage"
    for content in ("first", "second"):
        temporary = tmp_path / ".stage.partial"
        write_text(temporary / "inner" / "file", content)
        replace_directory(temporary, target)
        assert (target / "inner" / "file").read_text() == content
        assert os.listdir(tmp_path) == ["stage"]


def test_replace_directory_keeps_the_old_one_until_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, temporary = tmp_path / "stage", tmp_path / ".stage.partial"
    write_text(target / "file", "old")
    write_text(temporary / "file", "new")

    def fail(*arguments: object) -> None:
        raise OSError("disk gone")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk gone"):
        replace_directory(temporary, target)
    assert (target / "file").read_text() == "old"
    assert (temporary / "file").read_text() == "new"


def test_replace_directory_after_a_crash_between_its_renames(tmp_path: Path) -> None:
    """What a kill between the two renames leaves: the old one aside, the new one not yet in place."""
    write_text(tmp_path / ".stage.old" / "file", "old")
    write_text(tmp_path / ".stage.partial" / "file", "new")
    replace_directory(tmp_path / ".stage.partial", tmp_path / "stage")
    assert (tmp_path / "stage" / "file").read_text() == "new"
    assert os.listdir(tmp_path) == ["stage"]


HOLD = (
    "import sys, time, pathlib, lalia.files\n"
    "with lalia.files.run_lock(pathlib.Path(sys.argv[1])):\n"
    "    print('held', flush=True)\n"
    "    time.sleep(60)\n"
)


def test_run_lock_names_its_holder_and_is_released_by_kill(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], env=_environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        holder = rf"in use by a running process \(pid {process.pid}\).*--run FOLDER"
        with pytest.raises(UserError, match=holder), run_lock(tmp_path):
            pass
    finally:
        process.kill()
        process.communicate()
    with run_lock(tmp_path):
        assert (tmp_path / "run.lock").read_text() == f"{os.getpid()}\n"
        with pytest.raises(UserError, match=f"pid {os.getpid()}"), run_lock(tmp_path):
            pass
    with run_lock(tmp_path):  # and after an ordinary end
        pass


def test_fingerprint_depends_on_content_only() -> None:
    one = {"a": 1, "b": {"c": [1, 2], "d": None}}
    other = {"b": {"d": None, "c": [1, 2]}, "a": 1}
    assert fingerprint(one) == fingerprint(other) == fingerprint(json.loads(json.dumps(other)))
    assert len(fingerprint(one)) == 16
    for changed in ({**one, "a": 2}, {**one, "a": "1"}, {**one, "e": None}, {"a": 1, "b": {"c": [2, 1], "d": None}}):
        assert fingerprint(changed) != fingerprint(one)


def test_sha256_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1.
    assert sha256_file(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "src")}
