"""Training speed and memory: Lalia beside nanoGPT, nanochat, litgpt and the transformers Trainer.

    python benchmarks/train_throughput.py --nanogpt DIR --nanochat DIR --litgpt DIR
    python benchmarks/train_throughput.py --shape 30m --nanogpt DIR ...

The transformers Trainer needs `accelerate`, litgpt `lightning`, `torchmetrics` and `jsonargparse`; who lacks something
is named at the end. Memory is the largest resident size of the contestant's process, and the same without what the
process had before it imported the contestant (Python, PyTorch, this script).

Everyone trains at the same width, depth, sequence length, batch and vocabulary, in the same number type, on the same
threads, with its own model, loss, gradient clipping and optimizer, on the same random tokens. Each contestant lives in
a process of its own and waits while the others are measured; the rounds go A B C D A B C D ... Peers run twice, as
they are and with torch.compile (or without, where compiled is how they are), and so do we; the ratio is of the faster
variants.
"""

import argparse
import contextlib
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import machine
import peer_nanochat
from lalia.devices import peak_memory_bytes
from lalia.errors import UserError

WARM_UP_STEPS = 3
POOL = 8
"""Distinct batches that everyone cycles through, made beforehand."""


@dataclass(frozen=True)
class Shape:
    """What is trained. Heads of 64 channels; nanochat's runs/runcpu.sh uses that head size too."""

    hidden_size: int = 256
    num_layers: int = 6
    num_heads: int = 4
    sequence_length: int = 256
    batch_size: int = 16
    vocab_size: int = 4096
    gated_intermediate_size: int = 704
    """Feed-forward width of gated models: 3 * 256 * 704 weights are 3 % more than the 2 * 256 * 1024 of the others."""
    precision: str = "float32"

    @classmethod
    def named(cls, name: str, precision: str) -> "Shape":
        """The shape that --shape names."""
        if name == "quick":
            return cls(num_layers=1, sequence_length=64, batch_size=4, vocab_size=512, precision=precision)
        if name == "30m":  # nanoGPT's small GPT-2: its Shakespeare width and depth, GPT-2's vocabulary
            return cls(384, 6, 6, vocab_size=50_304, gated_intermediate_size=1024, precision=precision)
        return cls(precision=precision)

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.sequence_length


@dataclass(frozen=True)
class Contestant:
    """A way to train: who, and whether through torch.compile."""

    name: str
    compiled: bool
    note: str


CONTESTANTS = (
    Contestant("ours", False, "Transformer, Trainer step (Muon + AdamW)"),
    Contestant("ours", True, "with pretrain.compile = true, as a plan for minutes chooses where it pays"),
    Contestant("nanogpt", False, "as its README says for CPU"),
    Contestant("nanogpt", True, "its default"),
    Contestant("nanochat", True, "as scripts/base_train.py does"),
    Contestant("nanochat", False, "TORCHDYNAMO_DISABLE=1"),
    Contestant("litgpt", False, "without its torch.compile"),
    Contestant("litgpt", True, "as litgpt pretrain does, without Fabric's wrappers"),
    Contestant("transformers", False, "Trainer, defaults"),
    Contestant("transformers", True, "Trainer, torch_compile=True"),
)

Speed = Callable[[float], tuple[int, float, float]]
"""Train for about so many seconds (at least one step): steps, seconds, last loss in nats per token."""


def random_batches(shape: Shape) -> list[torch.Tensor]:
    """POOL batches of (batch_size, sequence_length + 1) token ids, the same for everyone.

    Drawn with the frequencies of words, 1 / rank, so that a few steps show whether the loss falls.
    """
    generator = torch.Generator().manual_seed(0)
    count = POOL * shape.batch_size * (shape.sequence_length + 1)
    ids = torch.multinomial(1.0 / torch.arange(1, shape.vocab_size + 1), count, True, generator=generator)
    return list(ids.view(POOL, shape.batch_size, -1))


