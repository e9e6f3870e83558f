"""Matrix products of the layers in 8-bit floating point, forward and backward, by torchao; from Hopper GPUs on."""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lalia.errors import UserError
from lalia.model.experts import Linear
from lalia.model.transformer import Transformer

if TYPE_CHECKING:
    from torchao.float8 import Float8LinearConfig

MIN_SIZE = 128
"""Smaller sides stay as they are: casting would cost more than the product saves."""


def convert_to_fp8(model: Transformer, emulate: bool = False) -> list[str]:
    """Let the layers multiply in float8 with one scale per tensor, in place; returns the names of those that do.

    Weights, their names and what is between the products stay in their precision, and so do embedding, head, norms,
    mixtures of experts, and layers with a side below 128 or not a multiple of 16, which the kernels cannot take. It
    pays only with `compile_layers`, which fuses the casts, and for wide models: nanochat measured depth 12 (width 768)
    as slower, depth 26 as 17 % faster.

    Args:
        model: on its device already.
        emulate: multiply in the activations' precision what was rounded to float8; for tests on any device.

    Raises:
        UserError: without torchao, on a device without float8 products, or if no layer can be converted.
    """
    try:
        from torchao.float8 import Float8LinearConfig
    except ImportError:
        raise UserError("fp8 needs torchao; install it: pip install 'lalia[lowbit]'") from None
    if not emulate:
        _check_device(model.device)
    config = Float8LinearConfig(emulate=emulate)
    converted = []
    for name, module in model.layers.named_modules(prefix="layers"):
        if isinstance(module, Linear) and all(size % 16 == 0 and size >= MIN_SIZE for size in module.weight.shape):
            module.forward = partial(_multiply, module, *_settings(module, config))
            converted.append(name)
    if not converted:
        raise UserError(
            f"fp8 fits none of the layers: their sides must be multiples of 16 and at least {MIN_SIZE} (hidden_size "
            f"{model.config.hidden_size}, intermediate_size {model.config.intermediate_size}); use precision 'bfloat16'"
        )
    return converted


def _check_device(device: torch.device) -> None:
    if device.type != "cuda":
        raise UserError(
            f"fp8 needs an NVIDIA GPU of the Hopper generation or later, the model is on {device.type}; "
            "set precision = 'bfloat16' or 'float32'"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < (9, 0):
        raise UserError(
            f"fp8 needs an NVIDIA GPU of the Hopper generation (compute capability 9.0) or later; "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}: set precision = 'bfloat16'"
        )


def _settings(module: Linear, config: "Float8LinearConfig") -> tuple[Any, "Float8LinearConfig"]:
    """What torchao's product takes beside the tensors; its own layer, without weights, derives it."""
    from torchao.float8.float8_linear import Float8Linear

    plain = nn.Linear(module.weight.shape[1], module.weight.shape[0], bias=False, device="meta")
    return Float8Linear.from_float(plain, config=config).linear_mm_config, config


def _multiply(module: Linear, products: Any, config: "Float8LinearConfig", x: Tensor) -> Tensor:
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args

    y = matmul_with_hp_or_float8_args.apply(x, module.weight.to(x.dtype).t(), products, config)
    assert isinstance(y, Tensor)
    return y if module.bias is None else y + module.bias.to(y.dtype)
