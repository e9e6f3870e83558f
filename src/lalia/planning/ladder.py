"""The ladder: small runs that a scaling law is fitted to, which to make, and how to read finished ones."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lalia.errors import UserError
from lalia.files import read_json
from lalia.model.config import ModelConfig
from lalia.planning.law import Law, RunPoint, effective_bytes, fit, overfitting

NUM_SIZES = 3
SHARES = (1 / 24, 1 / 8)
"""Parts of the budget that each rung takes: with three sizes the ladder costs half the budget."""
LEAST_RUNG_STEPS = 50


class FinishedRun(NamedTuple):
    """What a law needs of a run.

    `overfitting` is the factor of its bits per byte that is put down to repeated text, which the law knows nothing of;
    `flops` is the computation of its training, `data` what has to be equal among runs that are compared.
    """

    point: RunPoint
    overfitting: float
    flops: float
    unique_bytes: float
    bytes_per_token: float
    data: tuple[int, int]


class Rung(NamedTuple):
    """One small run to make: width, layers, steps and the seconds it should take."""

    hidden_size: int
    num_hidden_layers: int
    steps: int
    seconds: float


def read_run(folder: Path) -> FinishedRun:
    """Size, data and final bits per byte of a run whose base model is finished.

    Evaluations along the way do not count: a run whose learning rate has not yet decayed is worse than one that was
    planned to end there (Hoffmann et al. 2022).

    Raises:
        UserError: if it is no run folder, or its base model is not finished.
    """
    receipt = folder / "base" / "receipt.json"
    if not receipt.is_file():
        raise UserError(
            f"{folder} holds no finished base model (no {receipt.relative_to(folder)}); finish it with lalia pretrain "
            f"{folder}, or leave it out"
        )
    summary = read_json(receipt)["summary"]
    plan = read_json(folder / "plan" / "plan.json")
    splits = read_json(folder / "tokens" / "manifest.json")["splits"]
    shape = ModelConfig.parse(plan["model"], str(folder / "plan" / "plan.json"))
    train, held_out = splits["train"], splits["validation"]
    bytes_per_token = train["num_bytes"] / train["num_tokens"]
    effective = effective_bytes(summary["tokens"] * bytes_per_token, train["num_bytes"])
    score = summary.get("bits_per_byte")
    if not score:
        raise UserError(f"{folder} has no bits per byte of its base model; leave it out")
    weights = shape.num_matrix_parameters()
    point = RunPoint(str(folder), weights, effective, float(score))
    harm = overfitting(summary["tokens"] / train["num_tokens"], weights, train["num_tokens"])
    length = plan["values"]["sequence_length"]["value"]
    flops = shape.flops_per_token(length) * summary["tokens"]
    data = (int(train["num_bytes"]), int(held_out["num_bytes"]))
    return FinishedRun(point, harm, flops, float(train["num_bytes"]), bytes_per_token, data)


def fit_runs(folders: Sequence[Path]) -> tuple[Law, list[FinishedRun]]:
    """The law of finished runs on the same data, and the runs.

    Raises:
        UserError: if a run is not finished, the runs saw different texts, or they are too few or too alike.
    """
    runs = [read_run(folder) for folder in folders]
    for run in runs[1:]:
        if run.data != runs[0].data:
            raise UserError(
                f"{run.point.name} and {runs[0].point.name} have different texts (training and held-out bytes "
                f"{run.data} and {runs[0].data}); a law needs runs on the same data"
            )
    points = [run.point._replace(bits_per_byte=run.point.bits_per_byte / run.overfitting) for run in runs]
    return fit(points, f"{len(runs)} runs: " + ", ".join(run.point.name for run in runs)), runs


def rungs(sizes: Sequence[tuple[int, int, float]], chosen: int, seconds: float) -> list[Rung]:
    """Small runs around a planned size that tell what size and what data are worth.

    Args:
        sizes: (hidden_size, num_hidden_layers, seconds per step) of the sizes there are, in order.
        chosen: which of them was planned.
        seconds: time of the planned run.
    """
    first = max(0, min(chosen - NUM_SIZES + 1, len(sizes) - NUM_SIZES))
    found = []
    for hidden_size, layers, per_step in sizes[first : first + NUM_SIZES]:
        for share in SHARES:  # each thrice the one before, so that a law can tell them apart
            least = round(LEAST_RUNG_STEPS * share / SHARES[0])
            steps = max(least, round(seconds * share / per_step))
            found.append(Rung(hidden_size, layers, steps, steps * per_step))
    return found


def commands(
    ladder: Sequence[Rung], plan: dict[str, Any], source: str, folder: Path, budget: str, overrides: Sequence[str]
) -> list[str]:
    """The shell commands that make the runs of a ladder under `folder`, and the one that fits the law to them.

    Args:
        ladder: the runs.
        plan: of the run that the ladder is for.
        source: recipe or run folder that it was planned from.
        folder: where the runs are to lie.
        budget: what the law is to plan for, as in `pretrain.budget`.
        overrides: "section.key=value" settings that were given; those that a rung decides itself are left out, and
            those of the plan go to the command that fits.
    """
    values = {name: entry["value"] for name, entry in plan["values"].items()}
    fixed = f"pretrain.sequence_length={values['sequence_length']} pretrain.batch_size={values['batch_size']}"
    own = (
        *("plan.", "model.hidden_size=", "model.num_hidden_layers="),
        *("pretrain.budget=", "pretrain.steps=", "pretrain.sequence_length=", "pretrain.batch_size="),
    )
    kept = [shlex.quote(setting) for setting in overrides if not setting.startswith(own)]
    begin = " ".join(["lalia pretrain", shlex.quote(source), *kept])
    lines = []
    for rung in ladder:
        size = f"model.hidden_size={rung.hidden_size} model.num_hidden_layers={rung.num_hidden_layers}"
        run = shlex.quote(f"{folder}/width-{rung.hidden_size}-steps-{rung.steps}")
        lines.append(f"{begin} {size} pretrain.steps={rung.steps} {fixed} --run {run}")
    machine = [shlex.quote(setting) for setting in overrides if setting.startswith("plan.")]
    fit_command = f"lalia plan --fit {shlex.quote(str(folder))}/width-*"
    return [*lines, " ".join([fit_command, *machine, "--budget", shlex.quote(budget)])]
