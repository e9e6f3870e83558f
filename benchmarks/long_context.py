"""Time and memory of a 131,072-token prompt through a small model with llama3-scaled positions, beside transformers.

    python benchmarks/long_context.py                  # about six minutes on two quiet cores
    python benchmarks/long_context.py --quick          # smoke run, writes runs/quick/

The model has random weights: 4 layers, hidden size 256, 4 heads that share 2 key-value heads of 64. Lalia computes the
prompt in pieces of 512 tokens, as its engine does; transformers in one forward pass (attention "sdpa", logits of the
last token only), at the lengths given. A second Lalia model has windows of 1,024 tokens in all layers. Every run has a
process of its own; memory is the resident peak minus what was resident before the prompt, and stands beside

    formula   2 * num_key_value_heads * head_dim * bytes * sum over layers of min(length, window)

(`ModelConfig.cache_bytes`). The last logits of both are compared. Piece sizes and, for one layer, ways to attend from
a piece are timed too.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import machine
from lalia.formats.hf_folder import load_model, save_model
from lalia.inference.decoder import Decoder
from lalia.model.attention import attend_behind
from lalia.model.cache import KVCache
from lalia.model.config import ModelConfig, RopeScaling
from lalia.model.transformer import Transformer
from lalia.training.trainer import initialize

CONTEXT, BLOCK, PIECE, WINDOW = 131_072, 8192, 512, 1024
PEER_LENGTHS = (8192, 16_384, 32_768)
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": CONTEXT,
    "rope_theta": 500_000.0,
}


def make_model(window: int | None) -> Transformer:
    scaling = RopeScaling(kind="llama3", factor=32.0, original_max_position_embeddings=8192)
    # Only mistral's config.json has a window for all layers and llama3's scaling.
    family = "llama" if window is None else "mistral"
    model = Transformer(ModelConfig(family=family, **SIZES, rope_scaling=scaling, sliding_window=window)).eval()
    initialize(model, 0)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.ndim == 2:  # initialize leaves the output projections zero
                parameter.normal_(std=0.06, generator=generator)
    return model


def prompt(length: int) -> Tensor:
    return torch.randint(SIZES["vocab_size"], (1, length), generator=torch.Generator().manual_seed(2))


def status(name: str) -> int:
    """Bytes that /proc/self/status gives: VmRSS now, VmHWM at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


