"""The kinds of GGUF tensors: how many bytes a block takes, and how its bytes become float32.

A quantized row is cut into blocks of 32 or 256 values; a block is its scale (and minimum) and the bits of its values.
The layouts are those of ggml; super-blocks of 256 ("K") have 16 sub-blocks whose scales are quantized in turn.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lalia.errors import UserError

Unpack = Callable[[Tensor, Tensor], None]
"""(blocks (n, block_bytes) uint8, out (n, block_size) float32): fill `out`."""

CHUNK_BLOCK_BYTES = 1 << 20
"""Blocks are unpacked in pieces of about this many bytes, which with their float32 values stay in a core's cache."""


class Kind(NamedTuple):
    """One kind of tensor data.

    Attributes:
        name: as ggml writes it.
        number: its code in the file.
        block_size: values of a block; a row is a whole number of blocks.
        block_bytes: bytes of a block.
        dtype: of a plain number, None if quantized.
        unpack: bytes to float32, None for plain numbers.
    """

    name: str
    number: int
    block_size: int
    block_bytes: int
    dtype: torch.dtype | None = None
    unpack: Unpack | None = None

    def row_bytes(self, num_columns: int) -> int:
        """Bytes of a row, whose length must be a multiple of block_size."""
        return num_columns // self.block_size * self.block_bytes


def _half(blocks: Tensor, start: int) -> Tensor:
    """The float16 at byte `start` of every block, as float32 (n, 1)."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor, out: Tensor) -> None:
    """Low halves of `packed` (n, size) to the first `size` columns of `out`, high halves to the rest."""
    size = packed.shape[1]
    out[:, :size] = packed & 15
    out[:, size:] = packed >> 4


def _fifth_bits(blocks: Tensor, start: int) -> Tensor:
    """16 for each of the 32 bits at byte `start` that is set, uint8 (n, 32)."""
    shifts = torch.arange(8, dtype=torch.uint8)
    bits = blocks[:, start : start + 4, None] >> shifts & 1
    return bits.flatten(1) << 4


def _q4_0(blocks: Tensor, out: Tensor) -> None:
    _nibbles(blocks[:, 2:], out)
    out.sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor, out: Tensor) -> None:
    _nibbles(blocks[:, 4:], out)
    out.mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q5_0(blocks: Tensor, out: Tensor) -> None:
    _nibbles(blocks[:, 6:], out)
    out.add_(_fifth_bits(blocks, 2)).sub_(16).mul_(_half(blocks, 0))


def _q5_1(blocks: Tensor, out: Tensor) -> None:
    _nibbles(blocks[:, 8:], out)
    out.add_(_fifth_bits(blocks, 4)).mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q8_0(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks[:, 2:].view(torch.int8)).mul_(_half(blocks, 0))


def _q8_k(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks[:, 4:260].view(torch.int8)).mul_(blocks[:, :4].contiguous().view(torch.float32))


def _crumbs(packed: Tensor) -> Tensor:
    """The 2-bit values of (n, 64) bytes in the order of the K kinds, uint8 (n, 2, 4, 32)."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8)
    return packed.reshape(-1, 2, 1, 32) >> shifts[:, None] & 3


def _q2_k(blocks: Tensor, out: Tensor) -> None:
    scales = blocks[:, :16]
    scale = _half(blocks, 80) * (scales & 15)
    minimum = _half(blocks, 82) * (scales >> 4)
    values = out.view(-1, 16, 16)
    values.copy_(_crumbs(blocks[:, 16:80]).view(-1, 16, 16))
    values.mul_(scale[:, :, None]).sub_(minimum[:, :, None])


def _q3_k(blocks: Tensor, out: Tensor) -> None:
    packed = blocks[:, 96:108]
    low = torch.cat((packed[:, :8] & 15, packed[:, :8] >> 4), 1)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8)
    high = (packed[:, None, 8:] >> shifts[:, None] & 3).flatten(1)
    scale = _half(blocks, 108) * ((low | high << 4).to(torch.int8) - 32)
    bits = blocks[:, None, :32] >> torch.arange(8, dtype=torch.uint8)[:, None] & 1  # (n, 8, 32)
    values = out.view(-1, 16, 16)
    values.copy_(_crumbs(blocks[:, 32:96]).view(-1, 16, 16) | (bits << 2).view(-1, 16, 16))
    values.sub_(4).mul_(scale[:, :, None])


