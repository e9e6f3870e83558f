"""transformers beside us: its Trainer on a small Llama, unmodified, on our text with our run's tokenizer.

What is ours: the arguments, a callback that reads the clock after each step, and the windows that score its model.
The text is prepared as its examples/pytorch/language-modeling/run_clm.py does: tokenized documents, concatenated, cut
into blocks, labels equal to the inputs, its default_data_collator.

As a script (`python peer_transformers.py '{...}'`) it does one task in a process of its own, so that `accelerate`,
which the Trainer needs, may lie in a folder of its own.
"""

import importlib.util
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

import machine
import peer_nanochat
from lalia.errors import UserError

LENGTH, BATCH = 256, 8
"""Tokens of a block, blocks of a step: a step is 2,048 tokens, as ours is."""

SHAPE: dict[str, Any] = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 704}
"""What a competent user trains for ten minutes on two cores. 704: Llama's 8/3 of the width, up to a multiple of 64."""

SETTINGS: dict[str, Any] = {
    # run_clm keeps the Trainer's 5e-5, which is for fine-tuning; from scratch at this size 1e-3 is usual (it is
    # AdamW's own default in PyTorch, and what nanoGPT takes for its small models).
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "per_device_train_batch_size": BATCH,
    "dataloader_drop_last": True,  # a batch of another shape would compile once more
    "save_strategy": "no",
    "logging_steps": 50,
    "seed": 1,
    "use_cpu": True,
}
"""TrainingArguments; whatever is not named keeps its default (AdamW, no weight decay, gradient norm 1, float32)."""


def warm_up_steps(steps: int) -> int:
    """Steps of linear warm-up: 5 %, at most 100."""
    return max(1, min(100, round(0.05 * steps)))


def train(
    work: Path, extra: Path | None, tokenizer: Path, documents: Path, threads: int, compiled: bool, steps: int
) -> dict[str, Any]:
    """Train for `steps` steps; training seconds, with the first two (compilation, warm-up) counted as typical ones.

    Args:
        work: folder for its model and its logs.
        extra: a folder with `accelerate`, when that is not installed.
        tokenizer: folder with tokenizer.json and tokenizer_config.json.
        documents: folder with train.parquet (column text).
        threads: threads it may use.
        compiled: its torch_compile.
        steps: optimizer steps, over which its schedule runs.

    Raises:
        UserError: if `accelerate` is missing.
        RuntimeError: if it fails.
    """
    if importlib.util.find_spec("accelerate") is None and not (extra and (extra / "accelerate").is_dir()):
        raise UserError(
            "the Trainer of transformers needs accelerate: pip install --no-deps --target DIR accelerate psutil, then "
            "give that folder with --extra DIR"
        )
    out = work / f"{'compiled' if compiled else 'plain'}-{steps}"
    settings = {**SETTINGS, "max_steps": steps, "warmup_steps": warm_up_steps(steps), "torch_compile": compiled}
    task = {
        "do": "train",
        "tokenizer": str(tokenizer.resolve()),
        "documents": str(documents.resolve()),
        "out": str(out),
        "settings": settings,
    }
    shutil.rmtree(out, ignore_errors=True)
    result = in_its_process(Path(__file__), task, environment(threads, extra), work / "logs" / f"{out.name}.log")
    seconds: list[float] = result.pop("seconds")
    return {"shape": SHAPE, "settings": settings, "model": str(out), **timing(seconds, steps, compiled), **result}


def score(
    work: Path, extra: Path | None, tokenizer: Path, documents: Path, threads: int, trained: dict[str, Any]
) -> dict[str, float]:
    """Bits per byte of validation.parquet under the trained model, with non-overlapping and with sliding windows."""
    task = {
        "do": "score",
        "tokenizer": str(tokenizer.resolve()),
        "documents": str(documents.resolve()),
        "out": trained["model"],
    }
    log = work / "logs" / f"{Path(trained['model']).name}.score.log"
    return in_its_process(Path(__file__), task, environment(threads, extra), log)


def timing(seconds: Sequence[float], steps: int, compiled: bool) -> dict[str, Any]:
    """What a comparison needs of the seconds of each step: all, with the first two counted as typical ones.

    Raises:
        RuntimeError: if there are not `steps` of them.
    """
    if len(seconds) != steps:
        raise RuntimeError(f"{len(seconds)} steps were timed, expected {steps}")
    typical = statistics.median(seconds[2:])
    return {
        "compiled": compiled,
        "steps": steps,
        "batch_tokens": BATCH * LENGTH,
        "training_seconds": 2 * typical + sum(seconds[2:]),
        "compile_and_first_steps_seconds": sum(seconds[:2]),
        "seconds_per_step": typical,
        "tokens_per_second": BATCH * LENGTH / typical,
    }


def environment(threads: int, extra: Path | None, *paths: Path) -> dict[str, str]:
    """Environment of a peer's process: `paths` before our sources, `extra` (its dependencies) last."""
    folders = [*paths, machine.REPOSITORY / "src", *([extra.resolve()] if extra else [])]
    return machine.environment(threads, PYTHONPATH=":".join(map(str, folders)))


def in_its_process(script: Path, task: dict[str, Any], env: dict[str, str], log: Path) -> Any:
    """The last line, as JSON, that `script` prints for a task."""
    output = machine.run([sys.executable, str(script.resolve()), json.dumps(task)], log.parent, env, log)
    return json.loads(output.strip().splitlines()[-1])


