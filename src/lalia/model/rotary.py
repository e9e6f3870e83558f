"""Rotary positions: frequencies, their scaling for long contexts, and the tables that `rotate` takes."""

import math

import torch
from torch import Tensor

from lalia.model.config import ModelConfig, RopeScaling


def rotary_table(positions: Tensor, config: ModelConfig, layer: int) -> tuple[Tensor, Tensor]:
    """cos and signed sin for `rotate` (Su et al. 2021), computed in float32.

    Args:
        positions: (..., seq) integer positions.
        layer: number of the layer, on which base and scaling may depend.

    Returns:
        cos, sin: (..., seq, rotary_size) float32; sin's first half carries the minus of the rotation.
    """
    theta, scaling = config.rope_of_layer(layer)
    frequencies = rotary_frequencies(config.rotary_size, theta, scaling).to(positions.device)
    angle = positions.float().unsqueeze(-1) * frequencies  # (..., seq, rotary_size / 2)
    cos, sin = angle.cos(), angle.sin() * config.rope_direction
    if scaling is not None and scaling.attention_factor != 1.0:
        cos, sin = cos * scaling.attention_factor, sin * scaling.attention_factor
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotary_frequencies(size: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Angle per position of each pair of dimensions, theta ** (-2 i / size) before scaling: (size / 2,) float32."""
    exponent = torch.arange(0, size, 2, dtype=torch.int64).float() / size
    frequencies = 1.0 / (theta**exponent)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling)
    return _yarn(frequencies, size, theta, scaling)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Short wavelengths stay, long ones are divided by the factor, those between are blended (Llama 3.1)."""
    wavelength = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    share = (scaling.original_max_position_embeddings / wavelength - low) / (high - low)
    share = share.clamp(0, 1)
    return (1 - share) * frequencies / scaling.factor + share * frequencies


def _yarn(frequencies: Tensor, size: int, theta: float, scaling: RopeScaling) -> Tensor:
    """Dimensions that turn often in the original context stay, those that turn rarely are divided by the factor.

    Peng et al. 2023 (arXiv 2309.00071), section 3.2.
    """

    def dimension(num_turns: float) -> float:
        length = scaling.original_max_position_embeddings
        return size * math.log(length / (num_turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001
    divided = ((torch.arange(size // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return frequencies / scaling.factor * divided + frequencies * (1 - divided)


def yarn_attention_factor(factor: float, mscale: float | None = None, mscale_all_dim: float | None = None) -> float:
    """The factor on cos and sin where a model folder does not give one (section 3.4 there; DeepSeek's two scales)."""

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)
