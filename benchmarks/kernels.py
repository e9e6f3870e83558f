"""The choices that make training fast on a CPU, each beside what PyTorch or a paper would do by itself.

    python benchmarks/kernels.py

Attention, forward and backward: our blocked form (model/attention.py) beside PyTorch's flash kernel. Float32 matrix
products: oneDNN (model/functions.py) beside MKL, for forward, the input's gradient and the weight's gradient. The
contestants take turns; the median of the turns counts. Writes benchmarks/results/kernels.json.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from lalia.devices import use_threads
from lalia.model import attention
from lalia.model.attention import attend
from lalia.model.functions import _onednn
from lalia.training.muon import _halley, _newton_schulz
from machine import describe, table, write_result

ATTENTION_SHAPES = ((8, 3, 256, 64), (16, 4, 256, 64), (8, 4, 512, 64))  # (batch, heads, seq, head_dim)
LINEAR_SHAPES = ((2048, 192, 576), (4096, 256, 768), (4096, 256, 4096))  # (rows, in, out)
MATRIX_SHAPES = ((24, 256, 256), (18, 704, 256), (24, 384, 384))  # (count, rows, columns)


def medians(contestants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each contestant, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 2):
        for name, work in contestants.items():
            began = time.perf_counter()
            work()
            if turn >= 2:
                times[name].append((time.perf_counter() - began) * 1e3)
    return {name: round(statistics.median(values), 3) for name, values in times.items()}


def measure_attention(shape: tuple[int, int, int, int], dtype: torch.dtype, rounds: int) -> dict[str, float]:
    head_dim = shape[-1]
    query, key, value = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    grad = torch.randn(shape, dtype=dtype)

    def blocked(blocks: int) -> Callable[[], None]:
        def work() -> None:
            attention.NUM_BLOCKS = blocks
            attend(query, key, value, head_dim**-0.5, None, causal=True).backward(grad)

        return work

    def flash() -> None:
        F.scaled_dot_product_attention(query, key, value, is_causal=True).backward(grad)

    return medians({"flash": flash, "2 blocks": blocked(2), "4 blocks": blocked(4), "8 blocks": blocked(8)}, rounds)


def measure_linear(shape: tuple[int, int, int], rounds: int) -> dict[str, float]:
    rows, inner, outer = shape
    x, weight, grad = torch.randn(rows, inner), torch.randn(outer, inner), torch.randn(rows, outer)
    transposed = weight.t().contiguous()
    return medians(
        {
            "forward, MKL": lambda: F.linear(x, weight),
            "forward, oneDNN": lambda: _onednn(x, weight),
            "input gradient, MKL": lambda: grad @ weight,
            "input gradient, oneDNN": lambda: _onednn(grad, transposed),
            "weight gradient, MKL": lambda: grad.t() @ x,
            "weight gradient, oneDNN": lambda: _onednn(grad.t(), x.t()),
        },
        rounds,
    )


def measure_orthogonalization(shape: tuple[int, int, int], rounds: int) -> dict[str, float]:
    matrices = torch.randn(shape)
    return medians(
        {
            "5 Newton-Schulz steps": lambda: _newton_schulz(matrices, torch.float32, 5),
            "2 Halley steps": lambda: _halley(matrices),
        },
        rounds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="smoke run")
    arguments = parser.parse_args()
    rounds = 1 if arguments.quick else arguments.rounds
    threads = use_threads()
    rows: list[dict[str, Any]] = []
    for shape in ATTENTION_SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            name = f"attention {shape} {str(dtype).removeprefix('torch.')}"
            rows += [{"what": name, "milliseconds": measure_attention(shape, dtype, rounds)}]
    for shape in LINEAR_SHAPES:
        rows += [{"what": f"linear {shape} float32", "milliseconds": measure_linear(shape, rounds)}]
    for shape in MATRIX_SHAPES:
        name = f"orthogonalization {shape} float32"
        rows += [{"what": name, "milliseconds": measure_orthogonalization(shape, rounds)}]
    for row in rows:
        print(row["what"])
        print(table(["", "ms"], list(row["milliseconds"].items())))
    write_result("kernels", {"machine": describe(threads), "rows": rows}, quick=arguments.quick)


if __name__ == "__main__":
    main()
