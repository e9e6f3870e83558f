"""nanoGPT beside us: its own train.py, unmodified, on our text; then exact bits per byte of the model it saved.

What is ours: a data folder in the form its data/shakespeare_char/prepare.py writes, the command line of its README,
and the scoring. Nothing of it is patched.
"""

import importlib
import math
import pickle
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

import machine

SETTINGS = {
    "eval_iters": 20,
    "log_interval": 1,
    "block_size": 64,
    "batch_size": 12,
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 128,
    "max_iters": 2000,
    "lr_decay_iters": 2000,
    "dropout": 0.0,
}
"""The flags of the README's "I only have a macbook" command (device and compile are set separately)."""


def vocabulary(train: Sequence[str], held_out: Sequence[str]) -> dict[str, int]:
    """Id of every character, in the order of its prepare.py: sorted."""
    return {character: i for i, character in enumerate(sorted(set("\n".join([*train, *held_out, ""]))))}


def prepare(folder: Path, train: Sequence[str], held_out: Sequence[str]) -> dict[str, Any]:
    """Write train.bin, val.bin and meta.pkl as its prepare.py does.

    As there, the vocabulary is every character of the whole text, held-out part included, so that no character is
    unknown; documents are joined by a newline.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"train": "\n".join(train), "val": "\n".join(held_out)}
    ids = vocabulary(train, held_out)
    for split, text in texts.items():
        np.array([ids[character] for character in text], dtype=np.uint16).tofile(folder / f"{split}.bin")
    meta = {"vocab_size": len(ids), "itos": dict(enumerate(ids)), "stoi": ids}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))  # the form train.py reads; we only write it
    unseen = set(texts["val"]) - set(texts["train"])
    return {
        "vocab_size": len(ids),
        "train_characters": len(texts["train"]),
        "held_out_characters_unseen_in_training": sum(texts["val"].count(character) for character in unseen),
    }


def train(
    checkout: Path, data: Path, out: Path, threads: int, compiled: bool, settings: dict[str, Any], log: Path
) -> dict[str, Any]:
    """Run its train.py; training seconds without its evaluations, its own loss estimates, and the command."""
    flags = {**settings, "device": "cpu", "compile": compiled, "dataset": str(data), "out_dir": str(out)}
    # always_save_checkpoint: score the model after the last iteration, whichever its noisy estimate prefers.
    flags |= {"always_save_checkpoint": True}
    flags |= {"eval_interval": settings["max_iters"]} if settings["max_iters"] < 250 else {}
    command = [sys.executable, "train.py", "config/train_shakespeare_char.py"]
    command += [f"--{key}={value}" for key, value in flags.items()]
    output = machine.run(command, checkout, machine.environment(threads), log)
    milliseconds = [float(value) for value in re.findall(r"^iter \d+: loss [\d.nainf]+, time ([\d.]+)ms", output, re.M)]
    milliseconds = milliseconds[: settings["max_iters"]]  # it trains one more after the checkpoint we score
    interval = flags.get("eval_interval", 250)  # 250: config/train_shakespeare_char.py
    typical = statistics.median(milliseconds)
    # An iteration that starts with an evaluation (or the compilation) is timed with it: count it as a typical one.
    seconds = sum(typical if i % interval == 0 or i < 2 else value for i, value in enumerate(milliseconds)) / 1000
    estimates = re.findall(r"^step (\d+): train loss ([\d.]+), val loss ([\d.]+)", output, re.M)
    return {
        "command": " ".join(command[1:]),
        "compiled": compiled,
        "iterations": len(milliseconds),
        "training_seconds": seconds,
        "compile_and_first_iterations_seconds": sum(milliseconds[:2]) / 1000,
        "milliseconds_per_iteration": typical,
        "tokens_per_second": 1000 * settings["batch_size"] * settings["block_size"] / typical,
        "its_own_estimates": [
            {"iteration": int(i), "train_bits_per_character": float(t) / math.log(2), "val": float(v) / math.log(2)}
            for i, t, v in estimates
        ],
    }


@torch.no_grad()
def score(
    checkout: Path, checkpoint: Path, ids: dict[str, int], held_out: Sequence[str], stride: int
) -> dict[str, float]:
    """Bits per byte of the held-out documents under a saved model, every character scored exactly once.

    A document starts after a newline, the start its sample.py uses. Windows are block_size characters; the first of
    a document scores all of its characters, each later one its last `stride`. stride = block_size: non-overlapping.
    """
    sys.path.insert(0, str(checkout))
    peer: Any = importlib.import_module("model")
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    model = peer.GPT(peer.GPTConfig(**saved["model_args"]))
    model.load_state_dict({key.removeprefix("_orig_mod."): value for key, value in saved["model"].items()})
    model.eval()
    block = int(saved["model_args"]["block_size"])
    nats, scored = 0.0, 0
    for text in held_out:
        line = torch.tensor([ids[character] for character in "\n" + text], dtype=torch.long)
        # window i reads line[start : start + block] and predicts the characters one further
        starts = [0, *range(stride, max(1, len(text) - block + stride), stride)]
        starts = [min(start, max(0, len(text) - block)) for start in starts]
        done = 0  # characters of this document already scored
        rows: list[torch.Tensor] = []
        targets: list[torch.Tensor] = []
        for start in starts:
            end = min(start + block, len(text))
            target = line[start + 1 : end + 1].clone()
            target[: done - start] = -1  # ignored by its cross entropy
            rows.append(functional.pad(line[start:end], (0, block - (end - start))))
            targets.append(functional.pad(target, (0, block - (end - start)), value=-1))
            done = end
        for i in range(0, len(rows), 256):
            batch = torch.stack(targets[i : i + 256])
            count = int((batch != -1).sum())
            if count:
                nats += float(model(torch.stack(rows[i : i + 256]), batch)[1]) * count
                scored += count
    if scored != sum(len(text) for text in held_out):
        raise RuntimeError(f"scored {scored} characters of {sum(len(text) for text in held_out)}")
    return {
        "bits_per_byte": nats / math.log(2) / sum(len(text.encode()) for text in held_out),
        "bits_per_character": nats / math.log(2) / scored,
        "stride": stride,
    }
