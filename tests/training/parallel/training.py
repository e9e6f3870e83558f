"""A few optimizer steps in any layout, and the same in one process, for comparison."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lalia.data.loader import IGNORED, Batch
from lalia.model.config import ModelConfig
from lalia.model.transformer import Transformer
from lalia.training.objectives import LossModule, Metrics, Objective, next_token
from lalia.training.parallel.apply import GradientSync, gradient_norm, parallelize
from lalia.training.parallel.state import full_state, whole
from lalia.training.parallel.world import World

VOCAB, LENGTH = 61, 12
KEPT = (0.0, 0.0, 1.0, 0.9, 0.05, 0.5, 0.1, 1.0)
"""Share of targets that count in each row of a batch: some ranks and micro-batches have none."""

QWEN3: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": LENGTH,
    "qk_norm": "before_rope",
}
GPT2: dict[str, Any] = QWEN3 | {
    "num_key_value_heads": 4,
    "qk_norm": "none",
    "norm": "layer",
    "positions": "learned",
    "qkv_bias": True,
    "attention_output_bias": True,
    "feed_forward_bias": True,
    "gated": False,
    "activation": "gelu_tanh",
    "tie_word_embeddings": False,
}
QWEN2: dict[str, Any] = QWEN3 | {"qk_norm": "none", "qkv_bias": True, "norm_order": "sandwich", "head_bias": True}
MIXTURE: dict[str, Any] = QWEN3 | {
    "num_experts": 3,
    "num_experts_per_token": 2,
    "expert_size": 16,
    "router_aux_loss_coef": 0.0,
}


def mean_objective(model: Transformer, batch: Batch) -> tuple[Tensor, Tensor, Metrics]:
    """Negative control: the gradient is that of the mean over ranks and micro-batches of their mean losses."""
    loss, weight, metrics = next_token(model, batch)
    return loss / weight.clamp_min(1), torch.ones_like(weight), metrics


@dataclass
class Outcome:
    """What a run gave; tensors are whole, and only on the main process."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]
    """Of the first step, divided by the number of targets."""
    weights: dict[str, Tensor]


def make_model(values: dict[str, Any], dtype: torch.dtype = torch.float32) -> Transformer:
    """Random weights everywhere, so that every gradient is one."""
    model = Transformer(ModelConfig.parse(values))
    model.compute_dtype = dtype
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            mean = 1.0 if parameter.ndim == 1 and model.config.norm_weight == "plain" else 0.0
            parameter.normal_(mean, 0.1, generator=generator)
    return model


def make_batch(step: int) -> Batch:
    """Rows with very different numbers of targets; in every second batch rows hold two documents."""
    generator = torch.Generator().manual_seed(step)
    rows = len(KEPT)
    tokens = torch.randint(0, VOCAB, (rows, LENGTH + 1), generator=generator)
    kept = torch.rand(rows, LENGTH, generator=generator) < torch.tensor(KEPT)[:, None]
    targets = torch.where(kept, tokens[:, 1:], IGNORED)
    half = LENGTH // 2 if step % 2 else LENGTH
    positions = torch.arange(LENGTH) % half
    return Batch(
        tokens=tokens[:, :-1],
        targets=targets,
        document_ids=(torch.arange(LENGTH) // half).int().expand(rows, -1),
        positions=positions.expand(rows, -1),
        single_document=half == LENGTH,
        num_targets=int(kept.sum()),
        num_bytes=None,
    )


def make_optimizer(model: Transformer) -> torch.optim.Optimizer:
    """AdamW with its state; the large epsilon keeps the rounding of gradients near zero from deciding an update."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.1, foreach=False)
    for parameter in model.parameters():
        moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros(()), **moments}
    return optimizer


def train(
    model: Transformer,
    world: World,
    micro_batches: int = 1,
    steps: int = 3,
    objective: Objective = next_token,
    optimizer: torch.optim.Optimizer | None = None,
) -> Outcome:
    """Train a model that `parallelize` has been applied to, or that is alone."""
    sync = GradientSync(LossModule(model, objective), world)
    optimizer = optimizer or make_optimizer(model)
    outcome = Outcome([], [], {}, {})
    for step in range(steps):
        batch = make_batch(step)
        rows = len(batch.tokens) // world.data_size
        mine = batch.split(rows)[world.data_rank]
        total, weight = torch.zeros(()), torch.zeros((), dtype=torch.int64)
        parts = mine.split(rows // micro_batches)
        for number, part in enumerate(parts):
            with sync(last=number == len(parts) - 1):
                loss, count, _ = sync.module(part)
                loss.backward()
            total += loss.detach()
            weight += count
        total, weight = world.sum(total), world.sum(weight)
        outcome.losses.append(float(total / weight))
        outcome.norms.append(float(gradient_norm(model, world) / weight))
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.div_(weight)
        outcome.gradients = outcome.gradients or whole_gradients(model)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    outcome.weights = full_state(model)
    return outcome


def whole_gradients(model: Transformer) -> dict[str, Tensor]:
    """Gradients as in one process."""
    result = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        result[name] = whole(model.config, name, parameter.grad).clone()
    return result


def alone(values: dict[str, Any], micro_batches: int = 1, dtype: torch.dtype = torch.float32) -> Outcome:
    """A few steps in one process."""
    return train(make_model(values, dtype), World.alone(), micro_batches)


def together(values: dict[str, Any], micro_batches: int, dtype: torch.dtype, world: World) -> Outcome:
    """The same in the layout of the world."""
    model = make_model(values, dtype)
    parallelize(model, world)
    return train(model, world, micro_batches)


def largest_difference(actual: Outcome, expected: Outcome) -> float:
    """Over losses, gradient norms, and on the main process gradients and weights; relative to values above 1."""
    pairs = [(torch.tensor(actual.losses), torch.tensor(expected.losses))]
    pairs.append((torch.tensor(actual.norms), torch.tensor(expected.norms)))
    if actual.weights:
        assert list(actual.weights) == list(expected.weights)
        pairs += [(actual.weights[name], expected.weights[name]) for name in expected.weights]
        pairs += [(actual.gradients[name], expected.gradients[name]) for name in expected.gradients]
    return max(float(((a - b).abs() / b.abs().clamp_min(1.0)).max()) for a, b in pairs)
