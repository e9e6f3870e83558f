"""Writing the GGUF container (layout: `lalia.formats.gguf.container`), one tensor at a time."""

import os
import struct
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from torch import Tensor

from lalia.formats.gguf.container import ARRAY, BOOL, DEFAULT_ALIGNMENT, MAGIC, NUMBERS, STRING
from lalia.formats.gguf.kinds import Kind

VERSION = 3


class NewTensor(NamedTuple):
    """A tensor to write.

    Attributes:
        shape: slowest dimension first.
        pieces: makes its bytes, uint8 tensors one after the other; called once, when it is its turn.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Tensor]]

    @property
    def num_bytes(self) -> int:
        return self.kind.row_bytes(self.shape[-1]) * int(np.prod(self.shape[:-1], dtype=np.int64))


def write_container(path: Path, metadata: Mapping[str, Any], tensors: Sequence[NewTensor]) -> None:
    """Write a file through a temporary neighbour, fsync and rename.

    Args:
        metadata: int, float, bool, str, list of str, or numpy array; integers as uint32, floats as float32.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(_header(metadata, tensors))
            for tensor in tensors:
                _pad(file)
                written = sum(file.write(piece.contiguous().numpy().data) for piece in tensor.pieces())
                assert written == tensor.num_bytes, (tensor.name, written, tensor.num_bytes)
            _pad(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % DEFAULT_ALIGNMENT))


def _header(metadata: Mapping[str, Any], tensors: Sequence[NewTensor]) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        code, content = _value(value)
        parts += [_string(key), struct.pack("<I", code), content]
    offset = 0
    for tensor in tensors:
        sizes = tensor.shape[::-1]
        parts += [
            _string(tensor.name),
            struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, tensor.kind.number, offset),
        ]
        offset += (tensor.num_bytes + DEFAULT_ALIGNMENT - 1) // DEFAULT_ALIGNMENT * DEFAULT_ALIGNMENT
    return b"".join(parts)


def _string(text: str) -> bytes:
    content = text.encode("utf-8")
    return struct.pack("<Q", len(content)) + content


def _value(value: Any) -> tuple[int, bytes]:
    """Type code and bytes of a metadata value."""
    if isinstance(value, bool):
        return BOOL, bytes([value])
    if isinstance(value, int):
        return 4, struct.pack("<I", value)
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    if isinstance(value, str):
        return STRING, _string(value)
    if isinstance(value, np.ndarray):
        dtype = value.dtype.newbyteorder("<")
        code = next(number for number, name in NUMBERS.items() if np.dtype(name) == dtype)
        return ARRAY, struct.pack("<IQ", code, value.size) + value.astype(dtype).tobytes()
    assert isinstance(value, list) and all(isinstance(item, str) for item in value), type(value)
    return ARRAY, struct.pack("<IQ", STRING, len(value)) + b"".join(map(_string, value))
