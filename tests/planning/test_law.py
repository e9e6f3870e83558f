"""Scaling laws fitted to runs that the test makes up, and so knows the truth of."""

import json
import math
import shlex
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from lalia.errors import CorruptFile, UserError
from lalia.planning.chart import Curve, Mark, best_at
from lalia.planning.ladder import Rung, commands, fit_runs, read_run, rungs
from lalia.planning.law import (
    Law,
    RunPoint,
    effective_bytes,
    fit,
    load_law,
    overfitting,
    useful_epochs,
)
from lalia.progress import Progress
from lalia.recipe import Recipe, load_recipe, to_toml
from lalia.scaling import fit_and_plan, plan_ladder

SIZES, AMOUNTS = (0.9e6, 2.1e6, 5e6), (1e6, 4e6, 12e6)
LAWS = (
    (0.9, 60, 0.30, 80, 0.30),
    (1.6, 380.8, 0.56, 312.9, 0.48),
    (0.7, 30, 0.28, 25, 0.22),
    (1.1, 200, 0.4, 400, 0.42),
)
FAR = ((2e7, 1e8), (5e6, 6e7))


def true_score(law: tuple[float, ...], size: float, amount: float) -> float:
    floor, size_factor, size_exponent, data, data_exponent = law
    return floor + size_factor / size**size_exponent + data / amount**data_exponent


def runs_of(law: tuple[float, ...], noise: float = 0.0, seed: int = 0) -> list[RunPoint]:
    random = np.random.default_rng(seed)
    return [
        RunPoint(
            f"{size:.0f}/{amount:.0f}", size, amount, true_score(law, size, amount) * math.exp(random.normal(0, noise))
        )
        for size in SIZES
        for amount in AMOUNTS
    ]


def width(law: Law, size: float, amount: float) -> float:
    low, high = law.interval(size, amount)
    return (high - low) / law.bits_per_byte(size, amount)


@pytest.mark.parametrize("law", LAWS)
def test_a_known_law_is_found_again(law: tuple[float, ...]) -> None:
    found = fit(runs_of(law))
    for point in runs_of(law):
        assert found.bits_per_byte(*point[1:3]) == pytest.approx(point.bits_per_byte, rel=0.003)
    assert (found.size_exponent, found.data_exponent) == pytest.approx((law[2], law[4]), abs=0.12)
    for size, amount in FAR:
        assert found.bits_per_byte(size, amount) == pytest.approx(true_score(law, size, amount), rel=0.04)


def test_intervals_cover_the_truth_beyond_the_runs() -> None:
    covered = total = 0
    for law in LAWS:
        for seed in range(2):
            found = fit(runs_of(law, 0.003, seed))
            for size, amount in FAR:
                low, high = found.interval(size, amount)
                covered += low <= true_score(law, size, amount) <= high
                total += 1
                assert high / low < 1.4  # an interval of everything would cover too
    assert covered >= 0.9 * total


def test_runs_of_another_form_get_a_wide_interval() -> None:
    """The negative control: bits per byte that go up and down with size and data are no power law."""
    lawful = runs_of(LAWS[1], 0.003)
    waves = [
        run._replace(bits_per_byte=run.bits_per_byte + 0.3 * math.sin(9 * math.log(run[1] * run[2]))) for run in lawful
    ]
    good, bad = fit(lawful), fit(waves)
    for size, amount in FAR:
        assert width(bad, size, amount) > 3 * width(good, size, amount)
    assert np.median(bad.draws[:, 5]) > 5 * np.median(good.draws[:, 5])


def test_one_bad_run_does_not_bend_the_law() -> None:
    runs = runs_of(LAWS[1])
    bent = [runs[0]._replace(bits_per_byte=runs[0].bits_per_byte * 1.3), *runs[1:]]
    expected = fit(runs).bits_per_byte(*FAR[0])
    assert fit(bent).bits_per_byte(*FAR[0]) == pytest.approx(expected, rel=0.03)


def test_too_few_or_too_alike_runs_are_refused_with_their_numbers() -> None:
    runs = runs_of(LAWS[0])
    with pytest.raises(UserError, match=r"at least 5 finished runs .* these are 4 of 2 sizes .*--ladder prints runs"):
        fit(runs[:4])
    with pytest.raises(UserError, match=r"these are 9 of 1 sizes \(1.0x apart\) and 3 amounts of data \(12.0x apart\)"):
        fit([run._replace(matrix_parameters=1e6) for run in runs])
    with pytest.raises(UserError, match="9 of 3 sizes .* and 1 amounts of data"):
        fit([run._replace(effective_bytes=1e6) for run in runs])


