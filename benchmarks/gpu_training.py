"""Training on one GPU: tokens per second, model FLOPs utilization and memory; beside nanochat and transformers.

    python benchmarks/gpu_training.py [--nanochat DIR]

GPT-2's 124M shape and one of about a billion weights, 2,048 tokens a row, bfloat16: with compiled layers, with the two
forms of activation checkpointing, and with float8 products (whose utilization is of the bfloat16 peak too). nanochat's
depth 12 (width 768) and transformers' Qwen3 stand beside the small shape. One process each; the first steps, which
compile, are not counted.

Unmeasured so far: no GPU has been at hand. Without one this prints so and ends.
"""

import argparse
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import machine
from lalia.errors import UserError
from lalia.model.shapes import ArchitectureConfig
from lalia.model.transformer import Transformer
from lalia.training.config import LoopConfig
from lalia.training.hardware import datasheet_flops, device_name
from lalia.training.meters import FLOPS_FORMULA
from lalia.training.trainer import initialize
from trainer_step import make_step

LENGTH = 2048
WARM_UP_STEPS = 5


@dataclass(frozen=True)
class Shape:
    """Width, depth and feed-forward width of a model, and rows of a batch; heads of 128 channels."""

    hidden_size: int
    num_layers: int
    intermediate_size: int
    rows: int
    vocab_size: int = 50_304


SHAPES = {"124m": Shape(768, 12, 2048, 32), "1b": Shape(2048, 18, 5632, 8)}
VARIANTS = ("plain", "compiled", "selective", "full", "fp8")
"""Each of the last three is compiled too."""
POOL = 4
"""Distinct batches that everyone cycles through."""

Step = Callable[[int], Tensor]
"""Trains on the batch of a number; the mean loss."""


def ours(shape: Shape, variant: str, pool: list[Tensor], device: str) -> tuple[Step, float]:
    """The Trainer's own step, and FLOPs per token."""
    architecture = ArchitectureConfig(
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        head_dim=128,
        intermediate_size=shape.intermediate_size,
    )
    model = Transformer(architecture.build(shape.vocab_size, LENGTH))
    initialize(model, seed=1)
    model.to(device)
    model.compute_dtype = torch.bfloat16
    loop = LoopConfig.parse(
        {
            "compile": variant != "plain",
            "activation_checkpointing": variant if variant in ("selective", "full") else "none",
            "fp8": variant == "fp8",
        },
        "variant",
    )
    return make_step(model, pool, loop), model.config.flops_per_token(LENGTH)


def nanochat(shape: Shape, pool: list[Tensor], device: str) -> tuple[Step, float]:
    """nanochat at depth 12, full attention, compiled: the step of its scripts/base_train.py; its own FLOPs."""
    peer: Any = importlib.import_module("nanochat.gpt")
    heads = shape.hidden_size // 128
    config = peer.GPTConfig(
        sequence_len=LENGTH,
        vocab_size=shape.vocab_size,
        n_layer=shape.num_layers,
        n_head=heads,
        n_kv_head=heads,
        n_embd=shape.hidden_size,
        window_pattern="L",
    )
    with torch.device("meta"):
        raw: Any = peer.GPT(config)
    raw.to_empty(device=device)
    raw.init_weights()
    optimizer = raw.setup_optimizer()
    model: Any = torch.compile(raw, dynamic=False)

    def step(number: int) -> Tensor:
        tokens = pool[number % POOL].to(device, non_blocking=True)
        loss = model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)
        return loss.detach()

    return step, float(raw.estimate_flops())


