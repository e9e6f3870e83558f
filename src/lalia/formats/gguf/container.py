"""The GGUF container: metadata and the table of tensors, parsed without trusting a byte of it.

Layout (little-endian): "GGUF", version u32, number of tensors u64, number of metadata entries u64; the entries (key,
type u32, value); the table (name, number of dimensions u32, dimensions u64 fastest first, kind u32, offset u64);
padding; the data. A string is its length u64 and its bytes; an array its type u32, its length u64 and its elements.

Before anything of a stated size is made, that size is compared with the bytes that are left, so memory stays within
a small multiple of the file's.
"""

import itertools
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lalia.errors import CorruptFile, UserError
from lalia.formats.gguf.kinds import Kind, kind_of_number

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_KEY_BYTES = 65_535
MAX_DIMENSIONS = 4
MAX_STRINGS = 1 << 24
"""Strings of one array; a vocabulary has some hundred thousand."""

NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"}
"""Type code of metadata -> numpy dtype."""
BOOL, STRING, ARRAY = 7, 8, 9
SMALLEST_ENTRY, SMALLEST_TENSOR = 8 + 1 + 4 + 1, 8 + 1 + 4 + 8 + 4 + 8
REMEDY = "download or make the file again"


class StoredTensor(NamedTuple):
    """One row of the table.

    Attributes:
        shape: slowest dimension first, as in PyTorch (the file has them the other way round).
        start: of its bytes, from the beginning of the file.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    start: int
    num_bytes: int


class Container(NamedTuple):
    """What a file says before its data.

    Attributes:
        metadata: plain values; an array of strings is a list, of numbers or bools a numpy array.
        tensors: by name, in the file's order.
    """

    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def map_file(path: Path) -> mmap.mmap:
    """The file's bytes, mapped: nothing is read until it is used, and what is written stays in this process.

    Raises:
        UserError: if there is no such file, or it cannot be read.
        CorruptFile: if it is empty.
    """
    try:
        with path.open("rb") as file:
            if file.seek(0, 2) == 0:
                raise CorruptFile(f"{path} is empty; {REMEDY}")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}; give the path of a .gguf file") from None
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); give the path of a readable .gguf file") from None


def parse(data: mmap.mmap | bytes, path: Path) -> Container:
    """Metadata and table of a file.

    Raises:
        CorruptFile: naming what does not fit.
        UserError: for a version, byte order or kind of tensor that is not read.
    """
    cursor = _Cursor(data, path)
    if cursor.size < 24 or data[:4] != MAGIC:
        raise CorruptFile(f"{path} ({cursor.size} bytes) does not begin with GGUF and 20 bytes of header; {REMEDY}")
    cursor.position = 4
    version = cursor.number("<u4")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        what = f"big-endian (version {swapped})" if swapped in range(1, 65536) else f"of version {version}"
        raise UserError(f"{path} is a GGUF file {what}; Lalia reads little-endian ones of version 2 and 3")
    num_tensors, num_entries = cursor.number("<u8"), cursor.number("<u8")
    cursor.check_count(num_tensors, SMALLEST_TENSOR, "tensors")
    cursor.check_count(num_entries, SMALLEST_ENTRY, "metadata entries")
    metadata: dict[str, Any] = {}
    for _ in range(num_entries):
        key = cursor.name("metadata key")
        if key in metadata:
            raise cursor.corrupt(f"metadata key {key!r} appears twice")
        metadata[key] = cursor.value(key)
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise cursor.corrupt(f"general.alignment = {alignment!r} is no power of two up to 2^20")
    table = [_table_row(cursor) for _ in range(num_tensors)]
    data_start = (cursor.position + alignment - 1) // alignment * alignment
    tensors: dict[str, StoredTensor] = {}
    for name, kind, shape, offset in table:
        if name in tensors:
            raise cursor.corrupt(f"two tensors are named {name!r}")
        num_bytes = kind.row_bytes(shape[-1])
        for size in shape[:-1]:
            num_bytes *= size
        start = data_start + offset
        if offset % alignment:
            raise cursor.corrupt(f"tensor {name!r} begins at offset {offset}, no multiple of {alignment}")
        if start + num_bytes > cursor.size:
            raise cursor.corrupt(
                f"tensor {name!r} ends at byte {start + num_bytes}, behind the end of the file ({cursor.size} bytes)"
            )
        tensors[name] = StoredTensor(name, kind, shape, start, num_bytes)
    in_order = sorted(tensors.values(), key=lambda tensor: tensor.start)
    for one, other in itertools.pairwise(in_order):
        if one.start + one.num_bytes > other.start:
            raise cursor.corrupt(f"tensors {one.name!r} and {other.name!r} overlap")
    return Container(metadata, tensors)


def _table_row(cursor: "_Cursor") -> tuple[str, Kind, tuple[int, ...], int]:
    """Name, kind, shape and offset of the next tensor of the table."""
    name = cursor.name("tensor name")
    num_dimensions = cursor.number("<u4")
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise cursor.corrupt(f"tensor {name!r} has {num_dimensions} dimensions, expected 1 to {MAX_DIMENSIONS}")
    sizes = [cursor.number("<u8") for _ in range(num_dimensions)]
    product = 1
    for size in sizes:
        product *= size
    if not 0 < product < 1 << 63:
        raise cursor.corrupt(f"tensor {name!r} has shape {sizes[::-1]}: no values, or 2^63 and more")
    number, offset = cursor.number("<u4"), cursor.number("<u8")
    try:
        kind = kind_of_number(number)
    except UserError as error:
        raise UserError(f"{cursor.path}: tensor {name!r}: {error}") from None
    if sizes[0] % kind.block_size:
        raise cursor.corrupt(
            f"tensor {name!r} has rows of {sizes[0]} values, no multiple of {kind.name}'s {kind.block_size}"
        )
    return name, kind, tuple(sizes[::-1]), offset


class _Cursor:
    """A position in the header that never leaves the file."""

    def __init__(self, data: mmap.mmap | bytes, path: Path) -> None:
        self.data, self.path, self.size, self.position = data, path, len(data), 0

    def corrupt(self, what: str) -> CorruptFile:
        return CorruptFile(f"{self.path}: {what} (at byte {self.position}); {REMEDY}")

    def take(self, num_bytes: int, what: str) -> int:
        """Advance over `num_bytes` and return where they begin."""
        start = self.position
        if num_bytes > self.size - start:
            raise self.corrupt(f"{what} of {num_bytes} bytes, but the file ends after {self.size}")
        self.position = start + num_bytes
        return start

    def check_count(self, count: int, smallest: int, what: str) -> None:
        if count > (self.size - self.position) // smallest:
            raise self.corrupt(f"it claims {count} {what}, more than its {self.size} bytes can hold")

    def number(self, dtype: str) -> Any:
        """The next number, as a plain int or float."""
        form = _STRUCTS[dtype]
        return form.unpack_from(self.data, self.take(form.size, "a number"))[0]

    def string(self, what: str) -> str:
        num_bytes = self.number("<u8")
        start = self.take(num_bytes, what)
        try:
            return self.data[start : start + num_bytes].decode("utf-8")
        except UnicodeDecodeError:
            raise self.corrupt(f"{what} is no UTF-8") from None

    def name(self, what: str) -> str:
        name = self.string(what)
        if not 0 < len(name) <= MAX_KEY_BYTES:
            raise self.corrupt(f"a {what} of {len(name)} characters, expected 1 to {MAX_KEY_BYTES}")
        return name

    def value(self, key: str) -> Any:
        code = self.number("<u4")
        if code == ARRAY:
            return self.array(key)
        if code == STRING:
            return self.string(f"the text of {key!r}")
        if code == BOOL:
            return self.bools(1, key).item()
        if code not in NUMBERS:
            raise self.corrupt(f"metadata {key!r} has the unknown type {code}")
        return self.number(NUMBERS[code])

    def bools(self, count: int, key: str) -> np.ndarray:
        start = self.take(count, f"the flags of {key!r}")
        values = np.frombuffer(self.data, np.uint8, count, start)
        if count and values.max() > 1:
            raise self.corrupt(f"metadata {key!r} is a flag other than 0 and 1")
        return values.astype(np.bool_)

    def array(self, key: str) -> np.ndarray | list[str]:
        code, count = self.number("<u4"), self.number("<u8")
        if code == ARRAY:
            raise self.corrupt(f"metadata {key!r} is an array of arrays, which Lalia does not read")
        if code == STRING:
            return self.strings(count, key)
        if code == BOOL:
            return self.bools(count, key)
        if code not in NUMBERS:
            raise self.corrupt(f"metadata {key!r} is an array of the unknown type {code}")
        dtype = np.dtype(NUMBERS[code])
        start = self.take(count * dtype.itemsize, f"the array {key!r}")
        return np.frombuffer(self.data, dtype, count, start).copy()

    def strings(self, count: int, key: str) -> list[str]:
        self.check_count(count, 8, f"strings in {key!r}")
        if count > MAX_STRINGS:
            raise self.corrupt(f"metadata {key!r} is an array of {count} strings, more than {MAX_STRINGS}")
        # Local names: this loop runs some hundred thousand times.
        data, size, position, unpack = self.data, self.size, self.position, _STRUCTS["<u8"].unpack_from
        strings = []
        try:
            for _ in range(count):
                (num_bytes,) = unpack(data, position)
                start = position + 8
                position = start + num_bytes
                if position > size:
                    raise self.corrupt(f"a string of {key!r} has {num_bytes} bytes, but the file ends after {size}")
                strings.append(data[start:position].decode("utf-8"))
        except struct.error:
            raise self.corrupt(f"the file ends within the strings of {key!r}") from None
        except UnicodeDecodeError:
            raise self.corrupt(f"string {len(strings)} of {key!r} is no UTF-8") from None
        self.position = position
        return strings


_STRUCTS = {
    dtype: struct.Struct("<" + {"u": "BHIQ", "i": "bhiq", "f": "__fd"}[dtype[1]][int(dtype[2]).bit_length() - 1])
    for dtype in NUMBERS.values()
}