def ours(shape: Shape, compiled: bool) -> tuple[torch.nn.Module, Speed]:
    """Lalia: `Transformer`, the `next_token` objective and the Trainer's own step."""
    from lalia.model.shapes import ArchitectureConfig
    from lalia.model.transformer import Transformer
    from lalia.planning.layout import TOKENS_PER_THREAD, rows_within
    from lalia.training.config import LoopConfig
    from lalia.training.trainer import initialize
    from trainer_step import make_step

    architecture = ArchitectureConfig(
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        head_dim=shape.hidden_size // shape.num_heads,
        intermediate_size=shape.gated_intermediate_size,
    )
    model = Transformer(architecture.build(shape.vocab_size, shape.sequence_length))
    initialize(model, seed=1)
    model.compute_dtype = getattr(torch, shape.precision)
    at_once = TOKENS_PER_THREAD * torch.get_num_threads()
    micro_rows = rows_within(shape.batch_size, at_once, shape.sequence_length)  # as a plan for a CPU chooses
    step = make_step(model, random_batches(shape), LoopConfig(micro_batch_size=micro_rows, compile=compiled))
    return model, timed(lambda number: float(step(number)))


def nanogpt(folder: Path, shape: Shape, compiled: bool) -> tuple[torch.nn.Module, Speed]:
    """nanoGPT: its GPT, its configure_optimizers, and the step of its train.py (clip at 1, no fused AdamW on CPU)."""
    sys.path.insert(0, str(folder))
    peer: Any = importlib.import_module("model")
    raw: Any = peer.GPT(
        peer.GPTConfig(
            block_size=shape.sequence_length,
            vocab_size=shape.vocab_size,
            n_layer=shape.num_layers,
            n_head=shape.num_heads,
            n_embd=shape.hidden_size,
            dropout=0.0,
            bias=False,
        )
    )
    optimizer = raw.configure_optimizers(1e-1, 1e-3, (0.9, 0.99), "cpu")
    model: Any = torch.compile(raw) if compiled else raw
    pool = random_batches(shape)

    def step(number: int) -> float:
        tokens = pool[number % POOL]
        _, loss = model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return raw, timed(step)


def nanochat(folder: Path, shape: Shape, compiled: bool) -> tuple[torch.nn.Module, Speed]:
    """nanochat: its GPT, its Muon and AdamW, and the step of scripts/base_train.py (no clipping), full attention."""
    peer: Any = importlib.import_module("nanochat.gpt")
    with torch.device("meta"):
        raw: Any = peer.GPT(
            peer.GPTConfig(
                sequence_len=shape.sequence_length,
                vocab_size=shape.vocab_size,
                n_layer=shape.num_layers,
                n_head=shape.num_heads,
                n_kv_head=shape.num_heads,
                n_embd=shape.hidden_size,
                window_pattern="L",
            )
        )
    raw.to_empty(device="cpu")
    raw.init_weights()
    model: Any = torch.compile(raw, dynamic=False) if compiled else raw
    scale = (shape.tokens_per_step / 2**19) ** 0.5  # base_train's rule for the learning rates
    optimizer = raw.setup_optimizer(
        unembedding_lr=0.008 * scale, embedding_lr=0.3 * scale, scalar_lr=0.5 * scale, matrix_lr=0.02 * scale
    )
    pool = random_batches(shape)

    def step(number: int) -> float:
        tokens = pool[number % POOL]
        loss = model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)
        return loss.item()

    return raw, timed(step)


