"""The model folder of the ecosystem: config.json, model.safetensors, generation_config.json, tokenizer files.

What `save_model` writes, transformers, vLLM and llama.cpp's converter read as it stands; what they publish for the
families of `lalia.model.families`, `load_model` reads. Weights are safetensors only: a pickle may run code.
"""

import contextlib
import difflib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lalia.errors import CorruptFile, UserError
from lalia.files import write_json
from lalia.formats.weights import assemble, disassemble, listed
from lalia.model.config import ModelConfig
from lalia.model.families import registry
from lalia.model.transformer import Transformer

CONFIG, WEIGHTS, INDEX, GENERATION = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "generation_config.json",
)
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
MAX_SHARD_BYTES = 5_000_000_000
"""Weights of more bytes are written as several files, as transformers does."""


def save_model(
    model: Transformer,
    folder: Path,
    generation: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    ids: Mapping[str, Any] | None = None,
) -> None:
    """Write config.json, model.safetensors and, with `generation`, generation_config.json.

    Each file is whole or absent; config.json, without which nothing is a model folder, comes last. Other files in the
    folder, such as the tokenizer's, stay.

    Args:
        folder: created if missing.
        generation: content of generation_config.json: eos_token_id (an id or a list), bos_token_id, pad_token_id,
            temperature and so on. The three ids also go into config.json, null where not given.
        dtype: of the weights on disk: float32, bfloat16 or float16.
        ids: of the three, those for config.json that `generation` does not give.
        max_shard_bytes: above this the weights go into several files with an index; a larger tensor has a file of
            its own.

    Raises:
        UserError: if the family's config.json cannot express the model's config.
    """
    values = registry.to_hf(model.config)
    _write_weights(model, folder, dtype, max_shard_bytes)
    generation = dict(generation or {})
    if generation:
        write_json(folder / GENERATION, generation)
    given = {**(ids or {}), **generation}
    ids = {key: given.get(key) for key in TOKEN_IDS}
    if model.config.family == "clip_text_model":  # pools at the end of the text: transformers fails on a null there
        ids = {key: value for key, value in ids.items() if value is not None}
    # transformers 4 reads torch_dtype, transformers 5 dtype.
    write_json(folder / CONFIG, {**values, **ids, "dtype": DTYPES[dtype], "torch_dtype": DTYPES[dtype]})


def _write_weights(model: Transformer, folder: Path, dtype: torch.dtype, max_shard_bytes: int) -> None:
    shards: list[list[tuple[str, Tensor]]] = [[]]
    size = total = 0
    for name, part in disassemble(model):
        num_bytes = part.numel() * dtype.itemsize
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, part))
        size, total = size + num_bytes, total + num_bytes
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = [WEIGHTS] if len(shards) == 1 else names
    stale = {*folder.glob("model-*-of-*.safetensors"), folder / WEIGHTS, folder / INDEX}
    for file, shard in zip(names, shards, strict=True):
        # Copies, because safetensors refuses tensors that share memory, as the pieces of one weight do.
        write_tensors(folder / file, {name: part.to("cpu", dtype, copy=True).contiguous() for name, part in shard})
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name, _ in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    # Those of an earlier model in this folder, which a reader might take instead.
    for path in stale - {folder / name for name in (*names, *([INDEX] if len(shards) > 1 else []))}:
        path.unlink(missing_ok=True)


def load_model(
    folder: Path, dtype: torch.dtype = torch.float32, trainable: bool = False, part: str | None = None
) -> Transformer:
    """The model of a folder, in eval mode, computing in `dtype`.

    Args:
        dtype: of the weights in memory, whatever the file has, and of the activations (`compute_dtype`).
        trainable: whether the weights require gradients.
        part: "text" or "vision", the tower of a whole CLIP model.

    Raises:
        UserError: if there is no such folder, config.json or model.safetensors, if the model is of a kind that is not
            implemented, or if its weights hold NaN or infinity.
        CorruptFile: if a file is cut short or does not parse, or if weights are missing, left over or of another
            shape than config.json says. The message lists them.
    """
    config = read_config(folder, part)
    with SafetensorFiles(folder) as source:
        return assemble(config, source, dtype, trainable)


