"""Feed-forward networks: one for every token, or several among which a router chooses (mixture of experts)."""

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

    def forward(self, x: Tensor, router_logits: list[Tensor] | None = None) -> Tensor:
        """(..., hidden) -> (..., hidden); the router's logits (rows, experts) are appended to `router_logits`."""
        rows = x.reshape(-1, x.shape[-1])  # (rows, hidden)
        logits = F.linear(rows.float(), self.router.float())  # (rows, experts)
        if router_logits is not None:
            router_logits.append(logits)
        weights, chosen = choose_experts(logits, self.num_chosen, self.normalize)
        out = torch.zeros_like(rows)
        for expert in range(self.up.shape[0]):
            row, rank = (chosen == expert).nonzero(as_tuple=True)
            if row.numel() == 0:
                continue
            hidden = activate(linear(rows[row], self.up[expert]), self.activation, self.gated)
            scaled = linear(hidden, self.down[expert]) * weights[row, rank, None].to(x.dtype)
            out.index_add_(0, row, scaled)
        return out.view(x.shape)


def choose_experts(logits: Tensor, num_chosen: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """Weights (float32) and numbers of the experts of each row, (rows, num_chosen) each, best first."""
    weights, chosen = logits.float().softmax(-1).topk(num_chosen, -1)
    return (weights / weights.sum(-1, keepdim=True) if normalize else weights), chosen
