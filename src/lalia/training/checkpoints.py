"""Checkpoints of a training run: whole or absent, checked when read, the newest good one wins."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lalia.errors import CorruptFile, UserError
from lalia.files import read_json, sha256_file, write_bytes, write_json
from lalia.progress import Progress

KEEP = 2
"""Newest checkpoints kept: if the last is damaged, the one before it continues the run."""


@dataclass(frozen=True)
class Checkpoint:
    """State of a run after `step` steps."""

    step: int
    tensors: Mapping[str, Tensor]
    meta: Mapping[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write tensors, then the small file that vouches for them, then remove checkpoints beyond `KEEP`."""
    name = f"step-{checkpoint.step:08d}"
    content = save({key: tensor.detach().contiguous() for key, tensor in checkpoint.tensors.items()})
    path = folder / f"{name}.safetensors"
    write_bytes(path, content)
    write_json(
        folder / f"{name}.json",
        {"step": checkpoint.step, "sha256": sha256_file(path), "meta": dict(checkpoint.meta)},
    )
    for old in sorted(folder.glob("step-*.json"))[:-KEEP]:
        old.unlink()
        old.with_suffix(".safetensors").unlink(missing_ok=True)


def load_newest(folder: Path, run_fingerprint: str, progress: Progress) -> Checkpoint | None:
    """The newest checkpoint that reads back whole, or None if there is none.

    Damaged ones are reported, passed over and removed. A checkpoint of other settings is an error, never continued.
    """
    damaged: list[Path] = []
    newest: Checkpoint | None = None
    for receipt in sorted(folder.glob("step-*.json"), reverse=True):
        path = receipt.with_suffix(".safetensors")
        try:
            facts = read_json(receipt)
            if sha256_file(path) != facts["sha256"]:
                raise CorruptFile("its checksum does not match")
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        except (CorruptFile, OSError, KeyError, TypeError, SafetensorError, json.JSONDecodeError) as error:
            damaged.append(receipt)
            progress.say(f"warning: checkpoint {path} is damaged ({error}); falling back to the one before it")
            continue
        if facts["meta"].get("run_fingerprint") != run_fingerprint:
            raise UserError(
                f"{path} belongs to a run with other settings or data; delete {folder} to start that stage anew"
            )
        newest = Checkpoint(facts["step"], tensors, facts["meta"])
        break
    if damaged and newest is None:
        progress.say("warning: no checkpoint is whole; this stage starts at step 0 again")
    for bad in damaged:  # left in place they would outlive the new ones, whose steps are lower
        bad.unlink()
        bad.with_suffix(".safetensors").unlink(missing_ok=True)
    return newest
