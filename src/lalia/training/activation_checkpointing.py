"""Activation checkpointing: less memory for the layers' activations, at the price of computing some of them again."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lalia.errors import UserError
from lalia.model.experts import MixtureOfExperts
from lalia.model.transformer import Block, Transformer

CheckpointMode = Literal["none", "selective", "full"]


def checkpoint_activations(model: Transformer, mode: CheckpointMode) -> None:
    """Let the model's layers keep fewer activations for backward, in place; losses and gradients stay the same.

    none: every layer keeps what its functions save. selective: the feed-forward network of each layer, the widest part,
    keeps only its input; attention keeps all. full: each layer keeps only its input and is computed again in backward,
    a third more arithmetic (Chen et al. 2016, arXiv 1604.06174).

    A later call replaces the mode of an earlier one.

    Raises:
        UserError: if a layer has experts and the mode is selective: their routing would be computed twice for little.
    """
    if mode not in ("none", "selective", "full"):
        raise UserError(f"activation checkpointing {mode!r} is not known; choose none, selective or full")
    if mode == "selective" and any(isinstance(layer.feed_forward, MixtureOfExperts) for layer in _layers(model)):
        raise UserError("selective activation checkpointing knows no mixture of experts; choose full or none")
    for layer in _layers(model):
        for module in (layer, layer.feed_forward):
            vars(module).pop("forward", None)
        if mode == "full":
            _checkpoint(layer, random=layer.dropout.p > 0)
        elif mode == "selective":
            _checkpoint(layer.feed_forward)  # dropout, which alone draws random numbers, comes after it


def _layers(model: Transformer) -> list[Block]:
    return [layer for layer in model.layers if isinstance(layer, Block)]


def _checkpoint(module: nn.Module, random: bool = False) -> None:
    """Shadow the module's forward; the names of its weights stay, which a wrapper around it would change.

    Args:
        random: whether it draws random numbers, which have to be the same the second time.
    """
    module.forward = partial(_again, module.forward, random)


def _again(forward: Callable[..., Tensor], random: bool, x: Tensor, *rest: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(x, *rest)
    x = x.view_as(
        x
    )  # another tensor, without the recipe that functions.py may have left on x: backward will not see it
    result = checkpoint(forward, x, *rest, use_reentrant=False, preserve_rng_state=random)
    assert isinstance(result, Tensor)
    return result
