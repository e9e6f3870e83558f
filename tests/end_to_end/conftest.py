"""A small corpus, a small recipe, and the command line as a user runs it."""

import io
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from lalia.cli import main as cli_main

ROOT = Path(__file__).parents[2]

WORDS = str.split(
    "the a of and to in that it was his he with as for had you not be at by which have from this her but they all she "
    "one there been if more when will would who so no out up into them then can only some could time these two may do "
    "first any my now such like our over man me even most made after also did many before must through years where "
    "much way well down should because long little very without lamp river winter garden letter stone window silver"
)

SETTINGS = (
    "tokenizer.vocab_size=384",
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "pretrain.steps=60",
    "pretrain.sequence_length=64",
    "pretrain.batch_size=4",
    "pretrain.evaluations=1",
    "pretrain.evaluation_bytes=2000",
    "pretrain.checkpoint_seconds=0.05",
    "pretrain.precision=float32",
    "finetune.steps=30",
    "finetune.evaluations=0",
    "finetune.checkpoint_seconds=0.05",
    "evaluate.max_bytes=4000",
    "evaluate.samples=1",
    "evaluate.sample_tokens=8",
)
"""Overrides that make a whole run take seconds."""


def write_corpus(folder: Path, documents: int = 16, paragraphs: int = 40) -> Path:
    """Seeded sentences of common words, one .txt file per document."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for number in range(documents):
        text = "\n\n".join(
            " ".join(
                " ".join(rng.choices(WORDS, k=rng.randint(4, 12))).capitalize() + "." for _ in range(rng.randint(2, 5))
            )
            for _ in range(paragraphs)
        )
        (folder / f"text-{number:02d}.txt").write_text(text, encoding="utf-8")
    return folder


def environment() -> dict[str, str]:
    """The user's environment with one thread, so that runs side by side compute alike."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src"), "TERM": "dumb", "COLUMNS": "200"}


def lalia(*arguments: str, cwd: Path, stdin: str = "", timeout: float = 600.0) -> subprocess.CompletedProcess[str]:
    """Run the command line and capture what it prints."""
    return subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=environment(),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def command(*arguments: str) -> Sequence[str]:
    return [sys.executable, "-m", "lalia.cli", *arguments]


@dataclass(frozen=True)
class Answer:
    """What a command did: its exit status and what it printed."""

    code: int
    out: str
    err: str


Main = Callable[..., Answer]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Main:
    """`main("run", ..., stdin="")`: the command line inside this process, in `tmp_path`; a traceback fails the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def call(*arguments: str, stdin: str = "") -> Answer:
        monkeypatch.setattr(sys, "argv", ["lalia", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as leaving:
            cli_main()
        printed = capsys.readouterr()
        assert isinstance(leaving.value.code, int)
        return Answer(leaving.value.code, printed.out, printed.err)

    return call


def refused(answer: Answer, *parts: str) -> str:
    """Check for exactly one message on stderr, exit status 1, nothing on stdout; give the message."""
    messages = [line for line in answer.err.splitlines() if line.startswith("lalia: ")]
    assert answer.code == 1, answer
    assert len(messages) == 1, answer.err
    assert "Traceback" not in answer.err
    assert answer.out == ""
    for part in parts:
        assert part in messages[0], messages[0]
    return messages[0]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "texts")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A run folder with every stage done. Tests must not change it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    done = lalia("run", str(corpus), *SETTINGS, "--run", str(folder), cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    return folder