def litgpt(folder: Path, shape: Shape, compiled: bool) -> tuple[torch.nn.Module, Speed]:
    """litgpt: its GPT as a Llama with tied weights, its chunked loss, and the step of its pretrain.py.

    Its own meter is not used: it divides tokens by a time of day.
    """
    sys.path.insert(0, str(folder))
    model_module: Any = importlib.import_module("litgpt.model")
    utilities: Any = importlib.import_module("litgpt.utils")
    raw: Any = model_module.GPT(
        model_module.Config(
            block_size=shape.sequence_length,
            vocab_size=shape.vocab_size,
            padded_vocab_size=shape.vocab_size,
            n_layer=shape.num_layers,
            n_head=shape.num_heads,
            n_embd=shape.hidden_size,
            intermediate_size=shape.gated_intermediate_size,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
        )
    )
    for module in raw.modules():  # initialize_weights in pretrain.py, without the smaller deviation of its projections
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=(2 / 5 / shape.hidden_size) ** 0.5)
    raw.lm_head.weight = raw.transformer.wte.weight  # --tie_embeddings true in pretrain.py
    raw.max_seq_length = shape.sequence_length
    model: Any = torch.compile(raw) if compiled else raw
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=False)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=shape.precision == "bfloat16")  # precision bf16-mixed
    pool = random_batches(shape)

    def step(number: int) -> float:
        tokens = pool[number % POOL]
        with autocast:
            loss = utilities.chunked_cross_entropy(model(tokens[:, :-1].contiguous()), tokens[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return raw, timed(step)


def transformers(shape: Shape, compiled: bool) -> tuple[torch.nn.Module, Speed]:
    """The transformers Trainer with its Qwen3 model, its data loader and collator, its fused AdamW and clipping.

    It shifts the labels itself: of 256 tokens of a row it predicts 255, and is credited with 256 as everyone.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainerCallback, TrainingArguments

    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.gated_intermediate_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_heads,
            head_dim=shape.hidden_size // shape.num_heads,
            max_position_embeddings=shape.sequence_length,
            tie_word_embeddings=True,
            use_cache=False,
        )
    )
    rows = torch.cat(random_batches(shape))[:, :-1]
    dataset: Any = [{"input_ids": row, "labels": row} for row in rows] * 200

    class Clock(TrainerCallback):
        """Times the steps between the first and the last of a call of `train`, and ends it."""

        def __init__(self) -> None:
            self.limit, self.steps, self.began, self.seconds, self.loss = 0.0, 0, 0.0, 0.0, 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.steps == 0:
                self.began = time.perf_counter()  # the first step of a call includes its preparations
            self.seconds = time.perf_counter() - self.began
            self.steps += 1
            control.should_training_stop = self.steps > 1 and self.seconds >= self.limit

    clock = Clock()
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=10**6,
        per_device_train_batch_size=shape.batch_size,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        use_cpu=True,
        bf16=shape.precision == "bfloat16",
        torch_compile=compiled,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset, callbacks=[clock])

    def speed(seconds: float) -> tuple[int, float, float]:
        clock.limit, clock.steps = seconds, 0
        trainer.train()
        with torch.no_grad():
            loss = model(input_ids=rows[: shape.batch_size], labels=rows[: shape.batch_size]).loss
        return clock.steps - 1, clock.seconds, float(loss)

    return model, speed


def timed(step: Callable[[int], float]) -> Speed:
    """The speed of a function that makes one training step."""
    number = 0

    def speed(seconds: float) -> tuple[int, float, float]:
        nonlocal number
        first, loss, began = number, 0.0, time.perf_counter()
        while number == first or time.perf_counter() - began < seconds:
            loss = step(number)
            number += 1
        return number - first, time.perf_counter() - began, loss

    return speed


def work(task: dict[str, Any]) -> None:
    """A contestant's process: build, warm up, then one measurement per line on stdin; answers are lines of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what peers print goes to the log
    torch.set_num_threads(task["threads"])
    torch.manual_seed(0)
    shape, compiled, folder = Shape(**task["shape"]), bool(task["compiled"]), Path(task["folder"] or ".")
    before = peak_memory_bytes()
    if task["name"] == "nanogpt":
        model, speed = nanogpt(folder, shape, compiled)
    elif task["name"] == "litgpt":
        model, speed = litgpt(folder, shape, compiled)
    elif task["name"] == "nanochat":
        model, speed = nanochat(folder, shape, compiled)
    elif task["name"] == "transformers":
        model, speed = transformers(shape, compiled)
    else:
        model, speed = ours(shape, compiled)
    began = time.perf_counter()
    first_loss = 0.0
    for i in range(WARM_UP_STEPS):
        loss = speed(0.0)[2]
        first_loss = loss if i == 0 else first_loss
    ready = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights": sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()}),
        "warm_up_seconds": time.perf_counter() - began,
        "first_loss": first_loss,
    }
    print(json.dumps(ready), file=answers, flush=True)
    for line in sys.stdin:
        steps, seconds, loss = speed(float(line))
        peak = peak_memory_bytes()
        answer = {"steps": steps, "seconds": seconds, "loss": loss, "peak_bytes": peak, "own_bytes": peak - before}
        print(json.dumps(answer), file=answers, flush=True)


class Worker:
    """The parent's side of a contestant's process."""

    def __init__(self, contestant: Contestant, shape: Shape, threads: int, folder: Path | None, log: Path) -> None:
        task = {**asdict(contestant), "shape": asdict(shape), "threads": threads, "folder": str(folder or "")}
        env = machine.environment(threads, PYTHONPATH=str(machine.REPOSITORY / "src"))
        if contestant.name == "nanochat" and folder is not None:
            variant = peer_nanochat.Variant(contestant.compiled, shape.precision)
            env = peer_nanochat.environment(folder, log.parent / "nanochat", threads, variant)
        log.parent.mkdir(parents=True, exist_ok=True)
        self.contestant, self.log = contestant, log
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(task)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env=env,
        )
        self.ready = self._answer()

    def measure(self, seconds: float) -> dict[str, Any]:
        """Train for about so many seconds: steps, seconds, loss."""
        assert self.process.stdin is not None
        print(seconds, file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.contestant.name} ended; {self.log}:\n{self.log.read_text()[-2000:]}")
        return json.loads(line)