def test_a_law_file_reads_back(tmp_path: Path) -> None:
    law = fit(runs_of(LAWS[0], 0.003), "nine runs")
    law.save(tmp_path / "law.json")
    again = load_law(tmp_path / "law.json")
    assert again.bits_per_byte(*FAR[0]) == pytest.approx(law.bits_per_byte(*FAR[0]), rel=1e-4)
    assert again.interval(*FAR[0]) == pytest.approx(law.interval(*FAR[0]), rel=1e-3)
    assert (again.points, again.source, again.largest) == (law.points, "nine runs", (5e6, 12e6))
    assert (again.extrapolation(1e6, 1e6), again.extrapolation(5e7, 1e6)) == (1.0, 10.0)
    with pytest.raises(UserError, match="no law file"):
        load_law(tmp_path / "none.json")
    for change in ({"draws": []}, {"draws": [[1, 2]]}, {"floor": None}, {"largest": [1]}, {"points": [{"x": 1}]}):
        content = json.loads((tmp_path / "law.json").read_text()) | change
        (tmp_path / "bad.json").write_text(json.dumps(content))
        with pytest.raises(CorruptFile, match="is no law file"):
            load_law(tmp_path / "bad.json")


def test_the_law_that_comes_with_lalia() -> None:
    law = load_law(None)
    low, high = law.interval(2e6, 9e6)
    assert low < law.bits_per_byte(2e6, 9e6) < high
    assert law.bits_per_byte(2.11e6, 9e6) == pytest.approx(1.853, rel=0.01)  # the demo (LOG.md, 2026-11-24)
    assert width(law, 1e9, 1e10) > width(law, 2e6, 9e6)


def test_repeated_data() -> None:
    """Muennighoff et al. 2023: repeats help, less and less, never as much as fresh text, and never without end."""
    once, four, forty, endless = (effective_bytes(n * 1e6, 1e6) for n in (1, 4, 40, 1e6))
    assert once == 1e6
    assert once < four < forty < endless < 17e6
    assert 3.6e6 < four < effective_bytes(4e6, 4e6) == 4e6


# Runs on disk


