"""From one's own small runs to a plan: a scaling law fitted to finished runs, and the runs to make for it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lalia.files import write_text
from lalia.model.config import ModelConfig
from lalia.pipeline import load_run_recipe
from lalia.planner import facts_of_data, make_plan
from lalia.planning.chart import Curve, Mark
from lalia.planning.ladder import commands, fit_runs, rungs
from lalia.planning.sizes import candidates
from lalia.planning.speed import relative_cost
from lalia.progress import Progress
from lalia.recipe import Recipe, toml_value
from lalia.training.pretrain import uncompiled_seconds_per_step


def fit_and_plan(
    folders: Sequence[Path], overrides: Sequence[str], out: Path, progress: Progress
) -> tuple[dict[str, Any], str]:
    """Fit a scaling law to finished runs, write it and its curve, and plan with it if a budget is given.

    Args:
        folders: run folders on the same data; the first one's recipe is planned with, less its size and steps.
        overrides: "section.key=value" settings of the plan; without pretrain.budget nothing is planned.
        out: the law file; the curve goes beside it, as .svg.
        progress: where to report.

    Returns:
        {"law": constants, "runs": [...], "files": [...], "plan": a plan or None}, and the curve drawn in characters.

    Raises:
        UserError: if the runs do not make a law.
    """
    law, runs = fit_runs(folders)
    law.save(out)
    plan, prediction = None, None
    if any(override.startswith("pretrain.budget=") for override in overrides):
        recipe = load_run_recipe(folders[0], [*overrides, f"plan.law={toml_value(str(out.absolute()))}"])
        recipe = free_size(recipe)
        plan = make_plan(recipe, facts_of_data(recipe, folders[0]), progress)
        predicted = plan["predicted"]
        low, high = predicted["bits_per_byte_interval"]
        prediction = Mark(predicted["flops"], predicted["bits_per_byte"], (low, high), "the plan")
    curve = Curve(law, runs, prediction)
    write_text(out.with_suffix(".svg"), curve.svg())
    result = {
        "law": law.constants(),
        "runs": [
            run.point._asdict() | {"expected": round(law.bits_per_byte(*run.point[1:3]), 4), "flops": run.flops}
            for run in runs
        ],
        "files": [str(out), str(out.with_suffix(".svg"))],
        "plan": plan,
    }
    return result, curve.text()


def plan_ladder(
    recipe: Recipe, manifest: dict[str, Any], source: str, overrides: Sequence[str], folder: Path, progress: Progress
) -> dict[str, Any]:
    """Small runs that tell how this data scales, for a plan with a law of one's own.

    Args:
        recipe: what is planned, `overrides` applied.
        manifest: as for `make_plan`.
        source, overrides: what the recipe was read from, for the commands.
        folder: where the runs are to lie.
        progress: where to report.

    Returns:
        {"rungs": [...], "seconds": of all of them, "commands": shell commands that make them and fit the law}.

    Raises:
        UserError: as `make_plan`.
    """
    plan = make_plan(recipe, manifest, progress)
    values = {name: entry["value"] for name, entry in plan["values"].items()}
    shape, length = ModelConfig.parse(plan["model"], "plan"), values["sequence_length"]
    shapes = candidates(free_size(recipe).model, shape.vocab_size, length)
    per_step = uncompiled_seconds_per_step(plan)
    sizes = [(one.hidden_size, one.num_hidden_layers, per_step * relative_cost(one, shape, length)) for one in shapes]
    chosen = max((i for i, size in enumerate(sizes) if size[0] <= shape.hidden_size), default=0)
    budget = recipe.pretrain.budget or f"{plan['predicted']['seconds']:.0f} seconds"
    made = rungs(sizes, chosen, plan["predicted"]["seconds"])
    return {
        "rungs": [rung._asdict() for rung in made],
        "seconds": round(sum(rung.seconds for rung in made), 1),
        "commands": commands(made, plan, source, folder, budget, overrides),
    }


def free_size(recipe: Recipe) -> Recipe:
    """The recipe with width, depth and steps left to the planner."""
    model = recipe.model.model_copy(update={"hidden_size": None, "num_hidden_layers": None})
    return recipe.model_copy(update={"model": model, "pretrain": recipe.pretrain.model_copy(update={"steps": None})})
