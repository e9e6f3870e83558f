"""litgpt beside us: its own `litgpt pretrain`, unmodified, on our text with our run's tokenizer.

What is ours: text files for its TextFiles data module (the way its tutorials/pretrain.md gives for custom data), a
configuration in the form of its config_hub/pretrain/tinystories.yaml, and the windows that score its checkpoint.

As a script (`python peer_litgpt.py '{...}'`) it scores in a process of its own, because litgpt and what it needs lie
in folders of their own. It needs, beyond what Lalia installs (pip install --no-deps --target DIR ...): lightning
lightning-utilities torchmetrics jsonargparse typeshed_client docstring-parser psutil litdata tifffile boto3 botocore
jmespath s3transfer obstore.
"""

import importlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

import machine
import peer_nanochat
import peer_transformers
from lalia.files import read_json, write_json
from peer_transformers import BATCH, LENGTH, SHAPE

OPTIMIZER = {
    "class_path": "torch.optim.AdamW",
    # Between its tinystories.yaml (5e-4), its debug.yaml (6e-4) and the 5e-3 of its tutorial for custom text; and what
    # its default, `--optimizer AdamW`, takes. The rest as in its config hub.
    "init_args": {"lr": 1e-3, "weight_decay": 0.1, "betas": [0.9, 0.95]},
}


def prepare(work: Path, documents: Path) -> None:
    """Write the text files it trains on, one for each document.

    Its own validation, which it insists on for two batches, reads the first training document: the held-out text
    stays out of its reach.
    """
    shutil.rmtree(work / "text", ignore_errors=True)  # with what it made of it: it would not look at new text
    texts = peer_nanochat.read_texts(documents / "train.parquet")
    for split, chosen in (("train", texts), ("check", texts[:1])):
        folder = work / "text" / split
        folder.mkdir(parents=True)
        for i, text in enumerate(chosen):
            (folder / f"{i:05d}.txt").write_text(text, encoding="utf-8")


def train(
    checkout: Path, work: Path, extra: Path | None, tokenizer: Path, threads: int, compiled: bool, steps: int
) -> dict[str, Any]:
    """Run `litgpt pretrain` for `steps` steps; its training seconds are the "iter time" that it prints.

    That clock leaves out the wait for data, in its favour. The first two steps (compilation, warm-up) are counted as
    typical ones. It always calls torch.compile; not compiled is TORCHDYNAMO_DISABLE=1.

    Raises:
        RuntimeError: if it fails.
    """
    name = f"{'compiled' if compiled else 'plain'}-{steps}"
    vocabulary = read_json(tokenizer / "tokenizer.json")
    size = 1 + max(*vocabulary["model"]["vocab"].values(), *(token["id"] for token in vocabulary["added_tokens"]))
    config = {
        "model_name": "small-llama",
        "model_config": {
            "name": "small-llama",
            "hf_config": {},
            "block_size": LENGTH,
            "padded_vocab_size": size,
            "n_layer": SHAPE["num_hidden_layers"],
            "n_head": SHAPE["num_attention_heads"],
            "n_embd": SHAPE["hidden_size"],
            "intermediate_size": SHAPE["intermediate_size"],
            "rotary_percentage": 1.0,
            "parallel_residual": False,
            "bias": False,
            "norm_class_name": "RMSNorm",
            "mlp_class_name": "LLaMAMLP",
        },
        "out_dir": str(work / name),
        "precision": "32-true",
        "data": {
            "class_path": "litgpt.data.TextFiles",
            "init_args": {
                "train_data_path": str(work / "text" / "train"),
                "val_data_path": str(work / "text" / "check"),
                "num_workers": 0,  # its 4 would crowd two cores
            },
        },
        "train": {
            "save_interval": None,
            "log_interval": 1,
            "global_batch_size": BATCH,
            "micro_batch_size": BATCH,
            "lr_warmup_steps": peer_transformers.warm_up_steps(steps),
            "max_tokens": steps * BATCH * LENGTH,
            "tie_embeddings": False,
            "max_norm": 1.0,
            "min_lr": 4e-5,
        },
        # Scored afterwards, outside the measured time.
        "eval": {"interval": steps + 1, "max_iters": 2, "initial_validation": False, "final_validation": False},
        "optimizer": OPTIMIZER,
        "devices": 1,
        "tokenizer_dir": str(tokenizer.resolve()),
        "logger_name": "csv",
        "seed": 1,
    }
    shutil.rmtree(work / name, ignore_errors=True)
    path = work / f"{name}.yaml"
    write_json(path, config)  # JSON is YAML
    command = [sys.executable, "-m", "litgpt", "pretrain", "--config", str(path)]
    env = _environment(checkout, extra, work, threads) | {"TORCHDYNAMO_DISABLE": "0" if compiled else "1"}
    output = machine.run(command, work, env, work / "logs" / f"{name}.log")
    lines = re.findall(
        r"^Epoch (\d+) \| iter \d+ step \d+ \| loss train: ([\d.naif]+),.* iter time: ([\d.]+) ms", output, re.M
    )
    parameters = re.search(r"^Total parameters: ([\d,]+)", output, re.M)
    return {
        "command": " ".join(command[1:]),
        "config": config,
        "model": str(work / name / "final"),
        **peer_transformers.timing([float(ms) / 1000 for _, _, ms in lines], steps, compiled),
        "parameters": int(parameters[1].replace(",", "")) if parameters else None,
        "last_epoch": int(lines[-1][0]),
        "its_own_last_loss": float(lines[-1][1]),
    }


