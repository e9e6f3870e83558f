"""The pretrain stage: from token shards and a plan to a base model folder."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from lalia.data.loader import Batch, PackedBatches
from lalia.data.shards import TokenShards
from lalia.devices import make_deterministic, num_processes, peak_memory_bytes, use_threads
from lalia.errors import CorruptFile, UserError
from lalia.files import read_json
from lalia.formats.hf_folder import save_model
from lalia.model.config import ModelConfig
from lalia.model.transformer import Transformer
from lalia.progress import Progress
from lalia.tokenizer.bpe import Tokenizer
from lalia.training.bits_per_byte import bits_per_byte
from lalia.training.checkpoints import read_model
from lalia.training.config import OptimizerConfig, TrainingConfig
from lalia.training.hardware import DTYPES
from lalia.training.meters import meters_of
from lalia.training.objectives import next_token
from lalia.training.parallel.layout import ParallelConfig
from lalia.training.parallel.state import full_state
from lalia.training.parallel.world import World, start
from lalia.training.sample import sample_text
from lalia.training.schedule import BatchSchedule, evenly_spaced
from lalia.training.tensorboard import TensorBoard
from lalia.training.trainer import Trainer, initialize


def pretrain(
    config: TrainingConfig, plan: dict[str, Any], tokens: Path, out: Path, run_fingerprint: str, progress: Progress
) -> dict[str, Any]:
    """Train a base model as planned and write it to `out` as a Hugging Face folder.

    Args:
        config: optimizer and evaluation settings.
        plan: plan.json: the model's shape, steps, batch, learning rates, precision, threads.
        tokens: folder of the tokenize stage.
        out: receives the model folder, metrics.jsonl and, while training, checkpoints.
        run_fingerprint: identity of everything above; checkpoints of another are refused.
        progress: where to report.

    Returns:
        what happened: steps, tokens, seconds, tokens per second, bits per byte, peak memory.
    """
    values = {name: entry["value"] for name, entry in plan["values"].items()}
    if config.deterministic:
        make_deterministic()
    config = as_planned(config, values)
    world = start(config.parallel, config.timeout_seconds)
    if world.size == 1:  # otherwise whoever started the processes said how many threads each has
        use_threads(values["threads"])
    if config.tensorboard and world.is_main:
        progress.listeners.append(TensorBoard(out / "tensorboard"))
    tokenizer = Tokenizer.load(tokens / "tokenizer")
    model = Transformer(ModelConfig.parse(plan["model"], "plan.json"))
    initialize(model, config.seed)
    model.to(world.device).compute_dtype = DTYPES[values["precision"]]
    steps, length, rows = values["steps"], values["sequence_length"], values["batch_size"]
    shards = TokenShards.open(tokens, "train", verify=True)
    shards.check_tokenizer(tokenizer.sha256)
    packed = PackedBatches(shards, length, rows, config.seed)
    schedule = BatchSchedule(rows, length, steps, config.batch_stages, config.sequence_stages)
    evaluate = Evaluation(model, tokenizer, tokens, length, config.evaluation_bytes, steps)
    trainer = Trainer(
        model,
        ScheduledBatches(packed, schedule),
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
        meters=meters_of(model, world, values["precision"]),
    )
    happened = trainer.train()
    happened |= {"bits_per_byte": evaluate.last, "peak_memory_bytes": peak_memory_bytes(), "packing": packed.report()}
    happened |= {"processes": world.size, "layout": world.layout.model_dump()}
    save_trained(model, tokenizer, out, world, chat=False)
    return happened


def as_planned(config: TrainingConfig, values: dict[str, Any]) -> TrainingConfig:
    """The settings with what the planner decided about memory, rates and layout.

    The layout was planned for the devices there were then; with another number of processes, what was asked for counts.
    """
    changes: dict[str, Any] = {
        "optimizer": OptimizerConfig.parse(values["optimizer"], "plan.json"),
        "micro_batch_size": values["micro_batch_size"],
        "activation_checkpointing": values["activation_checkpointing"],
        "compile": values.get("compile", config.compile),
    }
    if config.parallel == ParallelConfig() and values["devices"] == num_processes():
        changes["parallel"] = ParallelConfig.parse(values["parallel"], "plan.json")
    return config.model_copy(update=changes)


def uncompiled_seconds_per_step(plan: dict[str, Any]) -> float:
    """Of a plan's step without compilation, which no stage but pretraining has unless it is asked for."""
    return plan.get("calibration", {}).get("uncompiled_seconds_per_step", plan["predicted"]["seconds_per_step"])


