"""The files of a checkpoint: tensors in parts, one safetensors file per process, and checkpoint.json about them.

    step-00000100/
      part-00000.safetensors    what process 0 wrote; its header says where in each tensor its part begins
      part-00001.safetensors
      checkpoint.json           written last: step, meta, the tensors, and size and SHA-256 of each file

The safetensors files are those of `torch.distributed.checkpoint.HuggingFaceStorageWriter`, and its reader reads them.
"""

import errno
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lalia.errors import CorruptFile
from lalia.files import fingerprint, write_json

RECEIPT = "checkpoint.json"
BLOCK_BYTES = 8 * 2**20
"""Hashed and written at a time: small enough to be in the cache still when it is written."""
KINDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""How safetensors calls each type."""


@dataclass(frozen=True)
class Part:
    """The box of a tensor that one process holds.

    Attributes:
        local: the values, may be empty; loading fills it in place.
        offset: where the box begins in the whole tensor, per dimension.
        shape: shape of the whole tensor.
    """

    local: Tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, value: "Tensor | Part") -> "Part":
        """The part that this process holds of a tensor: all of it, or its shard if it is a DTensor."""
        if isinstance(value, Part):
            return value
        value = value.detach()
        if not hasattr(value, "__create_chunk_list__"):  # what torch.distributed.checkpoint asks a DTensor
            return cls(value, (0,) * value.ndim, tuple(value.shape))
        (chunk,) = value.__create_chunk_list__()  # pyright: ignore[reportAttributeAccessIssue]
        return cls(value.to_local(), tuple(chunk.offsets), tuple(value.shape))  # pyright: ignore


def write_part_file(path: Path, parts: Mapping[str, Part]) -> dict[str, Any]:
    """Write parts (on the CPU, contiguous) and sync them to the disk; returns the file's size in bytes and SHA-256.

    The tensors go to the file as they lie in memory: no second copy is made of them.
    """
    names = sorted(parts, key=lambda name: (-parts[name].local.element_size(), name))  # so that each begins aligned
    header: dict[str, Any] = {
        "__metadata__": {
            "format": "pt",
            "DCP_SHARDING_INFO": json.dumps({name: {"saved_offsets": parts[name].offset} for name in names}),
        }
    }
    end = 0
    for name in names:
        local = parts[name].local
        begin, end = end, end + local.nbytes
        header[name] = {"dtype": KINDS[local.dtype], "shape": list(local.shape), "data_offsets": [begin, end]}
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    digest = hashlib.sha256()
    try:
        with path.open("wb") as file:
            for whole in (len(content).to_bytes(8, "little") + content, *(_bytes(parts[name].local) for name in names)):
                for start in range(0, len(whole), BLOCK_BYTES):
                    block = whole[start : start + BLOCK_BYTES]
                    digest.update(block)
                    file.write(block)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # the kernel does not name the file
    return {"bytes": 8 + len(content) + end, "sha256": digest.hexdigest()}


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def write_receipt(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the file that vouches for the others, and for itself."""
    write_json(folder / RECEIPT, {**facts, "checksum": fingerprint(facts)})


