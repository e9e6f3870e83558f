"""Feed-forward networks: one for every token, or several among which a router chooses (mixture of experts)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lalia.model.config import ModelConfig
from lalia.model.functions import linear, relu_squared, swiglu


class Linear(nn.Module):
    """y = x W^T + b, the weights cast to the activation's dtype, so that the activation alone decides the precision."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def activate(x: Tensor, activation: str, gated: bool) -> Tensor:
    """activation(gate) * up where gated, the last dimension holding gate then up; else activation(x).

    Args:
        x: (..., 2 * size) if gated, (..., size) otherwise.

    Returns:
        (..., size)
    """
    if gated:
        if activation == "silu":
            return swiglu(x)
        gate, up = x.chunk(2, -1)
        return elementwise(gate, activation) * up
    return elementwise(x, activation)


def elementwise(x: Tensor, activation: str) -> Tensor:
    """The activation by its name in `ModelConfig`."""
    if activation == "relu_squared":
        return relu_squared(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "gelu":
        return F.gelu(x)
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    assert activation == "silu", activation
    return F.silu(x)


class FeedForward(nn.Module):
    """Gated (SwiGLU, GeGLU) or plain feed-forward network."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gated, self.activation = config.gated, config.activation
        width = config.intermediate_size * (2 if config.gated else 1)
        self.up = Linear(config.hidden_size, width, config.feed_forward_bias)
        self.down = Linear(config.intermediate_size, config.hidden_size, config.feed_forward_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(activate(self.up(x), self.activation, self.gated))


class MixtureOfExperts(nn.Module):
    """Each token through the experts that its router scores highest, their outputs weighted (Shazeer et al. 2017).

    The router computes in float32 whatever the activations' precision (Zoph et al. 2022).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gated, self.activation = config.gated, config.activation
        self.num_chosen, self.normalize = config.num_experts_per_token, config.normalize_expert_weights
        size = config.expert_size or config.intermediate_size
        width = size * (2 if config.gated else 1)
        self.router = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.up = nn.Parameter(torch.empty(config.num_experts, width, config.hidden_size))
        self.down = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, size))
        self.exchange: Callable[[MixtureOfExperts, Tensor, Tensor], Tensor] | None = None
        """Stands in for `compute` where each process holds some of the experts only: (self, rows, counts) -> rows."""

    def forward(self, x: Tensor, router_logits: list[Tensor] | None = None) -> Tensor:
        """(..., hidden) -> (..., hidden); the router's logits (rows, experts) are appended to `router_logits`."""
        rows = x.reshape(-1, x.shape[-1])  # (rows, hidden)
        logits = F.linear(rows.float(), self.router.float())  # (rows, experts)
        if router_logits is not None:
            router_logits.append(logits)
        weights, chosen = choose_experts(logits, self.num_chosen, self.normalize)
        choices = chosen.reshape(-1)
        order = choices.argsort(stable=True)  # those of one expert side by side
        # Not bincount: on an accelerator it waits for the device.
        counts = choices.new_zeros(len(self.router)).scatter_add_(0, choices, torch.ones_like(choices))
        spread = rows.index_select(0, order // self.num_chosen)  # (rows * num_chosen, hidden)
        if self.exchange is None:
            computed = self.compute(spread, counts, self.up, self.down)
        else:
            computed = self.exchange(self, spread, counts)
        per_choice = computed.index_select(0, inverse(order)).view(-1, self.num_chosen, x.shape[-1])
        return (per_choice * weights.unsqueeze(-1).to(x.dtype)).sum(1).view(x.shape)

    def compute(self, rows: Tensor, counts: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """Each row through its expert.

        Args:
            rows: (rows, hidden), those of the first expert first.
            counts: (experts,) int64, rows of each expert.
            up, down: the weights of these experts.

        Returns:
            (rows, hidden)
        """
        if rows.is_cuda and _fits_grouped(rows, up, down):
            ends = counts.cumsum(0).int()
            hidden = activate(grouped_linear(rows, up, ends), self.activation, self.gated)
            return grouped_linear(hidden, down, ends)
        # Not `linear`: oneDNN makes and keeps code for every number of rows, which differs from step to step.
        parts = zip(rows.split(counts.tolist()), up.to(rows.dtype).unbind(), down.to(rows.dtype).unbind(), strict=True)
        return torch.cat([F.linear(activate(F.linear(x, u), self.activation, self.gated), d) for x, u, d in parts])


def inverse(order: Tensor) -> Tensor:
    """The permutation that undoes another: x[order][inverse(order)] = x."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows weight[expert]^T in one kernel, which takes the sizes of the groups from the device.

    Args:
        rows: (rows, in_features), those of the first expert first.
        weight: (experts, out_features, in_features)
        ends: (experts,) int32, where the rows of each expert end.
    """
    return torch._grouped_mm(rows, weight.to(rows.dtype).transpose(1, 2), offs=ends)  # pyright: ignore[reportPrivateImportUsage]


def _fits_grouped(rows: Tensor, up: Tensor, down: Tensor) -> bool:
    """The kernel is for bfloat16 and rows of whole 16 bytes; from Ampere on."""
    whole = all(size % 8 == 0 for size in (*up.shape[1:], *down.shape[1:]))
    return rows.dtype == torch.bfloat16 and whole and torch.cuda.get_device_capability(rows.device) >= (8, 0)


def choose_experts(logits: Tensor, num_chosen: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """Weights (float32) and numbers of the experts of each row, (rows, num_chosen) each, best first."""
    weights, chosen = logits.float().softmax(-1).topk(num_chosen, -1)
    return (weights / weights.sum(-1, keepdim=True) if normalize else weights), chosen