def transformers(shape: Shape, pool: list[Tensor], device: str) -> tuple[Step, float]:
    """transformers' Qwen3 with torch.compile, autocast and fused AdamW, as its Trainer would; no FLOPs of its own."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    heads = shape.hidden_size // 128
    config = Qwen3Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=128,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        use_cache=False,
    )
    raw: Any = Qwen3ForCausalLM(config)
    raw.to(device)
    optimizer = torch.optim.AdamW(raw.parameters(), lr=1e-3, fused=True)
    model: Any = torch.compile(raw)

    def step(number: int) -> Tensor:
        tokens = pool[number % POOL].to(device, non_blocking=True)
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=tokens[:, :-1], labels=tokens[:, :-1]).loss
        loss.backward()
        nn.utils.clip_grad_norm_(raw.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step, 0.0


def work(task: dict[str, Any]) -> None:
    """Measure one contestant in this process; one line of JSON on stdout."""
    shape = SHAPES[task["shape"]]
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    pool = [torch.randint(0, shape.vocab_size, (shape.rows, LENGTH + 1)).pin_memory() for _ in range(POOL)]
    if task["name"] == "ours":
        step, flops = ours(shape, task["variant"], pool, "cuda")
    else:
        step, flops = (nanochat if task["name"] == "nanochat" else transformers)(shape, pool, "cuda")
    began = time.perf_counter()
    first = float(step(0))
    for number in range(1, WARM_UP_STEPS):
        step(number)
    torch.cuda.synchronize()
    warm_up = time.perf_counter() - began
    torch.cuda.reset_peak_memory_stats()
    began, loss = time.perf_counter(), torch.zeros(())
    for number in range(task["steps"]):
        loss = step(number)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    speed = task["steps"] * shape.rows * LENGTH / seconds
    peak = datasheet_flops(device_name(torch.device("cuda")), "bfloat16")
    row = {
        **task,
        "tokens_per_second": speed,
        "mfu": speed * flops / peak if peak and flops else None,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "warm_up_seconds": warm_up,
        "first_loss": first,
        "last_loss": float(loss),
    }
    print(json.dumps(row))


def main() -> None:
    """One process per contestant, one after the other; print the table and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanochat", type=Path, help="checkout of nanochat; left out: not compared")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="smoke run: the small shape, two steps")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(json.loads(options.worker))
        return
    if not torch.cuda.is_available():
        print("unmeasured: no CUDA device")
        return
    folder = machine.checkout(options.nanochat, "nanochat", "nanochat/gpt.py") if options.nanochat else None
    shapes = ["124m"] if options.quick else list(SHAPES)
    tasks = [{"name": "ours", "shape": shape, "variant": variant} for shape in shapes for variant in VARIANTS]
    tasks += [{"name": "nanochat", "shape": "124m", "variant": "compiled"}] if folder else []
    tasks += [{"name": "transformers", "shape": "124m", "variant": "compiled"}]
    rows, failed = [], []
    for task in tasks:
        line = json.dumps({**task, "steps": 2 if options.quick else options.steps})
        path = ":".join([str(machine.REPOSITORY / "src"), *([str(folder)] if folder else [])])
        done = subprocess.run(
            [sys.executable, str(Path(__file__).resolve()), "--worker", line],
            capture_output=True,
            text=True,
            check=False,
            env=machine.environment(2, PYTHONPATH=path),
        )
        if done.returncode:
            failed.append(f"{task}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
        else:
            rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
    keys = ("tokens_per_second", "mfu", "peak_gib", "warm_up_seconds", "first_loss", "last_loss")
    table = [(f"{row['name']} {row['shape']} {row['variant']}", *(row[key] for key in keys)) for row in rows]
    print(machine.table(("", "tokens/s", "MFU", "peak GiB", "warm-up s", "first loss", "last loss"), table))
    for line in failed:
        print(f"did not run: {line}")
    device = torch.cuda.get_device_name()
    content = {"machine": machine.describe(2), "gpu": device, "flops": FLOPS_FORMULA, "rows": rows, "failed": failed}
    machine.write_result("gpu_training", content, options.quick)


if __name__ == "__main__":
    try:
        main()
    except UserError as problem:
        sys.exit(str(problem))