def score(
    checkout: Path,
    work: Path,
    extra: Path | None,
    tokenizer: Path,
    documents: Path,
    threads: int,
    trained: dict[str, Any],
) -> dict[str, float]:
    """Bits per byte of validation.parquet under its checkpoint, with non-overlapping and with sliding windows."""
    task = {
        "tokenizer": str(tokenizer.resolve()),
        "documents": str(documents.resolve()),
        "checkpoint": trained["model"],
    }
    log = work / "logs" / f"{Path(trained['model']).parent.name}.score.log"
    return peer_transformers.in_its_process(Path(__file__), task, _environment(checkout, extra, work, threads), log)


def _environment(checkout: Path, extra: Path | None, work: Path, threads: int) -> dict[str, str]:
    """Its code before ours; litdata's scratch in the work folder, and no look for a newer version of itself."""
    cache = {f"DATA_OPTIMIZER_{kind}": str(work / "litdata") for kind in ("CACHE_FOLDER", "DATA_CACHE_FOLDER")}
    quiet = {"LITDATA_DISABLE_VERSION_CHECK": "1"}
    return peer_transformers.environment(threads, extra, checkout) | cache | quiet


@torch.no_grad()
def _score_here(task: dict[str, Any]) -> dict[str, float]:
    """In its process: its model, its checkpoint, its tokenizer class, on the held-out documents."""
    litgpt: Any = importlib.import_module("litgpt")
    folder = Path(task["checkpoint"])
    model = litgpt.GPT(litgpt.Config.from_checkpoint(folder))
    model.load_state_dict(torch.load(folder / "lit_model.pth", map_location="cpu", weights_only=True)["model"])
    model.eval()
    tokenizer = litgpt.Tokenizer(task["tokenizer"])
    texts = peer_nanochat.read_texts(Path(task["documents"]) / "validation.parquet")
    documents: list[list[int]] = []
    for text in texts:
        ids = tokenizer.encode(text, bos=True)
        if tokenizer.decode(ids[1:]) != text:
            raise RuntimeError("its tokenizer does not give a document back: its bytes could not be counted")
        documents.append(ids.tolist())
    return peer_transformers.both_windows(model, documents, sum(len(text.encode()) for text in texts), LENGTH)


if __name__ == "__main__":
    print("\n" + json.dumps(_score_here(json.loads(sys.argv[1]))))
