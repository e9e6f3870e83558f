"""The benchmarks of training run: in miniature, and those for GPUs on a CPU as far as they go."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

GPU_STEPS = """
import math, sys, torch
sys.path.insert(0, "benchmarks")
import gpu_training
gpu_training.LENGTH = 32
shape = gpu_training.Shape(hidden_size=128, num_layers=1, intermediate_size=128, rows=2, vocab_size=512)
torch.manual_seed(0)
pool = [torch.randint(0, 512, (2, 33))] * gpu_training.POOL
steps = {variant: gpu_training.ours(shape, variant, pool, "cpu") for variant in gpu_training.VARIANTS[:-1]}
steps["transformers"] = gpu_training.transformers(shape, pool, "cpu")
for name, (step, flops) in steps.items():
    losses = [float(step(number)) for number in range(6)]
    assert math.isclose(losses[0], math.log(512), rel_tol=0.1), (name, losses)
    assert losses[-1] < losses[0], (name, losses)
    assert name == "transformers" or flops == steps["plain"][1] > 0
"""


def run(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("train_throughput.py --quick --only ours", "tokens/s"),
        ("scaling.py --quick", "tiny context"),
        ("checkpoint_stall.py --quick", "stall ms"),
    ],
)
def test_a_benchmark_in_miniature(command: str, shown: str) -> None:
    script, *options = command.split()
    assert shown in run(f"benchmarks/{script}", *options)


def test_steps_of_the_gpu_benchmark_train_on_a_cpu_too() -> None:
    """Without the compiler, which makes nothing but the same steps faster."""
    run("-c", GPU_STEPS, TORCHDYNAMO_DISABLE="1")
