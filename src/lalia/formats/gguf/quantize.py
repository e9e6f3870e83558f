"""From float32 to the blocks of GGUF, as ggml's reference quantizers do it: one scale (and minimum) for 32 values."""

import torch
from torch import Tensor

from lalia.errors import UserError
from lalia.formats.gguf.kinds import KINDS

WRITTEN = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
"""Kinds that can be made; the others are read only."""


def quantize(kind_name: str, values: Tensor) -> Tensor:
    """The bytes of `values`.

    Args:
        kind_name: one of `WRITTEN`.
        values: float32 (rows, columns), finite, columns a multiple of the kind's block.

    Returns:
        uint8 (rows, bytes of a row)

    Raises:
        UserError: if a value or a scale is beyond what float16 holds.
    """
    kind = KINDS[kind_name]
    if kind.dtype is not None:
        stored = values.to(kind.dtype)
        _check_finite(stored, kind_name)
        return stored.contiguous().view(torch.uint8).view(len(values), -1)
    blocks = values.reshape(-1, kind.block_size)
    if kind_name == "Q8_0":
        parts = _symmetric_8(blocks)
    elif kind_name.endswith("_0"):
        parts = _symmetric(blocks, 8 if kind_name == "Q4_0" else 16)
    else:
        parts = _affine(blocks, 15 if kind_name == "Q4_1" else 31)
    return torch.cat(parts, 1).view(len(values), -1)


def _check_finite(stored: Tensor, kind_name: str) -> None:
    if not bool(torch.isfinite(stored).all()):
        raise UserError(f"a value is too large for {kind_name}, whose limit is 65504; write F32 or BF16")


def _half(numbers: Tensor) -> Tensor:
    """float32 (n, 1) to the bytes of float16, (n, 2)."""
    stored = numbers.to(torch.float16)
    _check_finite(stored, "float16")
    return stored.view(torch.uint8)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1.0 / scale)


def _symmetric_8(blocks: Tensor) -> list[Tensor]:
    scale = blocks.abs().amax(1, keepdim=True) / 127
    scaled = blocks * _inverse(scale)
    # Half away from zero; torch.round goes to even.
    rounded = torch.trunc(scaled + torch.copysign(torch.tensor(0.5), scaled))
    return [_half(scale), rounded.to(torch.int8).view(torch.uint8)]


def _symmetric(blocks: Tensor, zero: int) -> list[Tensor]:
    """The value of largest magnitude becomes 0, zero becomes `zero`."""
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    scale = largest / -zero
    levels = torch.trunc(blocks * _inverse(scale) + (zero + 0.5)).clamp(0, 2 * zero - 1).to(torch.uint8)
    return [_half(scale), *_packed(levels, five_bits=zero == 16)]


def _affine(blocks: Tensor, top: int) -> list[Tensor]:
    """The smallest value becomes 0, the largest `top`."""
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    scale = (high - low) / top
    levels = torch.trunc((blocks - low) * _inverse(scale) + 0.5).clamp(0, top).to(torch.uint8)
    return [_half(scale), _half(low), *_packed(levels, five_bits=top == 31)]


def _packed(levels: Tensor, five_bits: bool) -> list[Tensor]:
    """Two values to a byte: the first half of a block in the low bits. Fifth bits stand before, 8 to a byte."""
    low = levels & 15
    nibbles = low[:, :16] | low[:, 16:] << 4
    if not five_bits:
        return [nibbles]
    weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8)
    bits = ((levels >> 4).view(-1, 4, 8) * weights).sum(2, dtype=torch.uint8)
    return [bits, nibbles]