def _scales_and_minimums(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of the 8 sub-blocks of Q4_K and Q5_K, float32 (n, 8, 1) each; 6 bits a number, packed into 12 bytes."""
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = torch.cat((first & 63, third & 15 | first >> 6 << 4), 1)
    minimum = torch.cat((second & 63, third >> 4 | second >> 6 << 4), 1)
    return (_half(blocks, 0) * scale)[:, :, None], (_half(blocks, 2) * minimum)[:, :, None]


def _q4_k(blocks: Tensor, out: Tensor) -> None:
    scale, minimum = _scales_and_minimums(blocks)
    _nibbles(blocks[:, 16:].reshape(-1, 32), out.view(-1, 64))
    out.view(-1, 8, 32).mul_(scale).sub_(minimum)


def _q5_k(blocks: Tensor, out: Tensor) -> None:
    scale, minimum = _scales_and_minimums(blocks)
    _nibbles(blocks[:, 48:].reshape(-1, 32), out.view(-1, 64))
    bits = blocks[:, None, 16:48] >> torch.arange(8, dtype=torch.uint8)[:, None] & 1  # (n, 8, 32)
    out.view(-1, 8, 32).add_(bits << 4).mul_(scale).sub_(minimum)


def _q6_k(blocks: Tensor, out: Tensor) -> None:
    low = blocks[:, :128].reshape(-1, 2, 1, 64)
    low = torch.cat((low & 15, low >> 4), 2).view(-1, 16, 16)
    high = _crumbs(blocks[:, 128:192]).view(-1, 16, 16)
    scale = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8)
    out.view(-1, 16, 16).copy_(low | high << 4).sub_(32).mul_(scale[:, :, None])


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("F32", 0, 1, 4, torch.float32),
        Kind("F16", 1, 1, 2, torch.float16),
        Kind("BF16", 30, 1, 2, torch.bfloat16),
        Kind("F64", 28, 1, 8, torch.float64),
        Kind("Q4_0", 2, 32, 18, unpack=_q4_0),
        Kind("Q4_1", 3, 32, 20, unpack=_q4_1),
        Kind("Q5_0", 6, 32, 22, unpack=_q5_0),
        Kind("Q5_1", 7, 32, 24, unpack=_q5_1),
        Kind("Q8_0", 8, 32, 34, unpack=_q8_0),
        Kind("Q2_K", 10, 256, 84, unpack=_q2_k),
        Kind("Q3_K", 11, 256, 110, unpack=_q3_k),
        Kind("Q4_K", 12, 256, 144, unpack=_q4_k),
        Kind("Q5_K", 13, 256, 176, unpack=_q5_k),
        Kind("Q6_K", 14, 256, 210, unpack=_q6_k),
        Kind("Q8_K", 15, 256, 292, unpack=_q8_k),
    )
}
BY_NUMBER = {kind.number: kind for kind in KINDS.values()}
NOT_READ = {
    9: "Q8_1", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S",
    23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
"""Names of the kinds that are known and refused."""


def kind_of_number(number: int) -> Kind:
    """The kind with this code.

    Raises:
        UserError: naming a kind that is not read, and those that are.
    """
    if number in BY_NUMBER:
        return BY_NUMBER[number]
    name = NOT_READ.get(number, "unknown to Lalia")
    raise UserError(
        f"its kind is {number} ({name}), which Lalia does not read; it reads {', '.join(KINDS)}. Get the model in one "
        "of these"
    )


def dequantize(kind: Kind, blocks: Tensor, out: Tensor) -> None:
    """Fill `out` with the values of `blocks`.

    Args:
        blocks: (rows, bytes of a row) uint8.
        out: (rows, columns), contiguous, any float dtype; memory beyond it stays below 20 MB.
    """
    if kind.dtype is not None:
        # A copy into numbers that start where numbers of this size may; the file aligns to 32, rows need not.
        out.copy_(blocks.contiguous().view(kind.dtype))
        return
    assert kind.unpack is not None and out.is_contiguous()
    blocks, values = blocks.reshape(-1, kind.block_bytes), out.view(-1, kind.block_size)
    step = math.ceil(CHUNK_BLOCK_BYTES / kind.block_bytes)
    direct = out.dtype == torch.float32
    chunk = values if direct else torch.empty((min(step, len(blocks)), kind.block_size), dtype=torch.float32)
    for start in range(0, len(blocks), step):
        piece = blocks[start : start + step]
        if direct:
            kind.unpack(piece, values[start : start + step])
        else:
            kind.unpack(piece, chunk[: len(piece)])
            values[start : start + step] = chunk[: len(piece)]
