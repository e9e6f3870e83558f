"""Blocks to numbers and back, against the quantizers of the gguf package (llama.cpp's own, in numpy)."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from lalia.errors import UserError
from lalia.formats.gguf.kinds import KINDS, dequantize, kind_of_number
from lalia.formats.gguf.quantize import WRITTEN, quantize


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("F32", "F64", "Q8_K")])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_dequantizes_as_llama_cpp_does(name: str) -> None:
    """Bit for bit, on random bytes, NaN and infinity among the scales included."""
    kind = KINDS[name]
    blocks = np.random.default_rng(0).integers(0, 256, (64, 5 * kind.block_bytes), dtype=np.uint8)
    raw = blocks.view(np.float16) if name == "F16" else blocks
    expected = quants.dequantize(raw, GGMLQuantizationType[name]).astype(np.float32)
    out = torch.empty(64, 5 * kind.block_size)
    dequantize(kind, torch.from_numpy(blocks), out)
    np.testing.assert_array_equal(out.numpy(), expected)
    # In another dtype, and with one bit changed (negative control).
    narrow = torch.empty(out.shape, dtype=torch.bfloat16)
    dequantize(kind, torch.from_numpy(blocks), narrow)
    assert torch.equal(narrow.nan_to_num(), out.to(torch.bfloat16).nan_to_num())
    blocks[:, kind.block_bytes // 2] ^= 1
    dequantize(kind, torch.from_numpy(blocks), out)
    assert not np.array_equal(out.numpy(), expected, equal_nan=True)


def test_q8_k_by_its_definition() -> None:
    """The gguf package does not read this one: a float32 scale, 256 signed bytes, 16 sums."""
    rng = np.random.default_rng(0)
    scales = rng.standard_normal((3, 1)).astype(np.float32)
    values = rng.integers(-128, 128, (3, 256)).astype(np.int8)
    blocks = np.concatenate([scales.view(np.uint8), values.view(np.uint8), np.zeros((3, 32), np.uint8)], 1)
    out = torch.empty(3, 256)
    dequantize(KINDS["Q8_K"], torch.from_numpy(blocks), out)
    np.testing.assert_array_equal(out.numpy(), scales * values)


@pytest.mark.parametrize("name", WRITTEN)
def test_quantizes_as_llama_cpp_does(name: str) -> None:
    """Bit for bit, with rows of zeros, of one value, of ties and of tiny numbers."""
    values = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    values[0], values[1], values[2, :32] = 0, 1, -2
    values[3] = np.round(values[3] * 2) / 2
    values[4] *= 1e-9
    expected = quants.quantize(values, GGMLQuantizationType[name]).view(np.uint8)
    np.testing.assert_array_equal(quantize(name, torch.from_numpy(values)).numpy(), expected)


@pytest.mark.parametrize("name", ["F16", "Q8_0", "Q4_1"])
def test_refuses_values_beyond_float16(name: str) -> None:
    with pytest.raises(UserError, match="65504"):
        quantize(name, torch.full((1, 32), 1e9) * torch.linspace(-1, 1, 32))


def test_refuses_other_kinds_by_name() -> None:
    with pytest.raises(UserError, match=r"IQ2_XXS.*reads F32, F16"):
        kind_of_number(16)
    with pytest.raises(UserError, match="unknown"):
        kind_of_number(1000)


def test_kinds_agree_with_the_gguf_package() -> None:
    from gguf import GGML_QUANT_SIZES

    for kind in KINDS.values():
        number = GGMLQuantizationType[kind.name]
        assert (kind.number, (kind.block_size, kind.block_bytes)) == (number.value, GGML_QUANT_SIZES[number])
