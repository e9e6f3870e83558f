"""Every run folder tells which code on which machine made it, and nothing else about its owner."""

import json
import subprocess
from pathlib import Path

import pytest

from lalia import provenance
from lalia.provenance import code_diff, commit, environment, read_starts, record_start, source_sha256

SECRET = "hunter2-do-not-record"


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source tree under git with a package of one file."""
    root = tmp_path / "tree"
    package = root / "src" / "lalia"
    package.mkdir(parents=True)
    (package / "model.py").write_text("width = 1\n")
    (root / "notes.txt").write_text("private\n")
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "one")
    monkeypatch.setattr(provenance, "CHECKOUT", root)
    monkeypatch.setattr(provenance, "PACKAGE", package)
    return root


def git(root: Path, *arguments: str, stdin: bytes = b"") -> None:
    subprocess.run(["git", "-C", str(root), *arguments], input=stdin, check=True, capture_output=True)


def test_a_clean_tree_has_a_commit_and_no_diff(checkout: Path, tmp_path: Path) -> None:
    record_start(tmp_path, "1.0", ["lalia", "run"])
    [start] = read_starts(tmp_path)
    assert start["diff"] is None and not list(tmp_path.glob("code-*"))
    assert start["argv"] == ["lalia", "run"]
    assert start["commit"] == commit() and "dirty" not in start["commit"]


def test_the_diff_rebuilds_the_code(checkout: Path, tmp_path: Path) -> None:
    package = checkout / "src" / "lalia"
    (package / "model.py").write_text("width = 2\n")
    (package / "new.py").write_text("depth = 3\n")
    (checkout / "notes.txt").write_text("more private things\n")
    wanted = source_sha256()
    record_start(tmp_path, "1.0")
    [start] = read_starts(tmp_path)
    diff = (tmp_path / start["diff"]).read_bytes()
    assert start["commit"].endswith("-dirty") and start["source_sha256"] == wanted
    assert b"private" not in diff
    git(checkout, "stash", "-q", "--include-untracked")
    assert source_sha256() != wanted
    git(checkout, "apply", "-", stdin=diff)
    assert source_sha256() == wanted


def test_a_huge_diff_is_cut_and_says_so(checkout: Path) -> None:
    (checkout / "src" / "lalia" / "new.py").write_text("x = 1\n" * (provenance.LARGEST_DIFF // 5))
    diff = code_diff()
    assert len(diff) < provenance.LARGEST_DIFF + 200
    assert b"# cut here: the whole diff has" in diff[-200:]


def test_without_git_the_hash_of_the_files_remains(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = source_sha256()
    monkeypatch.setattr(provenance, "CHECKOUT", tmp_path / "nowhere")
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path / "nowhere" / "src" / "lalia")
    (tmp_path / "nowhere" / "src").mkdir(parents=True)
    (checkout / "src" / "lalia").rename(tmp_path / "nowhere" / "src" / "lalia")
    record_start(tmp_path, "1.0")
    [start] = read_starts(tmp_path)
    assert (start["commit"], start["diff"], start["source_sha256"]) == (None, None, expected)


def test_every_process_of_a_run_is_listed_and_damage_stops_nothing(tmp_path: Path) -> None:
    for number in range(3):
        record_start(tmp_path, "1.0", [str(number)])
    assert [start["argv"] for start in read_starts(tmp_path)] == [["0"], ["1"], ["2"]]
    (tmp_path / "run.json").write_text("{")
    assert read_starts(tmp_path) == []
    record_start(tmp_path, "1.0", ["3"])
    assert [start["argv"] for start in read_starts(tmp_path)] == [["3"]]


def test_only_named_variables_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    record_start(tmp_path, "1.0")
    assert not any(SECRET.encode() in path.read_bytes() for path in tmp_path.iterdir() if path.suffix == ".json")
    found = environment("1.0")
    assert found == json.loads((tmp_path / "environment.json").read_text())
    assert found["OMP_NUM_THREADS"] == "1" and found["torch"] and found["numpy"] and found["cores"] >= 1


def test_gpus_are_described_by_their_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 570.1, 700.00 W'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert environment("1.0")["gpus"] == ["NVIDIA H100 80GB HBM3, driver 570.1, limit 700.00 W"]
