"""AdamW whose step can be called off on the device; and with moments of 8 bits."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from lalia.errors import UserError
from lalia.training.optimizer_base import Optimizer
from lalia.training.parallel.state import local

EPS = 1e-10
"""Rates are large for weights whose gradients are small: those of rare tokens."""


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), all parameters in one fused kernel.

    Args:
        groups: parameter groups, each with its "lr", "betas" and "weight_decay".
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": (0.9, 0.99), "weight_decay": 0.0})
        for p in (p for group in self.param_groups for p in group["params"]):
            # At once, so that a checkpoint finds where to load it.
            self.state[p]["step"] = torch.zeros((), device=p.device)
            self.state[p]["exp_avg"] = torch.zeros_like(p)
            self.state[p]["exp_avg_sq"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, keep: Tensor | None = None) -> None:
        found_inf = None if keep is None else 1.0 - keep
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None and local(p).numel()]
            if not params:
                continue
            states = [self.state[p] for p in params]
            beta1, beta2 = group["betas"]
            adamw(  # the parts here, since the kernel does not mix DTensors with others
                [local(p) for p in params],
                [local(p.grad) for p in params],
                [local(state["exp_avg"]) for state in states],
                [local(state["exp_avg_sq"]) for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                found_inf=found_inf,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=EPS,
                maximize=False,
            )


BLOCK = 256
"""Values that share a scale."""

SMALLEST = 4096
"""Weights with fewer values keep moments in float32 (Dettmers et al. 2022)."""


class AdamW8bit(Optimizer):
    """AdamW whose moments take 8 bits a value instead of 32: codes of dynamic precision, a scale for each block.

    The codes are torchao's (Dettmers et al. 2022, arXiv 2110.02861).

    The second moment never rounds to zero, which would make the step of its weight unbounded.

    Args:
        groups: as for AdamW; the parameters must be whole.

    Raises:
        UserError: without torchao.
        TypeError: for parameters that are divided among processes (`parallel.layout.misfits` says so before).
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": (0.9, 0.99), "weight_decay": 0.0})
        self._codec = _Codec()
        for p in (p for group in self.param_groups for p in group["params"]):
            if hasattr(p, "placements"):
                raise TypeError("AdamW8bit takes whole weights, these are divided among processes")
            state = self.state[p]
            state["step"] = torch.zeros((), device=p.device)
            for key in ("exp_avg", "exp_avg_sq"):
                if p.numel() < SMALLEST or p.numel() % BLOCK:
                    state[key] = torch.zeros_like(p)
                else:
                    zeros = torch.zeros_like(p, memory_format=torch.contiguous_format)
                    state[f"{key}_codes"], state[f"{key}_scale"] = self._codec.encode(zeros, key == "exp_avg")

    @torch.no_grad()
    def step(self, keep: Tensor | None = None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                kept = keep if keep is not None else torch.ones_like(state["step"])
                applies = kept > 0
                count = state["step"] + 1
                first = self._load(state, "exp_avg").lerp(p.grad, 1 - beta1)
                second = self._load(state, "exp_avg_sq").lerp(p.grad.square(), 1 - beta2)
                divisor = (second / (1 - beta2**count)).sqrt() + EPS
                updated = (
                    p * (1 - group["lr"] * group["weight_decay"]) - group["lr"] / (1 - beta1**count) * first / divisor
                )
                p.copy_(torch.where(applies, updated, p))
                self._store(state, "exp_avg", first, applies)
                self._store(state, "exp_avg_sq", second, applies)
                state["step"] += kept

    def _load(self, state: dict[str, Tensor], key: str) -> Tensor:
        if key in state:
            return state[key]
        return self._codec.decode(state[f"{key}_codes"], state[f"{key}_scale"], key == "exp_avg")

    def _store(self, state: dict[str, Tensor], key: str, value: Tensor, applies: Tensor) -> None:
        if key in state:
            new = {key: value}
        else:
            codes, scale = self._codec.encode(value, key == "exp_avg")
            new = {f"{key}_codes": codes, f"{key}_scale": scale}
        for name, tensor in new.items():
            state[name].copy_(torch.where(applies, tensor, state[name]))


class _Codec:
    """torchao's 8-bit codes of moments."""

    def __init__(self) -> None:
        try:
            from torchao.optim import quant_utils
        except ImportError:
            raise UserError(
                'optimizer.kind = "adamw8bit" needs torchao; install it with: pip install "lalia[lowbit]"'
            ) from None
        self._utils = quant_utils
        self._maps = {signed: torch.tensor(quant_utils.create_dynamic_map(signed)) for signed in (True, False)}

    def encode(self, values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
        """(codes of the shape of `values`, one scale per block)"""
        scaled, scale = self._utils.scale_tensor(values.contiguous(), BLOCK)
        codes = self._utils.quantize_8bit_with_qmap(scaled, self._map(values, signed))
        return (codes if signed else codes.clamp_min(1)), scale

    def decode(self, codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
        return self._utils.dequant_with_qmap(codes, self._map(codes, signed), scale)

    def _map(self, like: Tensor, signed: bool) -> Tensor:
        if self._maps[signed].device != like.device:
            self._maps[signed] = self._maps[signed].to(like.device)
        return self._maps[signed]