def read_receipt(folder: Path) -> dict[str, Any]:
    """What `write_receipt` was given.

    Raises:
        CorruptFile: if it is missing or not as it was written.
        PermissionError: if it may not be read.
    """
    path = folder / RECEIPT
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except PermissionError:
        raise
    except OSError as error:
        raise CorruptFile(f"{path.name}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise CorruptFile(f"{path.name} is not valid JSON") from None
    if not isinstance(facts, dict) or facts.pop("checksum", None) != fingerprint(facts):
        raise CorruptFile(f"the checksum of {path.name} does not match")
    return facts


def damage(folder: Path, files: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """What is wrong with the files of these names, None if they are as they were written.

    Raises:
        PermissionError: if one may not be read.
    """
    for name in names:
        path = folder / name
        try:
            if path.stat().st_size != files[name]["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {files[name]['bytes']}"
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != files[name]["sha256"]:
                    return f"the checksum of {name} does not match"
        except PermissionError:
            raise
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


@torch.no_grad()
def fill(folder: Path, tensors: Mapping[str, Any], parts: Mapping[str, Part]) -> None:
    """Copy into `parts` what the files hold of them, whatever boxes they were cut into.

    Args:
        folder: of a checkpoint that was verified.
        tensors: the receipt's account of them; each has "parts", a list of [file, offset, sizes].
        parts: filled in place.

    Raises:
        OSError: if a file can no longer be read.
    """
    wanted: dict[str, list[tuple[str, Sequence[int], Sequence[int]]]] = {}
    for name, part in parts.items():
        for file, offset, sizes in tensors[name]["parts"]:
            if _overlap(offset, sizes, part) is not None:
                wanted.setdefault(file, []).append((name, offset, sizes))
    filled = dict.fromkeys(parts, 0)
    for file, entries in sorted(wanted.items()):
        try:
            with safe_open(folder / file, framework="pt") as opened:
                for name, offset, sizes in entries:
                    part = parts[name]
                    box = _overlap(offset, sizes, part)
                    assert box is not None
                    there = tuple(slice(a - o, b - o) for (a, b), o in zip(box, offset, strict=True))
                    here = tuple(slice(a - o, b - o) for (a, b), o in zip(box, part.offset, strict=True))
                    values = opened.get_slice(name)[there] if there else opened.get_tensor(name)
                    part.local[here].copy_(values)
                    filled[name] += values.numel()
        except SafetensorError as error:
            raise OSError(errno.EIO, str(error), str(folder / file)) from error
    for name, part in parts.items():
        assert filled[name] == part.local.numel(), f"{name}: {filled[name]} of {part.local.numel()} values were read"


def _overlap(offset: Sequence[int], sizes: Sequence[int], part: Part) -> list[tuple[int, int]] | None:
    """Begin and end per dimension of what a stored box and a part share, None if that is nothing."""
    box = [
        (max(a, b), min(a + m, b + n)) for a, m, b, n in zip(offset, sizes, part.offset, part.local.shape, strict=True)
    ]
    return box if all(begin < end for begin, end in box) else None


def outline(parts: Mapping[str, Part]) -> list[list[Any]]:
    """What a process holds, for `assign`: [name, kind, shape, offset, sizes] of each part

    Parts that are empty, because there are more processes than rows, are left out.
    """
    return [
        [name, KINDS[part.local.dtype], list(part.shape), list(part.offset), list(part.local.shape)]
        for name, part in parts.items()
        if part.local.numel() or 0 in part.shape
    ]


def assign(outlines: Sequence[Sequence[Sequence[Any]]]) -> tuple[list[set[str]], dict[str, Any]]:
    """Who writes what: each box once, by the one among those who hold it that has least to write so far.

    Args:
        outlines: `outline` of every process, by rank.

    Returns:
        the names that each rank writes, and the tensors for the receipt.
    """
    holders: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    boxes: dict[tuple[str, tuple[int, ...]], Sequence[Any]] = {}
    for rank, entries in enumerate(outlines):
        for entry in entries:
            key = (entry[0], tuple(entry[3]))
            holders.setdefault(key, []).append(rank)
            assert boxes.setdefault(key, entry) == entry, f"processes disagree about {entry[0]}"
    load = [0] * len(outlines)
    names: list[set[str]] = [set() for _ in outlines]
    tensors: dict[str, Any] = {}
    for (name, offset), entry in sorted(boxes.items()):
        _, kind, shape, _, sizes = entry
        rank = min(holders[name, offset], key=lambda rank: load[rank])
        load[rank] += math.prod(sizes)
        names[rank].add(name)
        facts = tensors.setdefault(name, {"dtype": kind, "shape": shape, "parts": []})
        facts["parts"].append([part_name(rank), list(offset), sizes])
    for name, facts in tensors.items():
        held = sum(math.prod(sizes) for _, _, sizes in facts["parts"])
        assert held == math.prod(facts["shape"]), f"the processes hold {held} values of {name} {facts['shape']}"
    return names, tensors


def part_name(rank: int) -> str:
    """Name of the file that a process writes."""
    return f"part-{rank:05d}.safetensors"
