"""Which optimizer each weight gets: Muon for the matrices of the layers, AdamW for embedding, head and norms."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lalia.model.transformer import Transformer
from lalia.training.adamw import AdamW, AdamW8bit
from lalia.training.config import OptimizerConfig
from lalia.training.muon import Muon
from lalia.training.optimizer_base import Optimizer
from lalia.training.parallel.state import stacked_heights

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

REFERENCE_WIDTH = 256
"""Width for which the rates that depend on it are stated."""


def make_optimizers(model: Transformer, settings: OptimizerConfig, mesh: "DeviceMesh | None" = None) -> list[Optimizer]:
    """The optimizers of a model, as its weights lie on this process (so after `parallelize`).

    Every parameter group has its "role" (matrix, head, embedding or scalar), the "names" of its parameters, and its
    "peak_lr", from which the schedule makes "lr". The `step(keep)` of every optimizer takes a 0-d tensor: where it is
    0, nothing changes, whatever the gradients hold, and the host need not know.

    Args:
        mesh: axes along which processes hold copies or parts of the weights (`World.weights`); Muon divides its work
            among them.

    Raises:
        UserError: if `settings.kind` needs torchao and it is missing.
    """
    heights = {id(p): h for p, h in matrix_heights(model)}
    decays = {"matrix": weight_decay(settings, model.config.hidden_size)}
    groups: dict[str, dict[str, Any]] = {
        role: {
            "role": role,
            "params": [],
            "names": [],
            "lr": rate,
            "betas": settings.betas,
            "weight_decay": decays.get(role, 0.0),
        }
        for role, rate in learning_rates(settings, model.config.hidden_size).items()
    }
    for name, parameter in model.named_parameters():
        group = groups["matrix" if id(parameter) in heights else _role(model, name, parameter)]
        group["params"].append(parameter)
        group["names"].append(name)
    optimizers: list[Optimizer] = []
    if settings.kind == "muon":
        matrices = groups.pop("matrix")
        pairs = [(p, heights[id(p)]) for p in matrices.pop("params")]
        muon = Muon(
            pairs,
            lr=matrices["lr"],
            momentum=settings.momentum,
            weight_decay=matrices["weight_decay"],
            dtype=iteration_dtype(model),
            mesh=mesh,
        )
        muon.param_groups[0] |= {"role": "matrix", "names": matrices["names"]}
        optimizers.append(muon)
    kind = AdamW8bit if settings.kind == "adamw8bit" else AdamW
    optimizers.append(kind([group for group in groups.values() if group["params"]]))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def learning_rates(settings: OptimizerConfig, width: int) -> dict[str, float]:
    """Peak learning rate of each role in a model of some width, so that settings found at one width serve others.

    - Matrices under Muon: the same. Its updates have spectral norm sqrt(max(1, rows / columns)) whatever the size, the
      condition for features to change equally at every width (Yang et al. 2023, arXiv 2310.17813).
    - Matrices under AdamW: times 256 / width (Yang et al. 2022, arXiv 2203.03466, table 8). AdamW changes every element
      by about the learning rate; along the features a layer reads these changes add up.
    - Embedding: times (256 / width)^0.5, as nanochat has it and as we measured (LOG.md).
    - Head and scalars: the same. The head starts at almost zero, and its best rate hardly moved (LOG.md).
    """
    matrix = settings.matrix_learning_rate
    if settings.kind != "muon":
        matrix = settings.adamw_matrix_learning_rate * REFERENCE_WIDTH / width
    return {
        "matrix": matrix,
        "head": settings.head_learning_rate,
        "embedding": settings.embedding_learning_rate * (REFERENCE_WIDTH / width) ** 0.5,
        "scalar": settings.scalar_learning_rate,
    }


def weight_decay(settings: OptimizerConfig, width: int) -> float:
    """Decay of the matrices in a model of some width, such that learning rate times decay is the same at every width.

    That product is one over the number of steps that the weights remember (Wang and Aitchison 2024, arXiv 2405.13698).
    So Muon's decay stays, and AdamW's grows as its rate falls. A run of k times the steps wants a k-th of the decay.
    """
    return settings.weight_decay * (1.0 if settings.kind == "muon" else width / REFERENCE_WIDTH)


def _role(model: Transformer, name: str, parameter: nn.Parameter) -> str:
    """What a parameter outside the layers' matrices is."""
    if parameter.ndim < 2:
        return "scalar"
    tied = model.config.head == "language_model" and parameter is model.head_weight
    return "embedding" if name in _EMBEDDINGS and not tied else "head"  # or a projection, pooler, patches: as the head


_EMBEDDINGS = ("embedding.weight", "position_embedding.weight", "type_embedding.weight")


def iteration_dtype(model: Transformer) -> torch.dtype:
    """Precision of Muon's iteration: bfloat16 where that is fast; the iteration tolerates it (Jordan et al. 2024)."""
    if model.compute_dtype == torch.float64:
        return torch.float64
    if model.compute_dtype == torch.bfloat16 or model.device.type != "cpu":
        return torch.bfloat16
    capabilities = torch.cpu.get_capabilities()
    fast = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if fast else torch.float32


def matrix_heights(model: Transformer) -> list[tuple[nn.Parameter, tuple[int, ...]]]:
    """The matrices inside the layers, with the heights of those that are stored stacked."""
    result = []
    for layer in model.layers:
        for name, parameter in layer.named_parameters():
            if parameter.ndim >= 2:
                heights = stacked_heights(model.config, name) or (parameter.shape[-2],)
                result.append((parameter, heights * (parameter.shape[0] if parameter.ndim == 3 else 1)))
    return result
