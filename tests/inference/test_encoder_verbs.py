"""The verbs embed, fill, classify and train-classifier."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lalia
from lalia.cli import main
from tests.inference.encoders import make_folder
from tests.posttraining.test_classify import make_emails, write_jsonl

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Exit status, standard output and standard error of a command."""

    def command(*arguments: Any, stdin: str = "") -> tuple[int, str, str]:
        capsys.readouterr()  # what loading printed before
        monkeypatch.setattr(sys, "argv", ["lalia", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as leaving:
            main()
        captured = capsys.readouterr()
        return int(leaving.value.code or 0), captured.out, captured.err

    return command


def test_embed(tmp_path: Path, run: Run) -> None:
    folder = make_folder(tmp_path / "bert", "BertModel")
    wanted = lalia.embed(folder, ["day", "thou art"])
    code, out, _ = run("embed", folder, "day", "thou art")
    assert code == 0 and np.abs(np.loadtxt(io.StringIO(out)) - wanted).max() < 1e-6
    for given in (("-",), ()):
        code, out, _ = run("embed", folder, *given, "--json", stdin="day\nthou art\n")
        result = json.loads(out)
        assert code == 0 and result["texts"] == ["day", "thou art"]
        assert np.abs(np.array(result["embeddings"]) - wanted).max() < 1e-6
    code, out, err = run("embed", folder, "summer " * 60)
    assert code == 0 and "lalia: note: 1 of 1 texts have more than 48 tokens and were cut there" in err
    assert run("embed", tmp_path / "nothing", "day")[0] == 1


def test_fill(tmp_path: Path, run: Run) -> None:
    folder = make_folder(tmp_path / "masked", "BertForMaskedLM")
    wanted = lalia.load(folder).fill("thou [MASK]", top_k=3)
    code, out, _ = run("fill", folder, "thou [MASK]", "--top-k", 3)
    assert code == 0 and [line.split()[1] for line in out.splitlines()] == [filling.token for filling in wanted]
    code, out, _ = run("fill", folder, "-", "--top-k", 3, "--json", stdin="thou [MASK]\n")
    assert [entry["token"] for entry in json.loads(out)] == [filling.token for filling in wanted]
    code, _, err = run("fill", folder, "thou")
    assert code == 1 and "has 0 masks; write [MASK] once" in err


def test_train_and_classify(tmp_path: Path, run: Run) -> None:
    data = write_jsonl(tmp_path / "mail.jsonl", make_emails(60))
    code, out, err = run("train-classifier", data, "--out", tmp_path / "model", "--epochs", "0.5")
    assert code == 0 and "macro-F1" in out and "(5 held out)" not in err and "examples/s" in err
    code, out, _ = run("classify", tmp_path / "model", "please pay", "can we meet")
    assert code == 0 and len(out.splitlines()) == 2
    code, out, _ = run("classify", tmp_path / "model", "--json", stdin="please pay\n")
    (result,) = json.loads(out)
    assert result["text"] == "please pay" and set(result["probabilities"]) == {"invoice", "meeting", "delivery"}
    code, _, err = run("train-classifier", tmp_path / "no.csv", "--out", tmp_path / "other")
    assert code == 1 and "there is no file" in err
    code, _, err = run("train-classifier", data, "--out", tmp_path / "other", "--epochs", "0")
    assert code == 1 and "epochs" in err
    code, _, err = run("fill", tmp_path / "model", "[MASK]")
    assert code == 1 and "it is a classifier of the labels delivery, invoice, meeting" in err
