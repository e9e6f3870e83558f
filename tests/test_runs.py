"""lalia runs: every folder is told as it is, whatever state it was left in, and two runs differ in what was changed."""

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lalia.cli import app
from lalia.errors import UserError
from lalia.evaluation.comparison import write_comparison
from lalia.evaluation.records import Metrics
from lalia.files import run_lock, write_json
from lalia.recipe import load_recipe, to_toml
from lalia.runs import compare, differences, find_run, list_runs, names_of, summarize

STEPS, TOKENS_PER_STEP, SECONDS_PER_STEP = 10, 1000, 2.0


def write_run(
    folder: Path, *overrides: str, stages: tuple[str, ...] = ("base", "report"), started: float = 1e9, bits: float = 2.0
) -> Path:
    """A run folder as the pipeline leaves it, with those stages finished."""
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(to_toml(load_recipe("smoke", overrides).model_dump(mode="json")))
    write_json(folder / "environment.json", {"cpu": "Abacus 9", "torch": "2.13.0"})
    write_json(folder / "run.json", {"starts": [{"time": started, "argv": ["lalia", "run"]}, {"time": started + 99}]})
    write_json(
        folder / "plan" / "plan.json",
        {"values": {"parameters": {"value": 45056, "reason": ""}, "steps": {"value": STEPS, "reason": "asked"}}},
    )
    for stage in stages:
        summary: dict[str, Any] = {}
        if stage == "base":
            summary = {
                "steps": STEPS,
                "tokens": STEPS * TOKENS_PER_STEP,
                "tokens_per_second": 500,
                "bits_per_byte": bits,
            }
            write_metrics(folder / "base", bits)
        receipt = {"stage": stage, "fingerprint": "f", "seconds": 60.0, "summary": summary, "identity": {}}
        write_json(folder / stage / "receipt.json", receipt)
    return folder


def write_metrics(folder: Path, bits: float = 2.0, steps: int = STEPS, rest: str = "") -> None:
    events: list[dict[str, Any]] = []
    for step in range(2, steps + 1, 2):
        seconds, tokens = step * SECONDS_PER_STEP, step * TOKENS_PER_STEP
        events.append({"event": "step", "step": step, "loss": 6 / step, "tokens": tokens, "seconds": seconds})
        if step in (4, 8):
            events.append({"event": "evaluation", "step": step, "bits_per_byte": bits + 1 / step, "seconds": seconds})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + rest)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def called(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["runs", *arguments])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


def test_states(here: Path) -> None:
    write_run(here / "whole")
    write_run(here / "asked-for-less", stages=("documents", "base"))
    killed = write_run(here / "killed", stages=("documents",))
    write_metrics(killed / ".base.partial", steps=6, rest='{"event": "step", "st')
    working = write_run(here / "working", stages=("documents", "base"))
    (working / ".chat.partial").mkdir()
    (here / "begun").mkdir()
    (here / "begun" / "log.jsonl").write_text('{"event": "start", "time": 2e9}\n')
    (here / "not-a-run").mkdir()
    with run_lock(working):
        found = {run.name: run for run in list_runs(here)}
    assert {name: (run.state, run.stage) for name, run in found.items()} == {
        "whole": ("finished", "report"),
        "asked-for-less": ("stopped", "base"),
        "killed": ("interrupted", "base"),
        "working": ("running", "chat"),
        "begun": ("empty", None),
    }
    assert summarize(working).state == "interrupted"  # once nobody holds it
    assert (found["killed"].tokens, found["killed"].bits_per_byte) == (6000, 2.25)
    assert found["killed"].minutes == pytest.approx((60 + 12) / 60)
    assert (found["whole"].parameters, found["whole"].tokens_per_second, found["whole"].minutes) == (45056, 500, 1.0)
    assert list(found)[-1] == "begun"  # the youngest


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("base/receipt.json", "{"),
        ("base/receipt.json", '{"summary": [1]}'),
        ("plan/plan.json", '{"values": {"parameters": 3}}'),
        ("plan/plan.json", "[]"),
        ("base/metrics.jsonl", "half\n"),
        ("recipe.toml", "name ="),
        ("environment.json", "\udcff"),
        ("evaluation/results.json", '{"bits_per_byte": 2}'),
    ],
)
def test_a_damaged_run_is_listed_as_damaged_and_not_compared(here: Path, file: str, content: str) -> None:
    write_run(here / "good")
    bad = write_run(here / "bad")
    assert summarize(bad).state == "finished"
    (bad / file).parent.mkdir(exist_ok=True)
    (bad / file).write_bytes(content.encode(errors="surrogateescape"))
    states = {run.name: run.state for run in list_runs(here)}
    assert states == {"good": "finished", "bad": "damaged"}
    assert "bad is damaged: " in called()
    with pytest.raises(UserError, match="cannot compare runs/bad"):
        called("good", "bad")


@pytest.mark.parametrize("file", ["run.json", "log.jsonl", "run.lock"])
def test_damage_of_what_only_tells_the_date_matters_little(here: Path, file: str) -> None:
    run = write_run(here / "run")
    (run / file).write_bytes(b"\xff{")
    assert summarize(run).state == "finished"
    assert summarize(run).started is not None