def summarize(workers: Sequence[Worker], rounds: Sequence[Sequence[dict[str, Any]]], shape: Shape) -> dict[str, Any]:
    """Medians per contestant and the ratio of ours to each peer's faster variant, round by round."""
    rows: list[dict[str, Any]] = []
    for i, worker in enumerate(workers):
        speeds = [shape.tokens_per_step * one[i]["steps"] / one[i]["seconds"] for one in rounds]
        rows.append(
            {
                **asdict(worker.contestant),
                **worker.ready,
                "last_loss": rounds[-1][i]["loss"],
                "peak_bytes": rounds[-1][i]["peak_bytes"],
                "peak_bytes_above_import": rounds[-1][i]["own_bytes"],
                "tokens_per_second": statistics.median(speeds),
                "tokens_per_second_rounds": speeds,
            }
        )
    own = [row for row in rows if row["name"] == "ours"]
    mine = max(own, key=lambda row: row["tokens_per_second"], default=None)
    ratios: dict[str, Any] = {}
    for name in dict.fromkeys(row["name"] for row in rows if row["name"] != "ours"):
        best = max((row for row in rows if row["name"] == name), key=lambda row: row["tokens_per_second"])
        if mine:
            pairs = zip(mine["tokens_per_second_rounds"], best["tokens_per_second_rounds"], strict=True)
            by_round = [a / b for a, b in pairs]
            ratios[name] = {
                "best_variant_compiled": best["compiled"],
                "ratio": statistics.median(by_round),
                "ratio_rounds": by_round,
                # A peer's memory is that of its most frugal variant, whichever is faster.
                "memory_ratio": mine["peak_bytes"] / min(row["peak_bytes"] for row in rows if row["name"] == name),
                "memory_ratio_above_import": mine["peak_bytes_above_import"]
                / min(row["peak_bytes_above_import"] for row in rows if row["name"] == name),
            }
    return {"contestants": rows, "ratio_ours_to_peer": ratios}


