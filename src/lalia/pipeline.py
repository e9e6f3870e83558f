"""Runs the stages of a recipe in order; each is done once, continues if it was interrupted, and says why if redone.

A stage works in `runs/NAME/.STAGE.partial` and is renamed to `runs/NAME/STAGE` when it is complete, with a receipt.
The fingerprint in the receipt covers the stage's settings and those of everything it was made from: the same
fingerprint means done; a partial folder with the same fingerprint is continued; anything else is made anew, and the
old result stays until the new one is whole.

Several processes (torchrun, Ray) may run the same recipe in one folder that all of them see: the first does what one
process does, all take part in the stages that train `together`, and the others wait for the rest.
"""

import contextlib
import json
import shutil
import sys
import time
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lalia import __version__
from lalia.devices import process_rank, reset_peak_memory
from lalia.errors import CorruptFile, UserError
from lalia.files import fingerprint, read_json, replace_directory, run_lock, write_json, write_text
from lalia.progress import Progress
from lalia.provenance import record_start
from lalia.recipe import Recipe, load_recipe, read_toml, to_toml


@dataclass(frozen=True)
class Run:
    """A run folder and the recipe that fills it."""

    folder: Path
    recipe: Recipe
    progress: Progress
    known: dict[str, Any] = field(default_factory=dict)
    """What stages looked up once for the whole run, so that files that change meanwhile cannot confuse it."""

    def path(self, stage: str) -> Path:
        """Folder of a finished stage."""
        return self.folder / stage


@dataclass(frozen=True)
class Stage:
    """One step of the recipe.

    Attributes:
        name: also the folder's name.
        inputs: stages it reads.
        settings: what, besides the inputs, its result depends on.
        make: does the work in a given empty (or interrupted, if `resumable`) folder; returns a summary.
        files: without these in its folder the stage is not done.
        resumable: keeps the partial folder of an interrupted attempt.
        wanted: whether the recipe has this stage at all.
        version: raised when the stage's output changes for the same settings.
        together: every process takes part in making it; other stages are the first process's work.
    """

    name: str
    inputs: tuple[str, ...]
    settings: Callable[[Run], dict[str, Any]]
    make: Callable[[Run, Path, str], dict[str, Any]]
    files: tuple[str, ...]
    resumable: bool = False
    wanted: Callable[[Recipe], bool] = lambda recipe: True
    version: int = 1
    together: bool = False