class ScheduledBatches:
    """Rows of one stream in batches whose size and sequence length follow a schedule."""

    def __init__(self, packed: PackedBatches, schedule: BatchSchedule) -> None:
        self.packed, self.schedule = packed, schedule

    def batch(self, step: int) -> Batch:
        return self.packed.rows(*self.schedule.rows(step)).cut(self.schedule.cuts(step))


def save_trained(model: Transformer, tokenizer: Tokenizer, out: Path, world: World, chat: bool) -> None:
    """Write the model folder, from whatever layout; the checkpoints that led to it stay until the stage is complete."""
    weights = full_state(model)
    if not world.is_main:
        return
    write_model(with_weights(model.config, weights), tokenizer, out, chat)


def with_weights(config: ModelConfig, weights: dict[str, torch.Tensor]) -> Transformer:
    """A model of ordinary tensors, which are taken as they are.

    Raises:
        UserError: if they are another model's.
    """
    with torch.device("meta"):
        model = Transformer(config)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise UserError(f"these weights are of another model than the plan's: {error}") from None
    return model


def write_model(model: Transformer, tokenizer: Tokenizer, out: Path, chat: bool) -> None:
    """A Hugging Face folder: weights, configuration, tokenizer, chat template."""
    eos_ids = [tokenizer.turn_end_id, tokenizer.end_of_text_id] if chat else [tokenizer.end_of_text_id]
    save_model(model, out, {"eos_token_id": eos_ids, "bos_token_id": tokenizer.end_of_text_id})
    tokenizer.save(out, max_length=model.config.max_position_embeddings, chat=chat)


def save_checkpoint_as_model(checkpoint: Path, out: Path) -> Path:
    """Write the model of a run's checkpoint, as it was at that step, as a model folder that anything can load.

    Args:
        checkpoint: such as runs/NAME/.base.partial/step-00000100.
        out: the new folder.

    Raises:
        CorruptFile: if the checkpoint is damaged.
        UserError: if it lies in no run, or is not of a model that the run's plan describes.
    """
    run = checkpoint.resolve().parent.parent
    if not (run / "plan" / "plan.json").exists():
        raise UserError(
            f"{checkpoint} lies in no run folder (there is no {run / 'plan' / 'plan.json'}); give one inside its run, "
            "such as runs/NAME/.base.partial/step-00000100"
        )
    config = ModelConfig.parse(read_json(run / "plan" / "plan.json")["model"], "plan.json")
    tokenizer = Tokenizer.load(run / "tokens" / "tokenizer")
    try:  # the weights that the run would end with
        weights = read_model(checkpoint, "average.")
    except CorruptFile:
        raise
    except UserError:  # it keeps no average
        weights = read_model(checkpoint)
    model = with_weights(config, weights)
    write_model(model, tokenizer, out, chat=checkpoint.resolve().parent.name.startswith(".chat"))
    return out


class Evaluation:
    """Bits per byte on held-out documents, and a text sampled from the model as it stands."""

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, tokens: Path, window: int, max_bytes: int, last_step: int
    ) -> None:
        self.model, self.tokenizer, self.window, self.last_step = model, tokenizer, window, last_step
        shards = TokenShards.open(tokens, "validation", verify=True)
        self.documents = [shards.document(i) for i in range(shards.num_documents)]
        self.table = tokenizer.token_bytes_table()
        self.max_bytes = max_bytes
        self.num_bytes = shards.num_bytes
        self.last: float | None = None

    def __call__(self, step: int) -> dict[str, Any]:
        whole = step >= self.last_step or self.num_bytes <= self.max_bytes
        documents = self._all() if whole else self._excerpt()
        self.last = bits_per_byte(self.model, documents, self.window)
        sample = sample_text(self.model, self.tokenizer, max_tokens=48, seed=step)
        return {"bits_per_byte": self.last, "sample": sample, "all_of_validation": whole}

    def _all(self) -> list[tuple[list[int], int]]:
        return [(ids.tolist(), int(self.table[ids].sum())) for ids in self.documents]

    def _excerpt(self) -> list[tuple[list[int], int]]:
        """The beginning of every document, as long as its share of `max_bytes`."""
        share = self.max_bytes / self.num_bytes
        excerpts = (ids[: max(2, round(len(ids) * share))] for ids in self.documents)
        return [(ids.tolist(), int(self.table[ids].sum())) for ids in excerpts]
