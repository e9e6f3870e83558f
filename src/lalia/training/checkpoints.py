"""Checkpoints of a training run: written beside the training, whole or absent, checked when read, for any layout."""

import json
import re
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lalia.errors import CorruptFile, UserError
from lalia.files import replace_directory
from lalia.progress import Progress
from lalia.training.checkpoint_files import (
    KINDS,
    Part,
    assign,
    damage,
    fill,
    outline,
    part_name,
    read_receipt,
    write_part_file,
    write_receipt,
)
from lalia.training.parallel.world import World

FORMAT = 1


class Checkpoints:
    """The checkpoints of one run, in folders step-00000100 of its folder; the highest step that is whole wins.

    All processes of `world` call the same methods in the same order. What fails in one is raised in all.

    Args:
        folder: where they are kept; the processes share it.
        run_fingerprint: identity of settings and data; a checkpoint of another is refused.
        world: the processes that train together.
        progress: where to report damage.
        keep: newest checkpoints kept: if the last is damaged, the one before it continues the run.
        milestone_steps: steps whose checkpoints are kept as well.
        timeout_seconds: longest wait for another process to write or read its part.
    """

    def __init__(
        self,
        folder: Path,
        run_fingerprint: str,
        world: World,
        progress: Progress,
        keep: int = 2,
        milestone_steps: Collection[int] = frozenset(),
        timeout_seconds: float = 600.0,
    ) -> None:
        assert keep >= 1
        self.folder, self.run_fingerprint, self.world, self.progress = folder, run_fingerprint, world, progress
        self.keep, self.milestone_steps = keep, milestone_steps
        self.stall_seconds = 0.0
        """Time that the training stood still for `save` and `wait`."""
        self._group: Any = None
        if world.size > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        self._writer = ThreadPoolExecutor(1, "checkpoint")  # Python waits for it before it exits
        self._pending: Future[None] | None = None

    def save(self, step: int, tensors: Mapping[str, Tensor | Part], meta: Mapping[str, Any]) -> None:
        """Copy the state to the host's memory, and write it while the training goes on.

        Of what several processes hold, one keeps a copy. The checkpoint appears under its name when it is complete;
        older ones go after that. At most one is being written: a second call waits for the first.

        Args:
            step: steps taken so far.
            tensors: the state by names that do not depend on the layout, the same in all processes; tensors held in
                part are DTensors or `Part`s.
            meta: whatever else the remaining steps depend on, as JSON; that of the first process is kept.

        Raises:
            OSError: if this or the write before it failed. Earlier checkpoints stay, and nothing half-written does.
        """
        self.wait()
        began = time.perf_counter()
        parts = {name: Part.of(tensor) for name, tensor in tensors.items()}
        snapshot = json.loads(json.dumps(dict(meta), default=_plain))

        def prepare() -> list[list[Any]]:
            if self.world.is_main:
                self.folder.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(self._partial(step), ignore_errors=True)
                self._partial(step).mkdir()
            return outline(parts)

        names, table = assign(self._together(prepare))
        copies = _host_copies({name: parts[name] for name in names[self.world.rank]})
        facts = {
            "format": FORMAT,
            "step": step,
            "run_fingerprint": self.run_fingerprint,
            "world_size": self.world.size,
            "meta": snapshot,
            "tensors": table,
        }
        self._pending = self._writer.submit(self._write, step, copies, facts)
        self.stall_seconds += time.perf_counter() - began

    def wait(self) -> None:
        """Return when nothing is being written any more.

        Raises:
            OSError: if the last write failed, with its errno and the file.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            began = time.perf_counter()
            try:
                pending.result()
            finally:
                self.stall_seconds += time.perf_counter() - began

    def load(self, tensors: Mapping[str, Tensor | Part]) -> tuple[int, dict[str, Any]] | None:
        """Fill `tensors` in place from the newest checkpoint that reads back whole; its (step, meta), or None.

        The layout may be another than the one that saved. Damaged checkpoints are reported, passed over and removed.

        Raises:
            UserError: if the checkpoint is of other settings or another model; it is never continued.
            OSError: if a file may not be read.
        """
        self.wait()
        parts = {name: Part.of(tensor) for name, tensor in tensors.items()}
        damaged: list[str] = []
        found: dict[str, Any] | None = None
        folder = self.folder
        for name in self._on_main(self._clean):
            folder = self.folder / name
            try:
                found = self._verified(folder, parts)
                break
            except CorruptFile as error:
                damaged.append(name)
                self._say(f"warning: checkpoint {folder} is damaged ({error}); falling back to the one before it")
        if found is not None:
            stored = found["tensors"]
            self._together(lambda: fill(folder, stored, parts))
        if damaged and found is None:
            self._say("warning: no checkpoint is whole; this stage starts at step 0 again")
        # Left in place they would outlive the new ones, whose steps are lower.
        self._on_main(lambda: [shutil.rmtree(self.folder / name) for name in damaged])
        return None if found is None else (found["step"], found["meta"])

    def _write(self, step: int, copies: dict[str, Part], facts: dict[str, Any]) -> None:
        partial, main = self._partial(step), self.world.is_main
        try:
            written = self._together(
                lambda: write_part_file(partial / part_name(self.world.rank), copies) if copies else None
            )
            copies.clear()
            facts["files"] = {part_name(rank): file for rank, file in enumerate(written) if file}
            self._on_main(lambda: self._commit(step, facts))
        except OSError:
            if main:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _commit(self, step: int, facts: dict[str, Any]) -> None:
        write_receipt(self._partial(step), facts)
        replace_directory(self._partial(step), self.folder / _name(step))
        steps = [int(path.name.removeprefix("step-")) for path in self._folders()]
        for old in sorted(steps)[: -self.keep]:
            if old not in self.milestone_steps:
                shutil.rmtree(self.folder / _name(old))

    def _partial(self, step: int) -> Path:
        return self.folder / f".{_name(step)}.partial"

    def _folders(self) -> list[Path]:
        return [p for p in self.folder.glob("step-*") if p.is_dir() and re.fullmatch(r"step-\d{8,}", p.name)]

    def _clean(self) -> list[str]:
        """Remove what killed processes left; names of the checkpoints, the newest first."""
        for old in self.folder.glob(".step-*.old"):  # killed while a checkpoint was replaced by one of the same step
            target = self.folder / old.name.removeprefix(".").removesuffix(".old")
            if not target.exists():
                old.rename(target)
        for leftover in self.folder.glob(".step-*"):
            shutil.rmtree(leftover)
        return [path.name for path in sorted(self._folders(), key=lambda path: int(path.name[5:]), reverse=True)]

    def _verified(self, folder: Path, parts: Mapping[str, Part]) -> dict[str, Any]:
        """The receipt of a checkpoint that is whole and of this run; each process reads its share of the files.

        Raises:
            CorruptFile: if it is damaged.
            UserError: if it is of another run or model.
        """
        facts = self._on_main(lambda: _receipt_or_damage(folder))
        if isinstance(facts, str):
            raise CorruptFile(facts)
        if facts["format"] != FORMAT or facts["run_fingerprint"] != self.run_fingerprint:
            raise UserError(
                f"{folder} belongs to a run with other settings or data; delete {self.folder} to start that stage anew"
            )
        differences = self._together(lambda: _difference(facts["tensors"], parts))
        if any(differences):
            raise UserError(
                f"{folder} is of another model: {next(filter(None, differences))}; delete {self.folder} to start that "
                "stage anew"
            )
        share = sorted(facts["files"])[self.world.rank :: self.world.size]
        damages = self._together(lambda: damage(folder, facts["files"], share))
        if any(damages):
            raise CorruptFile(next(filter(None, damages)))
        return facts

    def _say(self, text: str) -> None:
        if self.world.is_main:
            self.progress.say(text)

    def _on_main(self, action: Callable[[], Any]) -> Any:
        """What `action` returned in the first process, in all of them."""
        return self._together(lambda: action() if self.world.is_main else None)[0]

    def _together(self, action: Callable[[], Any]) -> list[Any]:
        """What `action` returned in each process, by rank (as JSON); an OSError in one is raised in all."""
        if self._group is None:
            return [action()]
        try:
            outcome: dict[str, Any] = {"result": action()}
        except OSError as error:
            outcome = {"error": [error.errno, error.strerror, error.filename]}
        outcomes = _exchange(outcome, self._group)
        for outcome in outcomes:
            if "error" in outcome:
                raise OSError(*outcome["error"])
        return [outcome["result"] for outcome in outcomes]


def read_model(folder: Path, prefix: str = "model.") -> dict[str, Tensor]:
    """The weights in a checkpoint, whole and on the CPU, however many processes wrote it.

    Args:
        folder: one checkpoint, such as runs/NAME/.base.partial/step-00000100.
        prefix: of the tensors to read; it is taken off. Pieces "NAME/0", "NAME/1" of a stacked weight are joined
            along their rows.

    Raises:
        CorruptFile: if it is not a whole checkpoint.
        UserError: if it holds no tensor with that prefix.
    """
    try:
        facts = read_receipt(folder)
        if reason := damage(folder, facts["files"], facts["files"]):
            raise CorruptFile(reason)
    except CorruptFile as error:
        raise CorruptFile(f"{folder} is not a whole checkpoint: {error}; take another") from None
    dtypes = {kind: dtype for dtype, kind in KINDS.items()}
    parts = {
        name: Part(torch.empty(entry["shape"], dtype=dtypes[entry["dtype"]]), (0,) * len(entry["shape"]), ())
        for name, entry in facts["tensors"].items()
        if name.startswith(prefix)
    }
    if not parts:
        raise UserError(f"{folder} holds no tensors {prefix}*; it is not the checkpoint of a model")
    fill(folder, facts["tensors"], parts)
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, part in parts.items():
        whole, _, number = name.removeprefix(prefix).partition("/")
        stacks.setdefault(whole, {})[int(number or 0)] = part.local
    return {name: _joined([stack[number] for number in sorted(stack)]) for name, stack in stacks.items()}


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=max(pieces[0].ndim - 2, 0))


def _receipt_or_damage(folder: Path) -> dict[str, Any] | str:
    try:
        return read_receipt(folder)
    except CorruptFile as error:
        return str(error)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _plain(value: Any) -> Any:
    """A scalar of numpy or torch as JSON knows it."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} does not belong into the meta of a checkpoint")


