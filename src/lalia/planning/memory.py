"""Memory of training on one device: weights, gradients, optimizer state, activations, loss, runtime."""

from dataclasses import dataclass
from typing import Literal

import torch

from lalia.model.attention import NUM_BLOCKS
from lalia.model.config import ModelConfig
from lalia.training.linear_cross_entropy import chunk_rows
from lalia.training.parallel.layout import ParallelConfig

Checkpointing = Literal["none", "selective", "full"]

RUNTIME_BYTES, COMPILER_BYTES = 400 * 2**20, 120 * 2**20
"""Resident size of Python with PyTorch, its kernels' code and buffers, pyarrow and the tokenizer, and what compiling
adds to that, measured (LOG.md); on an accelerator the driver's context is of the former's order too."""

STATE_BYTES = {"muon": (4, 8), "adamw": (8, 8), "adamw8bit": (2, 2)}
"""Optimizer state per weight of the layers' matrices and of the embedding and head, by `optimizer.kind`: Muon keeps one
float32 momentum, AdamW two moments, of 32 or 8 bits."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by what they hold; `checkpoint` is the copy that is written while training goes on."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    checkpoint: int
    runtime: int

    @property
    def total(self) -> int:
        training = self.weights + self.gradients + self.optimizer + self.activations + self.loss
        return training + self.checkpoint + self.runtime


def layer_parameters(shape: ModelConfig, layer: int) -> tuple[int, int]:
    """Matrix weights of a layer: those outside its experts, and those of all its experts."""
    attention = shape.hidden_size * 2 * (shape.query_size + shape.key_value_size)
    matrices = 3 if shape.gated else 2
    if experts := shape.experts_of_layer(layer):
        size = shape.expert_size or shape.intermediate_size
        return attention + shape.hidden_size * experts, experts * matrices * size * shape.hidden_size
    return attention + matrices * shape.intermediate_size * shape.hidden_size, 0


def parameters(shape: ModelConfig) -> int:
    """All matrix weights of the model: layers with every expert, embedding, and the head where it is not tied."""
    layers = sum(sum(layer_parameters(shape, layer)) for layer in range(shape.num_hidden_layers))
    return layers + _vocabulary_parameters(shape)


def _vocabulary_parameters(shape: ModelConfig) -> int:
    return shape.vocab_size * shape.hidden_size * (1 if shape.tie_word_embeddings else 2)


def training_memory(
    shape: ModelConfig,
    rows: int,
    length: int,
    precision: str,
    checkpointing: Checkpointing = "none",
    layout: ParallelConfig | None = None,
    accelerator: bool = False,
    optimizer: str = "muon",
    average: bool = False,
) -> Memory:
    """Bytes that one device needs while a micro-batch of `rows` rows goes forward and backward.

    Weights, gradients and state are float32, divided by `shard` and `tensor` (Rajbhandari et al. 2020; the experts by
    `expert` too); a layer that is gathered to compute, and the next one, are whole but for `tensor`. Activations are
    those that the layers keep for backward (`layer_activations`), and for one layer at work.

    Args:
        rows: rows of the micro-batch on this device; with `layout.context` each device holds a part of every row.
        precision: of the activations.
        checkpointing: "none" keeps all; "selective" computes the feed-forward networks again, "full" whole layers, of
            which it keeps the input (Chen et al. 2016).
        layout: how the devices are laid out; None means one.
        accelerator: fused attention, which keeps no probabilities.
        optimizer: its kind, as in the settings.
        average: whether a moving average of the weights is kept.
    """
    layout = layout or ParallelConfig(replicate=1)
    value_bytes = 4 if precision == "float32" else 2
    tokens = rows * length // layout.context
    layers = [layer_parameters(shape, layer) for layer in range(shape.num_hidden_layers)]
    dense, experts = (sum(column) for column in zip(*layers, strict=True))
    divided = layout.shard * layout.tensor
    in_layers = dense / divided + experts / (divided * layout.expert)
    vocabulary = _vocabulary_parameters(shape) / divided
    held = in_layers + vocabulary
    weights, gradients = 4.0 * held, 4.0 * held
    if value_bytes == 2:  # the cast weights, which backward reads
        weights += 2.0 * held
    if layout.shard > 1:
        gathered = max(sum(layer) for layer in layers) / layout.tensor
        weights += 2 * 4.0 * gathered
        gradients += 4.0 * gathered
    kept, working = layer_activations(shape, length, checkpointing, accelerator)
    per_layer = tokens * value_bytes / layout.tensor
    stream = tokens * value_bytes * shape.hidden_size
    # What a layer keeps it also works with; its backward makes about half of that again.
    activations = shape.num_hidden_layers * kept * per_layer + working * per_layer + 4 * stream
    rows_at_once = chunk_rows(tokens, shape.vocab_size, torch.device("cuda" if accelerator else "cpu"))
    chunks = 3 * rows_at_once * shape.vocab_size * 4
    head = shape.vocab_size * shape.hidden_size / divided
    # Besides the chunks of logits: the head's gradient a second time, and its cast and transposed copies.
    loss = chunks + head * (4.0 + 2 * value_bytes)
    state = in_layers * STATE_BYTES[optimizer][0] + vocabulary * STATE_BYTES[optimizer][1] + 4.0 * average * held
    return Memory(
        weights=int(weights),
        gradients=int(gradients),
        optimizer=int(state),
        activations=int(activations),
        loss=int(loss),
        checkpoint=0 if accelerator else int(4.0 * held + state),  # an accelerator's copy is in the host's memory
        runtime=RUNTIME_BYTES,
    )


def layer_activations(
    shape: ModelConfig, length: int, checkpointing: Checkpointing, accelerator: bool
) -> tuple[float, float]:
    """Values per token that a layer keeps for backward, and those it needs besides while it is at work.

    Kept: the input of both norms and what they give (4 hidden sizes), query, key and value before and after rotation,
    what attention gives, gate and up and their product; on a CPU also the probabilities, of which the blocked form
    computes the share (n + 1) / 2n.
    """
    hidden, query, key_value = shape.hidden_size, shape.query_size, shape.key_value_size
    feed = (shape.num_experts_per_token * (shape.expert_size or shape.intermediate_size)) or shape.intermediate_size
    up = feed * (2 if shape.gated else 1)
    probabilities = 0.0 if accelerator else shape.num_attention_heads * length * (NUM_BLOCKS + 1) / (2 * NUM_BLOCKS)
    everything = 4 * hidden + 3 * query + 4 * key_value + up + feed + probabilities
    backward = up + 2 * feed + 2 * hidden
    if checkpointing == "none":
        return everything, backward
    kept = everything - up - feed if checkpointing == "selective" else hidden
    return kept, everything - kept + backward