def test_only_what_differs_is_shown(here: Path) -> None:
    a = write_run(here / "a", "pretrain.optimizer.momentum=0.9", "finetune.enabled=false")
    b = write_run(here / "b", "pretrain.optimizer.momentum=0.8", "finetune.enabled=false", "pretrain.seed=7", bits=1.5)
    write_json(b / "environment.json", {"cpu": "Abacus 10", "torch": "2.13.0"})
    found = compare([a, b])
    assert found["settings"] == {"pretrain.seed": [1, 7], "pretrain.optimizer.momentum": [0.9, 0.8]}
    assert found["environment"] == {"cpu": ["Abacus 9", "Abacus 10"]}
    assert found["plan"] == {}
    assert found["figures"]["bits_per_byte"] == [2.125, 1.625]
    assert found["figures"]["tokens"] == [10_000, 10_000]
    printed = called("a", "b")
    assert re.search(r"pretrain\.optimizer\.momentum +0\.9 +0\.8\n", printed)
    assert "sequence_length" not in printed
    assert "The settings are the same." in called("a", "a")
    assert json.loads(called("a", "b", "--json")) == json.loads(json.dumps(found | {"runs": ["runs/a", "runs/b"]}))


def test_differences_of_nested_and_missing_keys() -> None:
    a = {"x": {"y": 1, "same": [1, 2]}, "only": None}
    assert differences([a, {"x": {"y": 2, "same": [1, 2]}}]) == {"x.y": [1, 2]}
    assert differences([{"z": 0}, {}, {"z": 0}]) == {"z": [0, None, 0]}
    assert differences([a, a]) == differences([a]) == {}


def test_the_list_for_people_and_for_programs(here: Path) -> None:
    assert "no runs here" in called()
    write_run(here / "young", started=2e9)
    write_run(here / "old")
    printed = called().splitlines()
    assert [line.split()[0] for line in printed] == ["run", "old", "young"]
    assert "2001-09-" in printed[1] and "2.125" in printed[1]
    found = json.loads(called("--json"))
    assert [run["name"] for run in found] == ["old", "young"]
    assert json.loads(called(str(here), "--json"))[0]["started"] == 1e9
    assert "45,056" in called("old")  # a single run: its figures


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("shakespear", "shakespeare"), "did you mean 'shakespeare'"),
        (("--plot", "x.svg"), "give one or more"),
        (("shakespeare", "--plot", "x.png"), r"\.svg or \.html"),
        (("nowhere",), "no folder nowhere"),
        (("shakespeare",) * 7, "at most 6"),
    ],
)
def test_what_cannot_be_done_is_said(here: Path, arguments: tuple[str, ...], message: str) -> None:
    write_run(here / "shakespeare")
    with pytest.raises(UserError, match=message):
        called(*arguments)


def test_a_run_without_steps_cannot_be_plotted(here: Path) -> None:
    write_run(here / "a", stages=("documents",))
    with pytest.raises(UserError, match="nothing to plot"):
        called("a", "--plot", "x.svg")


def test_runs_of_one_name_are_told_by_their_paths(here: Path) -> None:
    a, b = write_run(here / "a"), write_run(here / "elsewhere" / "a")
    assert names_of([a, here / "b"]) == ["a", "b"]
    assert names_of([a, b]) == [str(a), str(b)]
    assert find_run("a") == Path("runs/a") and find_run(str(b)) == b


def points(svg: ElementTree.Element, line: int, chart: int) -> list[str]:
    """Hover titles of a line's points in one of the charts."""
    groups = [e for e in svg.iter() if e.get("class") == f"line-{line}" and e.find("{*}polyline") is not None]
    return [e.text or "" for e in groups[chart].iter() if e.tag.endswith("title")]


def test_the_drawing_shows_every_point_where_it_belongs(here: Path) -> None:
    write_run(here / "<a> & b")
    write_run(here / "c", bits=1.0)
    called("<a> & b", "c", "--plot", "out.svg")
    svg = ElementTree.parse("out.svg").getroot()
    titles = [e.text for e in svg.iter() if e.get("class") == "title"]
    assert titles == [f"{what} over {x}" for what in ("Bits per byte", "Training loss") for x in ("tokens", "time")]
    assert points(svg, 0, 0) == [  # the evaluations say no tokens; the steps beside them do
        "<a> & b: step 4, 4 thousand tokens: 2.250",
        "<a> & b: step 8, 8 thousand tokens: 2.125",
    ]
    assert points(svg, 1, 1)[0] == "c: step 4, 8 seconds: 1.250"
    assert len(points(svg, 1, 2)) == STEPS // 2
    assert points(svg, 0, 3)[-1] == "<a> & b: step 10, 20 seconds: 0.600"


def test_the_page_is_whole_by_itself_and_escapes_names(here: Path) -> None:
    write_run(here / "<script>", "pretrain.seed=5")
    write_run(here / "b")
    called("<script>", "b", "--plot", "out.html")
    page = Path("out.html").read_text()
    assert "<script" not in page and "http" not in re.sub(r'http-equiv|"http://www.w3.org/2000/svg"', "", page)
    assert page.count("<polyline") == 2 * 4 * 2  # two runs, four charts, two widths
    assert "<td>pretrain.seed</td><td>5</td><td>1</td>" in page


def test_steps_between_two_records_have_tokens_in_proportion(tmp_path: Path) -> None:
    steps = [{"step": 10, "tokens": 100, "loss": 1.0, "seconds": 1.0}]
    evaluations = [
        {"step": 5, "bits_per_byte": 2.0, "seconds": 0.5},
        {"step": 20, "bits_per_byte": 1.0, "seconds": 2.0},
    ]
    write_comparison(tmp_path / "x.svg", ["a"], [Metrics(steps, evaluations)], {})
    assert points(ElementTree.parse(tmp_path / "x.svg").getroot(), 0, 0) == ["a: step 5, 50 tokens: 2.000"]
