"""The stages of a recipe, each a few lines that call the room which does the work."""

from pathlib import Path
from typing import Any

from lalia.devices import process_rank
from lalia.errors import UserError
from lalia.files import fingerprint, read_json, write_json
from lalia.pipeline import Run, Stage
from lalia.progress import Progress
from lalia.training.config import RUNTIME_ONLY, parse_budget


def _collect(run: Run, out: Path, mark: str) -> dict[str, Any]:
    from lalia.data.collect import collect

    return collect(run.recipe.data, out, run.progress)


def _collect_settings(run: Run) -> dict[str, Any]:
    from lalia.data.collect import input_fingerprint

    if "files" not in run.known:
        run.known["files"] = input_fingerprint(run.recipe.data)
    return {"data": run.recipe.data.model_dump(), "files": run.known["files"]}


def _tokenize(run: Run, out: Path, mark: str) -> dict[str, Any]:
    from lalia.data.tokenize import tokenize

    return tokenize(run.recipe.tokenizer, run.path("documents"), out, run.progress)


def _plan(run: Run, out: Path, mark: str) -> dict[str, Any]:
    from lalia.planner import make_plan

    if run.recipe.plan.device:
        raise UserError(
            f"plan.device = {run.recipe.plan.device!r} plans for a device that is not here, which lalia plan shows; "
            "leave it out to train"
        )
    manifest = read_json(run.path("tokens") / "manifest.json")
    plan = make_plan(run.recipe, manifest, run.progress)
    write_json(out / "plan.json", plan)
    return {name: entry["value"] for name, entry in plan["values"].items()}


def _plan_settings(run: Run) -> dict[str, Any]:
    """What a price and a power say about a plan is no reason to make it anew, unless the budget is money."""
    budget = run.recipe.pretrain.budget
    money = budget is not None and parse_budget(budget).unit == "dollars"
    return run.recipe.plan.model_dump(exclude={"watts"} if money else {"watts", "price_per_hour"})


def _planned(run: Run) -> dict[str, Any]:
    """A plan holds what was measured on the day, so what was planned counts, not only what was asked."""
    path = run.path("plan") / "plan.json"
    plan = read_json(path) if path.exists() else {}
    return {"planned": fingerprint([plan.get(key) for key in ("values", "model")])}


def _pretrain(run: Run, out: Path, mark: str) -> dict[str, Any]:
    from lalia.training.pretrain import pretrain

    plan = read_json(run.path("plan") / "plan.json")
    return pretrain(run.recipe.pretrain, plan, run.path("tokens"), out, mark, _metrics(run, out))


def _finetune(run: Run, out: Path, mark: str) -> dict[str, Any]:
    from lalia.posttraining.finetune import finetune

    plan = read_json(run.path("plan") / "plan.json")
    return finetune(
        run.recipe.finetune,
        run.recipe.pretrain,
        plan,
        run.path("documents"),
        run.path("tokens"),
        run.path("base"),
        out,
        mark,
        _metrics(run, out),
    )


def _finetune_settings(run: Run) -> dict[str, Any]:
    """A budget becomes steps at the speed that the plan measured, which then counts too."""
    config = run.recipe.finetune
    path = run.path("plan") / "plan.json"
    speed = None
    if config.steps is None and path.exists():
        speed = read_json(path).get("predicted", {}).get("seconds_per_step")
    return {"finetune": config.model_dump(exclude=RUNTIME_ONLY), "seconds_per_step": speed}


def _evaluate(run: Run, out: Path, mark: str) -> dict[str, Any]:
    from lalia.evaluation.evaluate import evaluate

    models = {"base": run.path("base")}
    if run.recipe.finetune.enabled:
        models["chat"] = run.path("chat")
    return evaluate(run.recipe.evaluate, run.path("documents"), models, out, run.progress)


def _report(run: Run, out: Path, mark: str) -> dict[str, Any]:
    from lalia.evaluation.publish import publish

    return publish(run.folder, out)


def _metrics(run: Run, out: Path) -> Progress:
    if process_rank() > 0:
        return Progress(quiet=True)
    return Progress(out / "metrics.jsonl", quiet=run.progress.quiet)


_MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json")

STAGES = [
    Stage("documents", (), _collect_settings, _collect, ("train.parquet", "validation.parquet")),
    Stage(
        "tokens",
        ("documents",),
        lambda run: {"tokenizer": run.recipe.tokenizer.model_dump()},
        _tokenize,
        ("manifest.json", "tokenizer/tokenizer.json", "train-00000.bin", "validation-00000.bin"),
    ),
    Stage(
        "plan",
        ("tokens",),
        lambda run: {
            "model": run.recipe.model.model_dump(),
            "pretrain": run.recipe.pretrain.model_dump(exclude=RUNTIME_ONLY),
            "plan": _plan_settings(run),
        },
        _plan,
        ("plan.json",),
    ),
    Stage("base", ("tokens", "plan"), _planned, _pretrain, _MODEL_FILES, resumable=True, together=True),
    Stage(
        "chat",
        ("documents", "base"),
        _finetune_settings,
        _finetune,
        _MODEL_FILES,
        resumable=True,
        together=True,
        wanted=lambda recipe: recipe.finetune.enabled,
    ),
    Stage(
        "evaluation",
        ("documents", "base", "chat"),
        lambda run: {"evaluate": run.recipe.evaluate.model_dump()},
        _evaluate,
        ("results.json",),
    ),
    Stage(
        "report",
        ("documents", "tokens", "plan", "base", "chat", "evaluation"),
        lambda run: {},
        _report,
        ("report.html",),
    ),
]

VERBS = {
    "collect": "documents",
    "tokenize": "tokens",
    "plan": "plan",
    "pretrain": "base",
    "finetune": "chat",
    "evaluate": "evaluation",
}
"""Which stage each verb of the command line ends with."""