def write_run(
    folder: Path, hidden_size: int, tokens: int, law: tuple[float, ...] = LAWS[1], held_out: int = 9999
) -> Path:
    recipe = Recipe.parse({"name": "corpus", "pretrain": {"steps": 100, "precision": "float32"}})
    shape = recipe.model.build(4096, 256, hidden_size, 3)
    train = {"num_bytes": 8_000_000, "num_tokens": 2_500_000, "num_documents": 30}
    score = true_score(law, shape.num_matrix_parameters(), effective_bytes(tokens * 3.2, 8e6))
    files: dict[str, Any] = {
        "plan/plan.json": {"model": shape.model_dump(), "values": {"sequence_length": {"value": 256, "reason": "."}}},
        "tokens/manifest.json": {"vocab_size": 4096, "splits": {"train": train, "validation": {"num_bytes": held_out}}},
        "base/receipt.json": {"summary": {"tokens": tokens, "bits_per_byte": round(score, 4)}},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    values = recipe.model_dump(mode="json")
    values["model"] |= {"hidden_size": hidden_size, "num_hidden_layers": 3}
    (folder / "recipe.toml").write_text(to_toml(values))
    return folder


@pytest.fixture
def ladder(tmp_path: Path) -> list[Path]:
    return [
        write_run(tmp_path / f"width-{hidden_size}-{tokens}", hidden_size, tokens)
        for hidden_size in (64, 128, 192)
        for tokens in (300_000, 1_200_000)
    ]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def step_seconds(shape: Any, rows: int, length: int, precision: str, steps: int, parts: int, *_: Any) -> float:
        return shape.flops_per_token(length) * rows * parts * length / 5e10

    monkeypatch.setattr("lalia.planning.speed.measure_step", step_seconds)


def test_learning_by_heart() -> None:
    """What runs of one text came to beside the law, in passes, weights and tokens (LOG.md, 2026-12-01)."""
    seen = [
        (2.74, 2.1e6, 1.024),
        (3.38, 2.1e6, 1.046),
        (4.64, 2.1e6, 1.087),
        (2.23, 5.0e6, 1.005),
        (2.95, 5.0e6, 1.020),
    ]
    for epochs, weights, factor in seen:
        assert overfitting(epochs, weights, 1.42e6) == pytest.approx(factor, abs=0.008)
    assert overfitting(1.0, 1e9, 1e6) == 1.0
    assert overfitting(4.0, 1e6, 2e7) == 1.0  # twenty tokens a weight, as in what was published
    assert 1.0 < overfitting(4.0, 1e6, 4e6) < overfitting(4.0, 1e6, 1e6)
    costs = [overfitting(epochs, 1e6, 1e6) for epochs in (4.9, 5.0, 5.1, 5.2)]
    assert np.diff(costs) == pytest.approx(np.diff(costs)[0], rel=0.05)  # no step where the measurements end
    law = Law(*LAWS[1], draws=np.ones((1, 6)), source="", largest=(1.0, 1.0))
    assert 1.5 < useful_epochs(law, 1e6, 1e6, 3e6) < 4
    assert useful_epochs(law, 1e6, 2e7, 6e7) > 30


def test_a_run_that_learnt_by_heart_counts_as_if_it_had_not(tmp_path: Path) -> None:
    """The law is that of text that does not repeat; planning multiplies the harm in again."""
    run = read_run(write_run(tmp_path / "run", 192, 10_000_000))  # four passes
    summary = json.loads((tmp_path / "run/base/receipt.json").read_text())["summary"]
    factor = overfitting(4.0, run.point.matrix_parameters, 2.5e6)
    assert factor > 1.02
    assert run.point.bits_per_byte == summary["bits_per_byte"]  # what is shown is what was measured
    assert run.overfitting == factor


def test_the_law_is_fitted_to_what_repeating_did_not_spoil(ladder: list[Path], tmp_path: Path) -> None:
    spoilt = write_run(tmp_path / "spoilt", 192, 10_000_000)
    law = fit([read_run(folder).point for folder in (*ladder, spoilt)])  # not spoilt yet
    receipt = json.loads((spoilt / "base/receipt.json").read_text())
    receipt["summary"]["bits_per_byte"] *= read_run(spoilt).overfitting
    (spoilt / "base/receipt.json").write_text(json.dumps(receipt))
    again, runs = fit_runs([*ladder, spoilt])
    assert runs[-1].overfitting > 1.02
    for weights, amount in FAR:
        assert again.bits_per_byte(weights, amount) == pytest.approx(law.bits_per_byte(weights, amount), rel=1e-3)


def test_finished_runs_are_read(ladder: list[Path]) -> None:
    law, runs = fit_runs(ladder)
    assert [run.point.name for run in runs] == [str(folder) for folder in ladder]
    assert runs[0].point.effective_bytes == 300_000 * 3.2
    assert law.bits_per_byte(*runs[0].point[1:3]) == pytest.approx(runs[0].point.bits_per_byte, rel=0.01)


def test_runs_that_make_no_law(ladder: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no finished base model \(no base/receipt\.json\); finish it with"):
        read_run(tmp_path / "none")
    (ladder[0] / "base" / "receipt.json").unlink()
    with pytest.raises(UserError, match="holds no finished base model"):
        fit_runs(ladder)
    with pytest.raises(UserError, match="have different texts"):
        fit_runs([*ladder[1:], write_run(tmp_path / "other", 256, 500_000, held_out=7)])


@pytest.mark.usefixtures("measured")
def test_fit_then_plan_with_it(ladder: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "mine.json"
    result, drawn = fit_and_plan(ladder, ['pretrain.budget="20 minutes"'], out, Progress(quiet=True))
    plan = result["plan"]
    values = {name: entry["value"] for name, entry in plan["values"].items()}
    assert values["hidden_size"] not in (64, 0)
    assert values["steps"] != 100  # the ladder's own size and steps are not the plan's
    shape, tokens = plan["model"], values["tokens"]
    law = load_law(out)
    weights = load_shape(shape).num_matrix_parameters()
    expected = law.bits_per_byte(weights, effective_bytes(tokens * 3.2, 8e6))
    expected *= overfitting(tokens / 2.5e6, weights, 2.5e6)
    assert plan["predicted"]["bits_per_byte"] == pytest.approx(expected, abs=0.002)
    low, high = plan["predicted"]["bits_per_byte_interval"]
    assert low <= true_score(LAWS[1], weights, effective_bytes(tokens * 3.2, 8e6)) <= high
    assert drawn.count("o") >= 4
    assert "X" in drawn
    assert len(ElementTree.parse(out.with_suffix(".svg")).findall(".//{*}circle")) == 7
    only_law, drawn = fit_and_plan(ladder, [], out, Progress(quiet=True))
    assert only_law["plan"] is None
    assert "X" not in drawn


def load_shape(values: dict[str, Any]) -> Any:
    from lalia.model.config import ModelConfig

    return ModelConfig.parse(values)


@pytest.mark.usefixtures("measured")
def test_the_ladder_that_is_proposed_makes_a_law() -> None:
    manifest = {"vocab_size": 4096, "splits": {"train": {"num_bytes": 8_000_000, "num_tokens": 2_500_000}}}
    recipe = Recipe.parse({"pretrain": {"budget": "10 minutes", "precision": "float32"}})
    proposed = plan_ladder(recipe, manifest, "corpus", [], Path("runs/corpus-ladder"), Progress(quiet=True))
    assert proposed["seconds"] == pytest.approx(300, rel=0.15)
    *make, fit_command = proposed["commands"]
    assert len(make) == 6
    assert fit_command == "lalia plan --fit runs/corpus-ladder/width-* --budget '10 minutes'"
    points = []
    for command in make:
        words = command.split()
        settings = [word for word in words[3:] if "=" in word]
        made = load_recipe("shakespeare", settings)  # every key is one there is
        shape = made.model.build(4096, made.pretrain.sequence_length or 0)
        tokens = (made.pretrain.steps or 0) * (made.pretrain.batch_size or 0) * (made.pretrain.sequence_length or 0)
        size, amount = shape.num_matrix_parameters(), effective_bytes(tokens * 3.2, 8e6)
        points.append(RunPoint(words[-1], size, amount, true_score(LAWS[1], size, amount)))
    assert fit(points).floor > 0


def test_rungs_stay_among_the_sizes() -> None:
    sizes = [(64, 2, 0.1), (128, 2, 0.2), (192, 3, 0.4), (256, 5, 0.8)]
    for chosen, widths in ((0, {64, 128, 192}), (2, {64, 128, 192}), (3, {128, 192, 256})):
        assert {rung.hidden_size for rung in rungs(sizes, chosen, 240.0)} == widths
    plan = {"values": {"sequence_length": {"value": 256}, "batch_size": {"value": 8}}, "predicted": {"seconds": 240.0}}
    given = ["pretrain.budget=1 hour", "model.family=llama", "name=my run", "model.hidden_size=64", "plan.watts=9"]
    line, fit_command = commands([Rung(64, 2, 100, 10.0)], plan, "my files", Path("my runs"), "4 minutes", given)
    assert shlex.split(line) == [
        *("lalia", "pretrain", "my files", "model.family=llama", "name=my run"),
        *("model.hidden_size=64", "model.num_hidden_layers=2", "pretrain.steps=100"),
        *("pretrain.sequence_length=256", "pretrain.batch_size=8", "--run", "my runs/width-64-steps-100"),
    ]
    assert fit_command == "lalia plan --fit 'my runs'/width-* plan.watts=9 --budget '4 minutes'"


def test_rungs_of_a_short_budget_still_differ() -> None:
    made = rungs([(64, 2, 0.1), (128, 2, 0.2), (192, 3, 0.4)], 2, 10.0)
    assert [rung.steps for rung in made] == [50, 150] * 3


def test_the_curve_is_the_envelope_of_all_sizes(ladder: list[Path]) -> None:
    law, runs = fit_runs(ladder)
    for run in runs:
        tokens = run.point.effective_bytes / 3.2
        assert (
            best_at(law, 6 * run.point.matrix_parameters * tokens, 8e6, 3.2)
            <= law.bits_per_byte(*run.point[1:3]) + 1e-3
        )
    curve = Curve(law, runs, Mark(1e15, 1.7, (1.6, 1.8), "<plan>"))
    scores = [score for _, score in curve.line]
    assert scores == sorted(scores, reverse=True)
    assert "&lt;plan&gt;" in curve.svg()
