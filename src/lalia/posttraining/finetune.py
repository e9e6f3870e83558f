"""The finetune stage: from a base model and documents to a model that talks."""

import itertools
import random
from functools import partial
from pathlib import Path
from typing import Any

from lalia.data.documents import Document, read_documents
from lalia.data.loader import Batch, PackedBatches, PackedConversations
from lalia.data.shards import TokenShards
from lalia.devices import make_deterministic, peak_memory_bytes, use_threads
from lalia.errors import UserError
from lalia.formats.hf_folder import load_model
from lalia.posttraining.config import FinetuneConfig
from lalia.posttraining.dialogue import (
    ConversationLimits,
    Messages,
    has_speeches,
    identity_conversations,
    passage_conversations,
    play_conversations,
)
from lalia.progress import Progress
from lalia.tokenizer.bpe import Tokenizer
from lalia.tokenizer.chat import render_with_mask
from lalia.training.config import TrainingConfig, parse_time
from lalia.training.hardware import DTYPES
from lalia.training.objectives import next_token
from lalia.training.parallel.world import start
from lalia.training.pretrain import Evaluation, as_planned, save_trained, uncompiled_seconds_per_step
from lalia.training.schedule import evenly_spaced, mean_rows
from lalia.training.tensorboard import TensorBoard
from lalia.training.trainer import Trainer


class Mixture:
    """Batches of two sources in a fixed proportion: step s takes the second when share * s passes a whole number."""

    def __init__(self, first: PackedConversations, second: PackedBatches, share_of_second: float) -> None:
        self.first, self.second, self.share = first, second, share_of_second

    def batch(self, step: int) -> Batch:
        taken = int(step * self.share)
        if int((step + 1) * self.share) > taken:
            return self.second.batch(taken)
        return self.first.batch(step - taken)


def finetune(
    config: FinetuneConfig,
    pretraining: TrainingConfig,
    plan: dict[str, Any],
    documents: Path,
    tokens: Path,
    base: Path,
    out: Path,
    run_fingerprint: str,
    progress: Progress,
) -> dict[str, Any]:
    """Teach the base model to take turns and write the chat model's folder to `out`.

    The loss counts what the assistant says and the mark that ends its turn, nothing else; some steps stay on
    pretraining text.

    Returns:
        what happened: conversations by kind, steps, tokens, seconds, bits per byte on held-out text.
    """
    values = {name: entry["value"] for name, entry in plan["values"].items()}
    pretraining = as_planned(pretraining, values)
    if config.micro_batch_size is None and config.activation_checkpointing == "none":
        memory = ("micro_batch_size", "activation_checkpointing")
        config = config.model_copy(update={name: getattr(pretraining, name) for name in memory})
    if pretraining.deterministic:
        make_deterministic()
    world = start(pretraining.parallel, pretraining.timeout_seconds)
    if world.size == 1:
        use_threads(values["threads"])
    if pretraining.tensorboard and world.is_main:
        progress.listeners.append(TensorBoard(out / "tensorboard"))
    length, batch_size = values["sequence_length"], values["batch_size"]
    whole = batch_size / mean_rows(batch_size, pretraining.batch_stages)  # pretraining may have smaller batches too
    steps = num_steps(config, uncompiled_seconds_per_step(plan) * whole)
    tokenizer = Tokenizer.load(tokens / "tokenizer")
    train = read_documents(documents, "train")
    conversations, counts = collect_conversations(config, train, tokenizer, length, steps * batch_size * length)
    encoded = [render_with_mask(tokenizer, messages) for messages in conversations]
    fitting = [(ids, mask) for ids, mask in encoded if len(ids) <= length]
    if len(fitting) < len(encoded):
        counts["longer than the context, left out"] = len(encoded) - len(fitting)
        encoded = fitting
    progress.say(f"{len(encoded):,} conversations: " + ", ".join(f"{n:,} {kind}" for kind, n in counts.items()))
    model = load_model(base).requires_grad_(True).to(world.device)
    model.compute_dtype = DTYPES[values["precision"]]
    batches = Mixture(
        PackedConversations(encoded, length, batch_size, config.seed),
        PackedBatches(TokenShards.open(tokens, "train"), length, batch_size, config.seed),
        config.pretraining_share,
    )
    evaluate = Evaluation(model, tokenizer, tokens, length, pretraining.evaluation_bytes, steps)
    trainer = Trainer(
        model,
        batches,
        partial(next_token, z_loss=config.z_loss),
        steps,
        config.optimizer,
        out,
        run_fingerprint,
        progress,
        config,
        world,
        evaluate=evaluate,
        evaluation_steps=evenly_spaced(steps, config.evaluations),
    )
    happened = trainer.train()
    happened |= {
        "bits_per_byte": evaluate.last,
        "conversations": counts,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    save_trained(model, tokenizer, out, world, chat=True)
    return happened


def num_steps(config: FinetuneConfig, seconds_per_step: float) -> int:
    """Optimizer steps: those asked for, or what the budget buys at the planned speed of pretraining."""
    if config.steps is not None:
        return config.steps
    assert config.budget is not None  # FinetuneConfig sees to it
    return max(1, int(parse_time(config.budget) / seconds_per_step))


def collect_conversations(
    config: FinetuneConfig, train: list[Document], tokenizer: Tokenizer, length: int, num_tokens: int
) -> tuple[list[Messages], dict[str, int]]:
    """Conversations enough for `num_tokens`, in a seeded random order, and how many of each kind.

    Raises:
        UserError: if the documents give no conversation of the wanted kind.
    """
    limits = ConversationLimits(length, config.max_turns)
    plays = [d for d in train if has_speeches(d)]
    kind = config.source
    if kind == "auto":
        kind = "dialogue" if plays else "continuation"
    if kind == "dialogue":
        talks = [c for d in plays for c in play_conversations(d, tokenizer, limits)]
    else:
        talks = [c for d in train for c in passage_conversations(d, tokenizer, limits)]
    if not talks:
        raise UserError(
            f"finetune.source = {config.source!r} found no {kind} that fits {length} tokens in {len(train)} documents; "
            "set finetune.source = 'continuation', give longer texts or a longer pretrain.sequence_length, or skip "
            "this stage with finetune.enabled=false"
        )
    rng = random.Random(config.seed)
    rng.shuffle(talks)
    enough = max(8, 2 * num_tokens // length)  # a row holds a conversation at least; twice that is ample
    talks = talks[:enough]
    num_identity = round(len(talks) * config.identity_share / (1.0 - config.identity_share))
    about_itself = itertools.islice(identity_conversations(config.name, train, config.seed), 20 * num_identity)
    fitting = (c for c in about_itself if len(render_with_mask(tokenizer, c)[0]) <= length)
    identity = list(itertools.islice(fitting, num_identity))
    together = talks + identity
    rng.shuffle(together)
    return together, {kind: len(talks), "identity": len(identity)}
