"""The block kinds of GGUF as integer codes with a scale and an offset for every 32 weights."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lalia.formats.gguf.kinds import KINDS, dequantize

GROUP = 32
FIVE_BITS_FROM = 112
"""Where the 32 codes of five-bit kinds lie among 256: around the middle, where rounding an offset costs least."""


class Codes(NamedTuple):
    """w = scale * code + offset, group by group.

    Attributes:
        codes: (rows, columns) uint8, below 2 ** bits.
        scale, offset: (rows, columns / 32) float32.
        bits: 4 or 8; five-bit kinds use 8.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor
    bits: int


def _half(blocks: Tensor, start: int) -> Tensor:  # blocks (n, bytes) -> (n,)
    return blocks[:, start : start + 2].clone().view(torch.float16).float().squeeze(1)


def _symmetric(zero: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def parts(blocks: Tensor) -> tuple[Tensor, Tensor]:
        scale = _half(blocks, 0)
        return scale, -zero * scale

    return parts


def _affine(blocks: Tensor) -> tuple[Tensor, Tensor]:
    return _half(blocks, 0), _half(blocks, 2)


def _super_block(blocks: Tensor) -> tuple[Tensor, Tensor]:
    # Q4_K and Q5_K: eight groups of 32 with 6-bit scale and minimum, times two float16 of the whole block.
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = torch.cat((first & 63, third & 15 | first >> 6 << 4), 1)
    minimum = torch.cat((second & 63, third >> 4 | second >> 6 << 4), 1)
    return (_half(blocks, 0)[:, None] * scale).flatten(), -(_half(blocks, 2)[:, None] * minimum).flatten()


EXACT: dict[str, tuple[int, Callable[[Tensor], tuple[Tensor, Tensor]]]] = {
    "Q4_0": (4, _symmetric(8)),
    "Q4_1": (4, _affine),
    "Q4_K": (4, _super_block),
    "Q5_0": (8, _symmetric(16)),
    "Q5_1": (8, _affine),
    "Q5_K": (8, _super_block),
    "Q8_0": (8, _symmetric(128)),
}
"""Kinds that are such groups, with the bits of their codes here and a reader of scales and offsets."""


def codes_of(kind_name: str, blocks: Tensor) -> Codes:
    """A tensor of one of the kinds in EXACT.

    Args:
        blocks: (rows, bytes of a row) uint8, as `GGUFFile.blocks` gives them.
    """
    kind = KINDS[kind_name]
    bits, read = EXACT[kind_name]
    per_row = blocks.shape[1] // kind.block_bytes
    columns = per_row * kind.block_size
    scale, offset = (t.view(len(blocks), -1) for t in read(blocks.reshape(-1, kind.block_bytes)))
    codes = torch.empty(len(blocks), columns, dtype=torch.uint8)
    for rows in torch.arange(len(blocks)).split(4096):  # so that the floats between take little memory
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        values = torch.empty(len(rows), columns)
        dequantize(kind, blocks[part], values)
        values = values.view(len(rows), -1, GROUP).sub_(offset[part, :, None]).div_(scale[part, :, None])
        codes[part] = values.round_().nan_to_num_(0.0, 0.0, 0.0).clamp_(0, 2**bits - 1).view(len(rows), -1)
    if kind_name.startswith("Q5"):
        codes, offset = codes.add_(FIVE_BITS_FROM), offset - FIVE_BITS_FROM * scale
    return Codes(codes, scale, offset, bits)