def _host_copies(parts: Mapping[str, Part]) -> dict[str, Part]:
    copies = {}
    for name, part in parts.items():
        pinned = part.local.device.type == "cuda"
        copy = torch.empty(part.local.shape, dtype=part.local.dtype, pin_memory=pinned)
        copies[name] = Part(copy.copy_(part.local, non_blocking=pinned), part.offset, part.shape)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return copies


def _difference(stored: Mapping[str, Any], parts: Mapping[str, Part]) -> str | None:
    """The first tensor, by name, in which a checkpoint differs from what is to be filled."""
    for name in sorted(stored.keys() | parts.keys()):
        if name not in parts:
            return f"it has a tensor {name}, which this model lacks"
        if name not in stored:
            return f"it lacks the tensor {name}"
        if tuple(stored[name]["shape"]) != tuple(parts[name].shape):
            return f"its {name} has shape {stored[name]['shape']}, this model's {list(parts[name].shape)}"
    return None


def _exchange(value: Any, group: dist.ProcessGroup) -> Sequence[Any]:
    """`value` of every process of the group, by rank; as JSON, where torch's object collectives would pickle."""
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(group.size())]
    dist.all_gather(lengths, torch.tensor([len(content)]), group=group)
    longest = max(int(length) for length in lengths)
    gathered = [torch.empty(longest, dtype=torch.uint8) for _ in lengths]
    padded = torch.nn.functional.pad(content, (0, longest - len(content)))
    dist.all_gather(gathered, padded, group=group)
    return [json.loads(row[: int(length)].numpy().tobytes()) for row, length in zip(gathered, lengths, strict=True)]