@torch.no_grad()
def bits_per_byte(
    logits: Callable[[torch.Tensor], torch.Tensor],
    documents: Sequence[Sequence[int]],
    num_bytes: int,
    length: int,
    stride: int,
) -> float:
    """Bits per byte of documents, each token but the first of a document (its start) scored exactly once.

    A window is `length` inputs; the first of a document scores all of its targets, each later one those that no window
    before has scored: `stride` of them. stride = length: non-overlapping (a document's last is moved back to be full).

    Args:
        logits: ids (B, T) -> logits (B, T, V).
        documents: token ids, the first of each the token that starts a document.
        num_bytes: bytes of the text that all other tokens stand for.
        length: inputs of a window.
        stride: inputs from one window to the next.
    """
    rows: list[torch.Tensor] = []
    targets: list[torch.Tensor] = []
    for ids in documents:
        line = torch.tensor(ids, dtype=torch.long)
        done = start = 0
        while done < len(line) - 1:
            start = max(0, min(start, len(line) - 1 - length))
            end = min(start + length, len(line) - 1)
            target = line[start + 1 : end + 1].clone()
            target[: done - start] = -100  # scored by a window before
            rows.append(functional.pad(line[start:end], (0, length - (end - start))))
            targets.append(functional.pad(target, (0, length - (end - start)), value=-100))
            done, start = end, start + stride
    nats, scored = 0.0, 0
    for i in range(0, len(rows), 16):
        target = torch.stack(targets[i : i + 16])
        out = logits(torch.stack(rows[i : i + 16])).float()
        nats += float(functional.cross_entropy(out.flatten(0, 1), target.flatten(), reduction="sum"))
        scored += int((target != -100).sum())
    expected = sum(len(ids) - 1 for ids in documents)
    if scored != expected:
        raise RuntimeError(f"scored {scored} tokens of {expected}")
    return nats / math.log(2) / num_bytes


def both_windows(
    logits: Callable[[torch.Tensor], torch.Tensor], documents: Sequence[Sequence[int]], num_bytes: int, length: int
) -> dict[str, float]:
    """Bits per byte with non-overlapping windows and with windows that slide by half a window."""
    return {
        "bits_per_byte": bits_per_byte(logits, documents, num_bytes, length, length),
        "bits_per_byte_sliding": bits_per_byte(logits, documents, num_bytes, length, length // 2),
        "sliding_stride": length // 2,
        "bytes_per_token": num_bytes / sum(len(ids) - 1 for ids in documents),
    }


def _tokens(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text after the token that starts a document, checked to stand for all of the text."""
    documents: list[list[int]] = []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if tokenizer.decode(ids) != text:
            raise RuntimeError("the tokenizer does not give a document back: its bytes could not be counted")
        documents.append([tokenizer.bos_token_id, *ids])
    return documents


def _train_here(task: dict[str, Any]) -> dict[str, Any]:
    """In its process: tokenize, pack as run_clm does, train with the Trainer, save."""
    import transformers

    class Clock(transformers.TrainerCallback):
        """The time after each step."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if not self.times:
                self.times.append(time.perf_counter())

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            self.times.append(time.perf_counter())

    transformers.set_seed(task["settings"]["seed"])  # before the weights are drawn, as run_clm does
    tokenizer = transformers.AutoTokenizer.from_pretrained(task["tokenizer"])
    documents = _tokens(tokenizer, peer_nanochat.read_texts(Path(task["documents"]) / "train.parquet"))
    line = [token for ids in documents for token in ids]
    blocks = [line[i : i + LENGTH] for i in range(0, len(line) // LENGTH * LENGTH, LENGTH)]
    config = transformers.LlamaConfig(
        **SHAPE,
        vocab_size=len(tokenizer),
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        use_cache=False,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    clock = Clock()
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(output_dir=task["out"], **task["settings"]),
        train_dataset=[{"input_ids": ids, "labels": ids} for ids in blocks],  # pyright: ignore[reportArgumentType]
        data_collator=transformers.default_data_collator,
        callbacks=[clock],
    )
    output = trainer.train()
    trainer.save_model(task["out"])
    return {
        "seconds": [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)],
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "tied_head": bool(config.tie_word_embeddings),
        "train_tokens": len(line),
        "epochs": output.global_step * BATCH / len(blocks),
        "its_own_mean_loss": output.training_loss,
    }


def _score_here(task: dict[str, Any]) -> dict[str, float]:
    """In its process: the saved model on the held-out documents.

    Windows of LENGTH - 1: the loss shifts inside of a block, so the last position of a block never learned to predict.
    """
    import transformers

    texts = peer_nanochat.read_texts(Path(task["documents"]) / "validation.parquet")
    documents = _tokens(transformers.AutoTokenizer.from_pretrained(task["tokenizer"]), texts)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        task["out"], dtype=torch.float32, output_loading_info=True
    )
    model, found = loaded
    if found["missing_keys"] or found["unexpected_keys"]:
        raise RuntimeError(f"the saved model lacks weights, which would be random: {found}")
    model.eval()
    num_bytes = sum(len(text.encode()) for text in texts)
    return both_windows(lambda ids: model(input_ids=ids).logits, documents, num_bytes, LENGTH - 1)


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    print("\n" + json.dumps(_train_here(request) if request["do"] == "train" else _score_here(request)))