class Peak:
    """Resident memory above that at the start."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        self.before = status("VmRSS")

    def mib(self) -> float:
        return round((status("VmHWM") - self.before) / 2**20, 1)


def run_lalia(folder: Path, length: int, piece: int, block: int) -> dict[str, Any]:
    model = load_model(folder)
    decoder, config = Decoder(model), model.config
    decoder(prompt(piece), KVCache(config, 1, piece))  # warm-up: what is made once and kept
    cache, peak, blocks = KVCache(config, 1, length), Peak(), []
    cache.reserve(1, length, exact=True)
    hidden, started = torch.empty(0), time.perf_counter()
    for number, part in enumerate(prompt(length).split(block, 1)):
        before = time.perf_counter()
        for tokens in part.split(piece, 1):
            hidden = decoder(tokens, cache)
        end = number * block + part.shape[1]
        formula = round(config.cache_bytes(end) / 2**20, 1)
        seconds = round(time.perf_counter() - before, 2)
        blocks.append({"tokens": end, "seconds": seconds, "peak_mib": peak.mib(), "formula_mib": formula})
    seconds, logits = round(time.perf_counter() - started, 2), decoder.logits(hidden[-1:])[0].tolist()
    return {**blocks[-1], "seconds": seconds, "blocks": blocks, "logits": logits}


def run_transformers(folder: Path, length: int) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    with torch.inference_mode():
        model(prompt(PIECE), logits_to_keep=1)  # warm-up
        peak, started = Peak(), time.perf_counter()
        logits = model(prompt(length), logits_to_keep=1).logits[0, -1]
    seconds = round(time.perf_counter() - started, 2)
    return {"tokens": length, "seconds": seconds, "peak_mib": peak.mib(), "logits": logits.tolist()}


def time_attention(num_keys: int, rows: int) -> dict[str, Any]:
    """Milliseconds of one layer's attention from a piece of `rows` tokens, the last of `num_keys` or more."""
    num_keys = max(num_keys, 2 * rows)
    heads, kv_heads, head_dim = (
        SIZES[f"{name}"] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    query, scale = torch.randn(1, heads, rows, head_dim), head_dim**-0.5
    key, value = torch.randn(1, 2 * kv_heads, num_keys, head_dim).chunk(2, 1)

    def whole_mask() -> Tensor:
        hidden = torch.arange(num_keys) > torch.arange(num_keys - rows, num_keys)[:, None]
        mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)

    def strided_mask() -> Tensor:
        """A mask that is a view of one row, the queries turned round; grouped heads as batches."""
        row = torch.zeros(num_keys + rows - 1)
        row[num_keys:] = float("-inf")
        mask, groups = row.as_strided((rows, num_keys), (1, 1)), heads // kv_heads
        k, v = (t[0, :, None].expand(-1, groups, -1, -1) for t in (key, value))
        q = query.view(kv_heads, groups, rows, head_dim).flip(2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).flip(2).view(query.shape)

    def two_parts() -> Tensor:
        return attend_behind(query, key, value, scale)

    def milliseconds(attend: Callable[[], Tensor]) -> float:
        attend()
        times = []
        for _ in range(3):
            started = time.perf_counter()
            attend()
            times.append(time.perf_counter() - started)
        return round(1000 * min(times), 1)

    with torch.inference_mode():
        torch.testing.assert_close(two_parts(), whole_mask(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(strided_mask(), whole_mask(), rtol=1e-4, atol=1e-5)
        ways = {way.__name__: milliseconds(way) for way in (two_parts, strided_mask, whole_mask)}
    return {"keys": num_keys, "rows": rows, **ways}


def in_process(threads: int, name: str, *arguments: str | int | Path) -> dict[str, Any]:
    """Run one of the functions above in a process of its own."""
    print(f"  {name} {' '.join(str(a) for a in arguments[name != 'attention' :])}", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, "--run", name, *map(str, arguments)]
    done = subprocess.run(command, env=machine.environment(threads), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def measure(name: str, arguments: list[str]) -> None:
    """In the process that `in_process` starts."""
    if name == "attention":
        result = time_attention(*map(int, arguments))
    else:
        folder, numbers = Path(arguments[0]), map(int, arguments[1:])
        result = run_lalia(folder, *numbers) if name == "lalia" else run_transformers(folder, *numbers)
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description="A 131,072-token prompt: time, memory, transformers beside it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--length", type=int, default=CONTEXT)
    parser.add_argument("--peer-lengths", type=int, nargs="*", default=PEER_LENGTHS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        measure(options.run[0], options.run[1:])
        return
    length, peer_lengths, block = options.length, options.peer_lengths, BLOCK
    if options.quick:
        length, peer_lengths, block = 4096, (2048,), 1024
    threads = options.threads

    with tempfile.TemporaryDirectory() as temporary:
        full, windowed = Path(temporary) / "full", Path(temporary) / "windowed"
        save_model(make_model(None), full)
        save_model(make_model(WINDOW), windowed)
        peers, same_lengths = [], []
        for peer_length in peer_lengths:
            peer = in_process(threads, "transformers", full, peer_length)
            own = in_process(threads, "lalia", full, peer_length, PIECE, block)
            differences = [abs(a - b) for a, b in zip(own.pop("logits"), peer.pop("logits"), strict=True)]
            own["largest_logit_difference"] = max(differences)
            peers.append(peer)
            same_lengths.append(own)
        pieces = [
            {"piece": piece, "seconds": in_process(threads, "lalia", full, peer_lengths[0], piece, block)["seconds"]}
            for piece in (128, 512, 2048)
        ]
        attention = [
            in_process(threads, "attention", keys, rows)
            for keys in (peer_lengths[0], 4 * peer_lengths[0])
            for rows in (128, 512, 2048)
        ]
        narrow = in_process(threads, "lalia", windowed, length, PIECE, block)
        whole = in_process(threads, "lalia", full, length, PIECE, block)
        for run in (whole, narrow):
            run.pop("logits")

    rows = [
        [a["tokens"], a["seconds"], a["peak_mib"], a["formula_mib"], b["seconds"], b["peak_mib"], b["formula_mib"]]
        for a, b in zip(whole["blocks"], narrow["blocks"], strict=True)
    ]
    print(
        f"Lalia, pieces of {PIECE}: seconds per {block:,} tokens, MiB; left all layers full, right windows of {WINDOW}"
    )
    print(machine.table(("tokens", "s", "peak", "formula", "s", "peak", "formula"), rows))
    print(f"whole prompt: {whole['seconds']} s full, {narrow['seconds']} s windowed")
    print("\ntransformers and Lalia at the same lengths")
    rows = [
        [p["tokens"], p["seconds"], p["peak_mib"], o["seconds"], o["peak_mib"], o["largest_logit_difference"]]
        for p, o in zip(peers, same_lengths, strict=True)
    ]
    print(machine.table(("tokens", "their s", "their MiB", "our s", "our MiB", "difference"), rows))
    print()
    print(machine.table(("piece", "seconds"), [list(row.values()) for row in pieces]))
    print("\nmilliseconds of one layer's attention from a piece")
    print(machine.table(list(attention[0]), [list(row.values()) for row in attention]))
    for run in same_lengths:
        run.pop("blocks")
    content = {
        "machine": machine.describe(threads),
        "model": {**SIZES, "num_parameters": make_model(None).num_parameters(), "window": WINDOW},
        "full": whole,
        "windowed": narrow,
        "transformers": peers,
        "lalia_at_their_lengths": same_lengths,
        "piece_sizes": pieces,
        "attention_ms": attention,
    }
    machine.write_result("long_context", content, options.quick)


if __name__ == "__main__":
    main()