def main() -> None:
    """Start the contestants, measure them in turn, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, help="checkout of nanoGPT; left out: not compared")
    parser.add_argument("--nanochat", type=Path, help="checkout of nanochat; left out: not compared")
    parser.add_argument("--litgpt", type=Path, help="checkout of litgpt; left out: not compared")
    parser.add_argument("--shape", choices=("7m", "30m"), default="7m", help="384 x 6 with 50,304 ids is 30m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="nanoGPT: float32 only")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="per contestant and round, after warm-up")
    parser.add_argument("--only", nargs="*", help="names of the contestants to run")
    parser.add_argument("--work", type=Path, default=machine.REPOSITORY / "runs" / "peers" / "throughput")
    parser.add_argument("--quick", action="store_true", help="smoke run: one layer, one short round, nothing compiled")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(json.loads(options.worker))
        return
    shape = Shape.named("quick" if options.quick else options.shape, options.precision)
    rounds_wanted, seconds = (1, 0.5) if options.quick else (options.rounds, options.seconds)
    folders = {
        "nanogpt": machine.checkout(options.nanogpt, "nanogpt", "model.py") if options.nanogpt else None,
        "nanochat": machine.checkout(options.nanochat, "nanochat", "nanochat/gpt.py") if options.nanochat else None,
        "litgpt": machine.checkout(options.litgpt, "litgpt", "litgpt/model.py") if options.litgpt else None,
    }

    with contextlib.ExitStack() as stack:
        workers: list[Worker] = []
        skipped: list[str] = []
        for contestant in CONTESTANTS:
            name = contestant.name
            absent = name in folders and folders[name] is None
            no_bfloat16 = name == "nanogpt" and shape.precision != "float32"
            if absent or no_bfloat16 or (options.quick and contestant.compiled):
                continue
            if options.only and name not in options.only:
                continue
            print(f"starting {name}{' compiled' if contestant.compiled else ''}", file=sys.stderr)
            log = options.work.resolve() / f"{name}-{contestant.compiled}.log"
            try:
                worker = Worker(contestant, shape, options.threads, folders.get(name), log)
            except RuntimeError as error:
                skipped.append(f"{name} (compiled={contestant.compiled}): {str(error).strip().splitlines()[-1]}")
                continue
            stack.callback(worker.close)
            workers.append(worker)
        rounds = [[worker.measure(seconds) for worker in workers] for _ in range(rounds_wanted)]
        result = summarize(workers, rounds, shape)

    rows = [
        (
            f"{row['name']}{' compiled' if row['compiled'] else ''}",
            row["tokens_per_second"],
            min(row["tokens_per_second_rounds"]),
            max(row["tokens_per_second_rounds"]),
            f"{row['parameters'] / 1e6:.2f}M",
            row["peak_bytes"] / 2**20,
            row["peak_bytes_above_import"] / 2**20,
            row["warm_up_seconds"],
            row["first_loss"],
            row["last_loss"],
        )
        for row in result["contestants"]
    ]
    columns = (
        "",
        "tokens/s",
        "lowest",
        "highest",
        "weights",
        "peak MiB",
        "above import",
        "warm-up s",
        "first loss",
        "last loss",
    )
    print(machine.table(columns, rows))
    for name, ratio in result["ratio_ours_to_peer"].items():
        print(f"ours / {name} (its faster variant): {ratio['ratio']:.2f}, memory {ratio['memory_ratio']:.2f}")
    for line in skipped:
        print(f"did not start: {line}")
    machine.write_result(
        "_".join(
            ["train_throughput"]
            + ([options.shape] if options.shape != "7m" else [])
            + ([options.precision] if options.precision != "float32" else [])
        ),
        {
            "machine": machine.describe(options.threads),
            "peers": {name: machine.commit(folder) for name, folder in folders.items() if folder},
            "patched": "nothing; steps as in train.py / scripts/base_train.py, on tokens from memory",
            "shape": asdict(shape),
            "seconds_per_round": seconds,
            "warm_up_steps": WARM_UP_STEPS,
            "skipped": skipped,
            **result,
        },
        options.quick,
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as problem:
        sys.exit(str(problem))