def read_config(folder: Path, part: str | None = None) -> ModelConfig:
    """The config of a model folder, without reading weights; `part` as for `load_model`.

    Raises:
        UserError: if there is no such folder or config.json (names near it are offered), or the model is of a kind
            that is not implemented.
        CorruptFile: if config.json does not parse.
    """
    _check_folder(folder)
    path = folder / CONFIG
    if not path.is_file():
        inside = [child.name for child in sorted(folder.iterdir()) if (child / CONFIG).is_file()]
        hint = f"it holds the model folders {', '.join(inside)}" if inside else "a model folder has one"
        raise UserError(f"{folder} has no {CONFIG}; {hint}")
    values = _read_object(path)
    try:
        return registry.from_hf(values, part)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _check_folder(folder: Path) -> None:
    if folder.is_dir():
        refuse_links_out(folder)
        return
    if folder.exists():
        raise UserError(f"{folder} is a file; give the folder that holds {CONFIG}")
    if not folder.parent.is_dir():
        raise UserError(
            f"there is no folder {folder} (nor {folder.parent}); give the path of a model folder, or the name "
            "of a model in the store (lalia models lists them; lalia pull NAME fetches one)"
        )
    siblings = sorted(child.name for child in folder.parent.iterdir() if child.is_dir())
    near = difflib.get_close_matches(folder.name, siblings, n=3, cutoff=0.4) or siblings[:5]
    hint = f"did you mean {' or '.join(str(folder.parent / name) for name in near)}?" if near else "it is empty there"
    raise UserError(f"there is no folder {folder}; {hint}")


def _read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unambiguous)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise CorruptFile(f"{path} is not valid JSON ({error}); copy or make the model folder again") from None
    if not isinstance(values, dict):
        raise CorruptFile(f"{path} holds {type(values).__name__}, expected an object; copy or make the folder again")
    return values


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs; programs disagree about which of two equal keys counts."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in values if keys.count(key) > 1)!r} is there twice")
    return values


def refuse_links_out(folder: Path) -> None:
    """Refuse links in a model folder to what is elsewhere.

    Such a link can come with an archive or a clone, and would carry a private file of the reader's into whatever is
    made of the model. The Hub's cache is allowed: there snapshots/REVISION/FILE is a link into blobs beside snapshots.
    A link to the whole folder is the user's own.
    """
    inside = folder.resolve()
    allowed = [inside, *([inside.parent.parent / "blobs"] if inside.parent.name == "snapshots" else [])]
    # Links to folders are not walked into, so one that leads to a whole disk costs nothing.
    for path in (Path(at) / name for at, folders, files in os.walk(folder) for name in (*folders, *files)):
        if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in allowed):
            raise UserError(
                f"{path} is a link to {path.resolve()}, outside the model folder; copy the file there, or give the "
                "folder that holds it"
            )


def _weight_paths(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        weight_map = _read_object(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CorruptFile(f"{folder / INDEX} has no weight_map; copy the model folder again")
        names = sorted({str(name) for name in weight_map.values()})
        outside = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
        if outside:
            raise UserError(f"{folder / INDEX} names {listed(outside)}; expected .safetensors files beside it")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CorruptFile(f"{folder} lacks {listed(missing)}, which {INDEX} names; copy the model folder again")
        return [folder / name for name in names]
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder} has its weights only as {listed(pickles)}, a pickle, which can run code when read; convert it "
            f"where you trust it (transformers: save_pretrained writes {WEIGHTS}), or get the safetensors version"
        )
    raise UserError(f"{folder} has neither {WEIGHTS} nor {INDEX}; the download or the training run did not finish")


class SafetensorFiles:
    """The weights of a folder as a `lalia.formats.weights.TensorSource`; tensors are views of the mapped files."""

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        self._stack = contextlib.ExitStack()
        self._files: dict[str, Any] = {}
        with self._stack:
            for path in _weight_paths(folder):
                file = _open(path, self._stack)
                for name in file.keys():  # noqa: SIM118 - not a dict
                    if name in self._files:
                        raise CorruptFile(f"{folder}: {name} is in two files; copy the model folder again")
                    self._files[name] = file
            self._stack = self._stack.pop_all()

    def __enter__(self) -> "SafetensorFiles":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def kind(self, name: str) -> str:
        """Type on disk, such as F32."""
        return self._files[name].get_slice(name).get_dtype()

    def tensor(self, name: str) -> Tensor:
        """A view of the mapped file."""
        return self._files[name].get_tensor(name)


def _open(path: Path, stack: contextlib.ExitStack) -> Any:
    try:
        return stack.enter_context(safe_open(path, framework="pt"))
    except (SafetensorError, OSError, ValueError) as error:  # an empty file cannot be mapped
        raise CorruptFile(
            f"{path} ({path.stat().st_size} bytes) is cut short or no safetensors file ({error}); copy or make it again"
        ) from None


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file through a temporary neighbour, fsync and rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    temporary = Path(name)
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        code = re.search(r"os error (\d+)", str(error)) if isinstance(error, SafetensorError) else None
        if code:  # a full disk is an OSError everywhere else
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
        raise
