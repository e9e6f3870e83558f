"""What training together costs each process: two gloo ranks of one thread beside one process of one thread.

    python benchmarks/scaling.py

Every process has the same rows per step. Three figures per shape, taken in turn, in seconds per step: one process by
itself; two that do not know each other, at the same time (what sharing the machine's memory costs); and two that train
together, in each layout. The overhead is that of together over by itself, and over side by side.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import machine

TARGET = 0.10
"""Overhead of two ranks over one with half the threads, at most."""
LAYOUTS: dict[str, dict[str, int]] = {"replicate": {"replicate": 2}, "shard": {"shard": 2}, "context": {"context": 2}}


@dataclass(frozen=True)
class Shape:
    """A model and the rows that each process takes per step."""

    name: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    rows: int = 8
    length: int = 256


SHAPES = (Shape("5M", 256, 6, 4096), Shape("30M", 384, 6, 50304, rows=4))


def work(shape: Shape, layout: dict[str, int] | None, steps: int) -> None:
    """A process: the Trainer's own steps on random tokens; rank 0 prints the median seconds of a step."""
    from lalia.model.shapes import ArchitectureConfig
    from lalia.model.transformer import Transformer
    from lalia.training.config import LoopConfig
    from lalia.training.parallel.layout import ParallelConfig
    from lalia.training.parallel.world import start
    from lalia.training.trainer import initialize
    from trainer_step import make_step

    torch.set_num_threads(1)
    world = start(ParallelConfig(**(layout or {})))
    config = ArchitectureConfig(hidden_size=shape.hidden_size, num_hidden_layers=shape.num_layers)
    model = Transformer(config.build(shape.vocab_size, shape.length))
    initialize(model, 0)
    rows = shape.rows * world.data_size * (world.layout.context if world.layout.context > 1 else 1)
    generator = torch.Generator().manual_seed(0)
    pool = [torch.randint(0, shape.vocab_size, (rows, shape.length + 1), generator=generator) for _ in range(8)]
    step = make_step(model, pool, LoopConfig(), world)
    times = []
    for number in range(steps):
        began = time.perf_counter()
        step(number)
        world.agree(False)
        times.append(time.perf_counter() - began)
    if world.is_main:
        print(json.dumps(statistics.median(times[2:])), flush=True)


def start_process(shape: Shape, layout: dict[str, int] | None, steps: int, rank: int, size: int, port: int) -> Any:
    """One process of `size`."""
    env = machine.environment(1, PYTHONPATH=str(machine.REPOSITORY / "src"), GLOO_SOCKET_IFNAME="lo")
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    task = json.dumps({"shape": asdict(shape), "layout": layout, "steps": steps})
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", task]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env | {k: str(v) for k, v in place.items()})


def measure(shape: Shape, steps: int, processes: int, layout: dict[str, int] | None) -> float:
    """Median seconds per step of the first process; without a layout the processes do not know each other."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    together = layout is not None
    started = [
        start_process(shape, layout, steps, rank if together else 0, processes if together else 1, port)
        for rank in range(processes)
    ]
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError(f"a process of {shape.name}, layout {layout}, failed; see above")
    return float(json.loads(outputs[0]))


def main() -> None:
    """Measure, print, write benchmarks/results/scaling.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="smoke run")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        task = json.loads(options.worker)
        work(Shape(**task["shape"]), task["layout"], task["steps"])
        return
    shapes = (Shape("tiny", 64, 2, 512, rows=2, length=64),) if options.quick else SHAPES
    rounds, steps = (1, 5) if options.quick else (options.rounds, options.steps)
    results = []
    for shape in shapes:
        seconds: dict[str, list[float]] = {"alone": [], "side by side": [], **{name: [] for name in LAYOUTS}}
        for _ in range(rounds):
            seconds["alone"].append(measure(shape, steps, 1, None))
            seconds["side by side"].append(measure(shape, steps, 2, None))
            for name, layout in LAYOUTS.items():
                seconds[name].append(measure(shape, steps, 2, layout))
        middle = {name: statistics.median(values) for name, values in seconds.items()}
        for name in LAYOUTS:
            over_alone, beside = (middle[name] / middle[base] - 1 for base in ("alone", "side by side"))
            results.append(
                {
                    "shape": asdict(shape),
                    "layout": name,
                    "seconds": middle[name],
                    "seconds_alone": middle["alone"],
                    "seconds_side_by_side": middle["side by side"],
                    "overhead_over_alone": over_alone,
                    "overhead_over_side_by_side": beside,
                    "target": TARGET,
                    "met": over_alone <= TARGET,
                    "rounds": {key: seconds[key] for key in ("alone", "side by side", name)},
                }
            )
    rows = [
        (
            f"{r['shape']['name']} {r['layout']}",
            r["seconds_alone"],
            r["seconds_side_by_side"],
            r["seconds"],
            r["overhead_over_alone"],
            r["overhead_over_side_by_side"],
        )
        for r in results
    ]
    columns = ("two ranks", "alone s", "side by side s", "together s", "over alone", "over side by side")
    print(machine.table(columns, rows))
    content = {"machine": machine.describe(1), "processors": os.cpu_count(), "results": results}
    machine.write_result("scaling", content, options.quick)


if __name__ == "__main__":
    main()
