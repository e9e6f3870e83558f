"""What a checkpoint costs the training: how long it stands still, how long the disk takes, and the memory of the copy.

    python benchmarks/checkpoint_stall.py                  # the states of a 5 M and a 100 M model, beside torch's own
    python benchmarks/checkpoint_stall.py --train 120      # besides, train for so long with a checkpoint every 30 s

A state is what the Trainer saves: weights, Muon's momentum, AdamW's two moments. Beside ours stands
`torch.distributed.checkpoint.async_save` with its HuggingFaceStorageWriter, which also writes safetensors; it keeps no
checksums and replaces nothing atomically. Each is measured in a process of its own, the first save apart from the
others: it pays for imports and for memory that is touched for the first time.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import machine
from lalia.model.shapes import ArchitectureConfig
from lalia.model.transformer import Transformer
from lalia.progress import Progress
from lalia.training.checkpoints import Checkpoints
from lalia.training.config import OptimizerConfig
from lalia.training.optimizers import make_optimizers
from lalia.training.parallel.state import saved_state
from lalia.training.parallel.world import World
from lalia.training.trainer import initialize

TARGET = 0.02
"""Share of the training time that the training stands still for checkpoints, at one in CADENCE seconds."""
CADENCE = 30.0
SHAPES = {"5M": (256, 6, 4096), "100M": (768, 12, 24576)}
"""Hidden size, layers and vocabulary."""
Save = Callable[[int, dict[str, Tensor]], Callable[[], None]]
"""Begins a save; what it returns waits for the end of it."""


def build(size: str) -> Transformer:
    """A model with random weights."""
    hidden, layers, vocab = SHAPES[size]
    model = Transformer(ArchitectureConfig(hidden_size=hidden, num_hidden_layers=layers, head_dim=64).build(vocab, 256))
    initialize(model, seed=1)
    return model


def ours(folder: Path) -> Save:
    checkpoints = Checkpoints(folder, "", World.alone(), Progress(quiet=True))

    def save(step: int, tensors: dict[str, Tensor]) -> Callable[[], None]:
        checkpoints.save(step, tensors, {})
        return checkpoints.wait

    return save


def torchs(folder: Path) -> Save:
    import torch.distributed as dist
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import async_save

    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)

    def save(step: int, tensors: dict[str, Tensor]) -> Callable[[], None]:
        writer = HuggingFaceStorageWriter(f"{folder}/step-{step}", save_distributed=True)
        future: Any = async_save(dict(tensors), storage_writer=writer)
        return future.result

    return save


def resident(field: str = "VmRSS") -> int:
    """Memory of this process in bytes; VmHWM is the highest since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(contestant: str, size: str, saves: int) -> dict[str, Any]:
    """Stall and total seconds of saves of one state, and how far memory rises meanwhile."""
    model = build(size)
    tensors = saved_state(model, make_optimizers(model, OptimizerConfig()))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save = {"ours": ours, "torch": torchs}[contestant](folder)
        stalls, totals, peaks = [], [], []
        for step in range(1, saves + 1):
            before = resident()
            forget_peak()
            began = time.perf_counter()
            finish = save(step, tensors)
            stalls.append(time.perf_counter() - began)
            finish()
            totals.append(time.perf_counter() - began)
            peaks.append(resident("VmHWM") - before)
            for tensor in tensors.values():  # as a step does: what was saved may not be what is written
                tensor.add_(0)
        written = sum(path.stat().st_size for path in folder.glob(f"step-*{saves}/*.safetensors"))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "state_bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "written_bytes": written,
        "first_stall_seconds": stalls[0],
        "stall_seconds": statistics.median(stalls[1:]),
        "total_seconds": statistics.median(totals[1:]),
        "memory_bytes": max(peaks),
    }


def train(seconds: float) -> dict[str, Any]:
    """The Trainer on the 5 M model and random tokens; its checkpoints' share of the time."""
    from lalia.data.loader import Batch
    from lalia.training.config import LoopConfig
    from lalia.training.objectives import next_token
    from lalia.training.trainer import Trainer

    rows, length = 16, 256
    positions = torch.arange(length).expand(rows, -1)

    class Batches:
        began = 0.0

        def batch(self, step: int) -> Batch:
            self.began = self.began or time.perf_counter()
            if time.perf_counter() - self.began > seconds:
                raise TimeoutError
            tokens = torch.randint(0, SHAPES["5M"][2], (rows, length + 1))
            ids = torch.zeros(rows, length, dtype=torch.int32)
            return Batch(tokens[:, :-1], tokens[:, 1:].contiguous(), ids, positions, True, rows * length, None)

    with tempfile.TemporaryDirectory() as name:
        batches = Batches()
        loop = LoopConfig(checkpoint_seconds=CADENCE)
        quiet = Progress(quiet=True)
        trainer = Trainer(build("5M"), batches, next_token, 10**6, OptimizerConfig(), Path(name), "", quiet, loop=loop)
        saves = 0
        save = trainer.checkpoints.save

        def counted(*arguments: Any) -> None:
            nonlocal saves
            saves += 1
            save(*arguments)

        trainer.checkpoints.save = counted  # type: ignore[method-assign]
        with contextlib.suppress(TimeoutError):
            trainer.train()
        stalled = trainer.checkpoints.stall_seconds
    return {"seconds": seconds, "steps": trainer.step, "saves": saves, "stall_seconds": stalled}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--saves", type=int, default=6)
    parser.add_argument("--train", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--quick", action="store_true", help="two saves of the small state only")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    machine.restart_with(arguments.threads)
    saves = 2 if arguments.quick else arguments.saves
    if arguments.work:
        contestant, size = arguments.work
        print(json.dumps(measure(contestant, size, saves)))
        return
    results: dict[str, Any] = {}
    for size in ("5M",) if arguments.quick else SHAPES:
        for contestant in ("ours", "torch"):
            command = [sys.executable, __file__, "--threads", str(arguments.threads), "--saves", str(saves)]
            done = subprocess.run([*command, "--work", contestant, size], capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(done.stderr[-3000:])
            results[f"{contestant} {size}"] = json.loads(done.stdout.splitlines()[-1])
    rows = [
        [
            name,
            r["parameters"] / 1e6,
            r["state_bytes"] / 2**20,
            r["first_stall_seconds"] * 1e3,
            r["stall_seconds"] * 1e3,
            r["total_seconds"] * 1e3,
            r["memory_bytes"] / r["state_bytes"],
            100 * r["stall_seconds"] / CADENCE,
        ]
        for name, r in results.items()
    ]
    columns = [
        "",
        "M weights",
        "state MiB",
        "first ms",
        "stall ms",
        "total ms",
        "memory/state",
        f"% of {CADENCE:.0f} s",
    ]
    print(machine.table(columns, rows))
    content: dict[str, Any] = {"machine": machine.describe(arguments.threads), "target": TARGET, "saves": results}
    if arguments.train:
        content["training"] = happened = train(arguments.train)
        share = happened["stall_seconds"] / happened["seconds"]
        print(f"\ntraining: {happened['saves']} saves in {arguments.train:.0f} s, still for {100 * share:.2f} %")
        content["target_met"] = share <= TARGET
    machine.write_result("checkpoint_stall", content, arguments.quick)


if __name__ == "__main__":
    main()
