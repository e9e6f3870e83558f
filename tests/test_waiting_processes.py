"""Processes that are not the first: they wait for the first one's work, and notice when it is not theirs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lalia import pipeline
from lalia.errors import CorruptFile, UserError
from lalia.files import read_json
from lalia.pipeline import STARTED, Run, run_recipe
from lalia.progress import Progress
from lalia.recipe import load_recipe
from lalia.stages import STAGES


def a_text(words: str) -> str:
    return "".join(f"{words}: number {n} of many, and its square is {n * n}.\n\n" for n in range(300))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A finished collection of a text."""
    (tmp_path / "text.txt").write_text(a_text("To be, or not to be"), encoding="utf-8")
    recipe = load_recipe("own-text", [f"data.path='{tmp_path / 'text.txt'}'", "data.document_bytes=1000"])
    run_recipe(recipe, tmp_path / "run", "documents", Progress(quiet=True))
    return Run(tmp_path / "run", recipe, Progress(quiet=True))


def test_the_result_of_the_first_is_taken(run: Run) -> None:
    assert pipeline._help(run, STAGES[0]) == read_json(run.path("documents") / "receipt.json")["summary"]


def test_a_folder_that_is_being_moved_is_looked_at_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[Path] = []

    def vanishing(read: Callable[[Path], Any]) -> Callable[[Path], Any]:
        def look(path: Path) -> Any:
            looks.append(path)
            if len(looks) == 1:
                raise CorruptFile(f"{path} is missing")
            return read(path)

        return look

    monkeypatch.setattr(pipeline, "read_json", vanishing(pipeline.read_json))
    assert pipeline._help(run, STAGES[0])
    assert len(looks) > 1


def test_other_inputs_than_those_of_the_first_are_noticed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "OTHER_WORK_SECONDS", 0.3)
    path = Path(run.recipe.data.path or "")
    path.write_text(a_text("Another text on this machine"), encoding="utf-8")
    partial = run.folder / ".documents.partial"
    partial.mkdir()
    receipt = read_json(run.path("documents") / "receipt.json")
    pipeline.write_json(partial / STARTED, {"fingerprint": receipt["fingerprint"], "identity": receipt["identity"]})
    with pytest.raises(UserError, match=r"works on documents with other inputs than this one sees \(.*changed"):
        pipeline._help(run, STAGES[0])