def run_recipe(
    recipe: Recipe, folder: Path | None = None, until: str | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Run the stages of a recipe up to `until`.

    Args:
        recipe: what to make.
        folder: the run folder; default runs/NAME.
        until: name of the last stage to run; None means all.
        progress: where to report; by default to stderr and log.jsonl.

    Returns:
        the summary of each stage by name, with "run" the folder.

    Raises:
        UserError: for anything the user can mend: data, settings, a folder in use, a full disk.
    """
    folder = folder or Path("runs") / recipe.name
    if process_rank() > 0:
        run = Run(folder, recipe, Progress(quiet=True))
        return {"run": str(folder)} | {stage.name: _help(run, stage) for stage in stages_until(recipe, until)}
    with run_lock(folder):
        progress = progress or Progress(folder / "log.jsonl")
        if progress.log_path is None:
            progress.log_path = folder / "log.jsonl"
        run = Run(folder, recipe, progress)
        stages = stages_until(recipe, until)
        status(run, stages[0])  # data that is missing is found before the folder's recipe.toml is replaced
        _record_start(run)
        results: dict[str, Any] = {"run": str(folder)}
        for stage in stages:
            try:
                results[stage.name] = _ensure(run, stage)
            except BrokenPipeError:  # nobody reads what is printed any more: not a matter of the run's files
                raise
            except OSError as error:
                raise UserError(_explain(error, run.folder, stage.name)) from error
        return results


def stages_until(recipe: Recipe, until: str | None) -> list[Stage]:
    """The stages that the recipe wants, in order, up to and including `until`."""
    from lalia.stages import STAGES

    wanted = [stage for stage in STAGES if stage.wanted(recipe)]
    if until is None:
        return wanted
    names = [stage.name for stage in wanted]
    if until not in names:
        raise UserError(f"this recipe has no stage {until!r}; its stages are {', '.join(names)}")
    return wanted[: names.index(until) + 1]


def status(run: Run, stage: Stage) -> tuple[str, str]:
    """("done" | "continue" | "make", reason) of a stage, without doing anything."""
    identity = _identity(run, stage)
    wanted = fingerprint(identity)
    reason = "not made yet"
    receipt = _receipt(run.path(stage.name))
    if receipt is not None:
        missing = [name for name in stage.files if not (run.path(stage.name) / name).exists()]
        if receipt["fingerprint"] != wanted:
            reason = "made anew because " + _difference(receipt["identity"], identity)
        elif missing:
            reason = f"made anew because {run.path(stage.name) / missing[0]} is missing"
        else:
            return "done", f"finished in {receipt['seconds']:.0f} s"
    started = _started(_partial(run, stage))
    if started is not None and stage.resumable:
        if started["fingerprint"] == wanted:
            return "continue", "interrupted earlier"
        if receipt is None:
            reason = f"started anew because {_difference(started['identity'], identity)} since it was interrupted"
    return "make", reason


def stage_fingerprint(run: Run, stage: Stage) -> str:
    """Identity of a stage's result: its settings and the fingerprints of its inputs."""
    return fingerprint(_identity(run, stage))


def _identity(run: Run, stage: Stage) -> dict[str, Any]:
    from lalia.stages import STAGES

    by_name = {s.name: s for s in STAGES}
    inputs = {name: stage_fingerprint(run, by_name[name]) for name in stage.inputs if by_name[name].wanted(run.recipe)}
    return json.loads(
        json.dumps({"version": stage.version, "settings": stage.settings(run), "inputs": inputs}, default=str)
    )


def _ensure(run: Run, stage: Stage) -> dict[str, Any]:
    state, reason = status(run, stage)
    if state == "done":
        run.progress.say(f"{stage.name}: done ({reason})")
        return read_json(run.path(stage.name) / "receipt.json")["summary"]
    identity = _identity(run, stage)
    mark = fingerprint(identity)
    finished = _receipt(_partial(run, stage))
    if finished is not None and finished["fingerprint"] == mark:  # it was stopped just before the rename
        return _put_in_place(run, stage, finished)
    _refuse_foreign_folder(run.path(stage.name), stage)
    run.progress.heading(f"{stage.name}: {'continuing' if state == 'continue' else reason}")
    partial = _partial(run, stage)
    if state == "make" and partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    write_json(partial / STARTED, {"fingerprint": mark, "identity": identity})
    began = time.monotonic()
    run.progress.record("stage_start", stage=stage.name, state=state, reason=reason)
    previous = _seconds_so_far(partial)
    reset_peak_memory()
    try:
        summary = stage.make(run, partial, mark)
    finally:
        with contextlib.suppress(OSError):  # on a full disk the stage's own error is the one to report
            (partial / ".seconds").write_text(str(previous + time.monotonic() - began), encoding="utf-8")
    receipt = {
        "stage": stage.name,
        "fingerprint": mark,
        "seconds": round(previous + time.monotonic() - began, 2),
        "summary": summary,
        "identity": identity,
    }
    write_json(partial / "receipt.json", receipt)
    return _put_in_place(run, stage, receipt)


def _help(run: Run, stage: Stage) -> dict[str, Any]:
    """The part of a process that is not the first: train together, wait for everything else."""
    mark = stage_fingerprint(run, stage)
    partial = _partial(run, stage)
    deadline = time.monotonic() + OTHER_WORK_SECONDS
    while not _finished(run, stage):
        begun = _begun(partial)
        if begun is None or begun["fingerprint"] == mark:
            deadline = time.monotonic() + OTHER_WORK_SECONDS
        elif time.monotonic() > deadline:
            other = _difference(begun["identity"], _identity(run, stage))
            raise UserError(
                f"the first process works on {stage.name} with other inputs than this one sees ({other}); start all "
                "with the same command, and keep the text and the run folder where every machine sees the same files"
            )
        if stage.together and begun is not None and begun["fingerprint"] == mark:
            stage.make(run, partial, mark)
            break
        time.sleep(POLL_SECONDS)
    while not _finished(run, stage):
        time.sleep(POLL_SECONDS)
    return read_json(run.path(stage.name) / "receipt.json")["summary"]


def _finished(run: Run, stage: Stage) -> bool:
    with contextlib.suppress(CorruptFile, FileNotFoundError):  # the first process is moving the folder, or will say so
        return status(run, stage)[0] == "done"
    return False


def _begun(partial: Path) -> dict[str, Any] | None:
    """What the first process has begun there and not finished."""
    with contextlib.suppress(CorruptFile, FileNotFoundError):  # likewise
        return None if _receipt(partial) is not None else _started(partial)
    return None


OTHER_WORK_SECONDS = 60.0
"""How long what was begun may be of other settings: until the first process has removed an older run's rest."""
POLL_SECONDS = 0.2
"""Between two looks of a waiting process at the first one's progress. If the first dies, torchrun ends the others."""


def _refuse_foreign_folder(target: Path, stage: Stage) -> None:
    """A stage replaces its own earlier result, never a folder that somebody else filled.

    Raises:
        UserError: if the folder holds files and no stage made it.
    """
    ours = ("receipt.json", *stage.files)
    if target.is_dir() and any(target.iterdir()) and not any((target / name).exists() for name in ours):
        raise UserError(
            f"{target} holds files and none of Lalia's, so it may be yours and is left alone; move it away, or "
            "choose another run folder with --run FOLDER"
        )


def _put_in_place(run: Run, stage: Stage, receipt: dict[str, Any]) -> dict[str, Any]:
    partial = _partial(run, stage)
    # Checkpoints go only now that the receipt is written: until then a killed stage continues from them.
    for checkpoint in (*partial.glob("step-*"), *partial.glob(".step-*")):
        if checkpoint.is_dir():
            shutil.rmtree(checkpoint)
        else:  # of a version that kept each in two files
            checkpoint.unlink()
    for leftover in (partial / STARTED, partial / ".seconds"):
        leftover.unlink(missing_ok=True)
    replace_directory(partial, run.path(stage.name))
    run.progress.record("stage_end", stage=stage.name, seconds=receipt["seconds"])
    run.progress.say(f"{stage.name}: finished in {receipt['seconds']:.0f} s")
    return receipt["summary"]


STARTED = ".started.json"
"""In a partial folder: the identity of what was begun there."""


def _partial(run: Run, stage: Stage) -> Path:
    return run.folder / f".{stage.name}.partial"


def _receipt(folder: Path) -> dict[str, Any] | None:
    """The receipt of a stage's folder, None if there is none.

    Raises:
        CorruptFile: if it is damaged. Guessing would redo what may have taken hours.
    """
    path = folder / "receipt.json"
    if not path.exists():
        return None
    receipt = read_json(path)
    kinds = {"fingerprint": str, "seconds": int | float, "summary": dict, "identity": dict}
    if not isinstance(receipt, dict) or any(not isinstance(receipt.get(key), kind) for key, kind in kinds.items()):
        raise CorruptFile(
            f"{path} is no receipt of a stage; delete the folder {folder} and run the same command again: the stage "
            "is made anew"
        )
    return receipt


def _started(partial: Path) -> dict[str, Any] | None:
    """What was begun in a partial folder, None if that cannot be told."""
    if not (partial / STARTED).exists():
        return None
    started = read_json(partial / STARTED)
    return started if isinstance(started, dict) and started.keys() >= {"fingerprint", "identity"} else None


def _seconds_so_far(partial: Path) -> float:
    try:
        return float((partial / ".seconds").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0.0


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    changed = [
        f"{key.removeprefix('settings.')} changed"
        for key in sorted(_leaves(old).keys() | _leaves(new).keys())
        if _leaves(old).get(key) != _leaves(new).get(key)
    ]
    return ", ".join(changed[:4]) + (" and more" if len(changed) > 4 else "")


def _leaves(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= _leaves(value, f"{prefix}.{key}" if prefix else key)
    return result


def _explain(error: OSError, folder: Path, stage: str) -> str:
    import errno

    place = error.filename or folder
    cut_short = error.errno is None and "written" in str(error)  # how numpy says it
    if cut_short or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = shutil.disk_usage(folder).free
        return (
            f"no space left while writing {place} (stage {stage}; {free / 2**20:.0f} MiB free); nothing finished was "
            "lost: free some space and run the same command again"
        )
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return f"cannot write {place} ({error.strerror}); choose another run folder with --run FOLDER"
    return f"stage {stage} failed on {place}: {error.strerror or error}"


def _record_start(run: Run) -> None:
    try:
        write_text(run.folder / "recipe.toml", to_toml(run.recipe.model_dump(mode="json")))
        record_start(run.folder, __version__)
    except OSError as error:
        raise UserError(_explain(error, run.folder, "start")) from error
    run.progress.record("start", argv=sys.argv)


def read_receipts(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """Receipts of the finished stages among `names`."""
    found = {}
    for name in names:
        path = folder / name / "receipt.json"
        if path.exists():
            found[name] = read_json(path)
    return found


def load_run_recipe(folder: Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe that a run folder was made with, with overrides.

    Raises:
        CorruptFile: if the folder holds none.
    """
    path = folder / "recipe.toml"
    if not path.exists():
        raise CorruptFile(f"{folder} is not a run folder: it has no recipe.toml; make one with `lalia run RECIPE`")
    values = read_toml(path)
    written = tomllib.loads(to_toml(Recipe().model_dump(mode="json")))
    missing = [name for name in written if name not in values]
    if missing and (folder / "run.lock").exists():  # with defaults in their place, everything would be made anew
        raise CorruptFile(
            f"{path} is cut short: it lacks {', '.join(missing)}; start the run again with its recipe or data and "
            f"--run {folder}"
        )
    return load_recipe(path, overrides)
