"""Speed and memory of an open model (SmolLM2-135M-Instruct, Q4_1) beside transformers and llama.cpp.

    lalia pull smollm2
    python benchmarks/open_model_speed.py

Every program runs in a process of its own, several times in turn: load, prefill a prompt of 512 tokens, then
generate 128 tokens greedily behind 32, batch 1. Medians of all turns. "ours" computes with the GGUF file's own bits,
the others as they say; transformers and ours float32 read a folder made of the file's dequantised weights, which is
also what loading is timed on. llama.cpp reads the same file through llama-cpp-python or xllamacpp, whichever is
installed, with the instructions it was built for (printed). The bound is the machine's measured reading speed divided
by the bytes of weights that one token reads.

Peak memory is the process's largest resident set (VmHWM), the mapped pages of the weights included, after loading and
after everything.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
from lalia.errors import UserError

OURS = {"ours": None, "ours float32": "none", "ours int8": "int8", "ours int4": "int4"}
PEERS = ("transformers float32", "transformers bfloat16", "llama.cpp")
TARGETS = {
    "decode to transformers float32": 4.0,
    "decode to llama.cpp": 1.0,
    "prefill to transformers float32": 1.0,
    "prefill to llama.cpp": 1.0,
    "loading to transformers": 1.0,
}
Figures = dict[str, Any]


def main() -> None:
    """Measure, compare, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="GGUF file, folder with one, or name of a stored model")
    parser.add_argument("--prefill-tokens", type=int, default=512)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama-python", default=sys.executable, help="interpreter that has a binding of llama.cpp")
    parser.add_argument("--quick", action="store_true", help="smoke run: one turn, few tokens")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.prefill_tokens, options.new_tokens, options.repeats = 64, 16, 1
    if options.only:
        print("RESULT " + json.dumps(measure(options.only, options)))
        return
    machine.restart_with(options.threads)
    options.model = str(gguf_of(options.model))
    with tempfile.TemporaryDirectory() as scratch:
        options.folder = scratch
        dequantized_folder(Path(options.model), Path(scratch))
        turns: dict[str, list[Figures]] = {}
        for turn in range(options.repeats):
            for name in (*OURS, *PEERS):
                if turn > 0 and not turns.get(name):
                    continue  # it is not installed
                figures = in_a_process(name, options)
                if figures is not None:
                    turns.setdefault(name, []).append(figures)
    report(turns, options)


def in_a_process(name: str, options: argparse.Namespace) -> Figures | None:
    """One turn of a program; None, with a line that says why, if a peer is not there."""
    python = options.llama_python if name == "llama.cpp" else sys.executable
    passed = ("model", "folder", "prefill_tokens", "prompt_tokens", "new_tokens", "threads")
    arguments = [f"--{key.replace('_', '-')}={getattr(options, key)}" for key in passed]
    script = Path(__file__).with_name("peer_llama_cpp.py") if name == "llama.cpp" else Path(__file__)
    command = [python, str(script), f"--only={name}", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env=machine.environment(options.threads), check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        reason = (done.stderr.strip().splitlines() or ["no result"])[-1]
        if name in OURS:
            raise RuntimeError(f"{name}: {done.stderr[-3000:]}")
        print(f"{name} skipped: {reason}", file=sys.stderr)
        return None
    return json.loads(lines[-1].removeprefix("RESULT "))


def measure(name: str, options: argparse.Namespace) -> Figures:
    """What one process measures."""
    if name in OURS:
        return ours(OURS[name], options)
    return transformers(name.split()[1], options)


def prompt(length: int) -> list[int]:
    """Ids that are the same for every program."""
    return [(i * 7919) % 40_000 + 100 for i in range(length)]


def ours(quantize: Any, options: argparse.Namespace) -> Figures:
    """Through `lalia.load` and its engine, as a user does."""
    import torch

    import lalia
    from lalia.inference.quantization import weight_bytes
    from lalia.inference.sampling import SamplingParams

    before = peak_bytes()
    path = options.folder if quantize == "none" else options.model
    source = options.folder if quantize in ("int4", "int8") else path
    began = time.perf_counter()
    model = lalia.load(source, quantize=quantize)
    loading = time.perf_counter() - began
    loaded = peak_bytes()

    def generate(ids: list[int], new: int) -> list[float]:
        params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        return [time.perf_counter() for _ in model.engine.submit(ids, params)]

    figures = timed(generate, options)
    return figures | {
        "loading_seconds": loading,
        "bytes_per_token": weight_bytes(model.model, torch.float32),
        "peak_bytes": {"imports": before, "loaded": loaded, "all": peak_bytes()},
    }


def transformers(dtype: str, options: argparse.Namespace) -> Figures:
    """transformers with its own loop, streaming."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.generation.streamers import BaseStreamer

    before = peak_bytes()
    began = time.perf_counter()
    model: Any = AutoModelForCausalLM.from_pretrained(options.folder, dtype=getattr(torch, dtype))
    loading = time.perf_counter() - began
    loaded = peak_bytes()
    model.eval()

    class Clock(BaseStreamer):
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def generate(ids: list[int], new: int) -> list[float]:
        model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=new, pad_token_id=0)
        clock, tokens = Clock(), torch.tensor([ids])
        with torch.inference_mode():
            model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), streamer=clock)
        return clock.times[1:]  # the first call gives the prompt

    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return timed(generate, options) | {
        "loading_seconds": loading,
        "bytes_per_token": size,
        "peak_bytes": {"imports": before, "loaded": loaded, "all": peak_bytes()},
    }


def timed(generate: Callable[[list[int], int], list[float]], options: argparse.Namespace) -> Figures:
    """Prefill: from the call to the first token, its own step included. Decode: between first and last token."""
    generate(prompt(options.prompt_tokens), 4)  # warm up
    times = generate(prompt(options.prompt_tokens), options.new_tokens)
    decode = (len(times) - 1) / (times[-1] - times[0])
    generate(prompt(options.prefill_tokens), 2)
    began = time.perf_counter()
    first = generate(prompt(options.prefill_tokens), 2)[0] - began
    return {"decode_tokens_per_second": decode, "prefill_tokens_per_second": options.prefill_tokens / first}


def peak_bytes() -> int:
    """Largest resident set of this process so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise UserError("no VmHWM in /proc/self/status: peak memory is measured on Linux only")


def read_bandwidth(threads: int) -> float:
    """Bytes per second of reading memory: the sum of 1 GiB of float32, the best of seven."""
    import torch

    torch.set_num_threads(threads)
    values, best = torch.ones(1 << 28), 0.0
    for _ in range(7):
        began = time.perf_counter()
        values.sum()
        best = max(best, values.nbytes / (time.perf_counter() - began))
    return best


def gguf_of(model: str) -> Path:
    """The GGUF file meant."""
    from lalia.formats.loading import gguf_path
    from lalia.formats.store import find_model

    path = gguf_path(find_model(model))
    if path is None:
        raise UserError(f"--model {model}: a Hugging Face folder; give a GGUF file, which llama.cpp can read too")
    return path


def dequantized_folder(gguf: Path, folder: Path) -> None:
    """A Hugging Face folder in float32 of the same weights, with the file's tokenizer."""
    from lalia.formats.hf_folder import save_model
    from lalia.formats.loading import open_model

    with open_model(gguf) as files:
        save_model(files.model(), folder)
        files.needed_tokenizer().save(folder)


def report(turns: dict[str, list[Figures]], options: argparse.Namespace) -> None:
    """Medians, ratios, table, file."""

    def median(name: str, key: str) -> float:
        return statistics.median(figures[key] for figures in turns[name])

    bandwidth = read_bandwidth(options.threads)
    results: dict[str, Figures] = {}
    for name, figures in turns.items():
        result: Figures = {key: median(name, key) for key in figures[0] if key.endswith(("_second", "_seconds"))}
        result["turns"] = figures
        size = figures[0].get("bytes_per_token") or Path(options.model).stat().st_size
        result |= {"bytes_per_token": size, "bound_tokens_per_second": bandwidth / size}
        result["peak_bytes"] = {
            key: statistics.median(f["peak_bytes"][key] for f in figures) for key in figures[0]["peak_bytes"]
        }
        results[name] = result
    ours_, plain = results["ours"], results.get("transformers float32")
    ratios: dict[str, float] = {}
    for peer in ("transformers float32", "llama.cpp"):
        for kind in ("decode", "prefill"):
            if peer in results:
                key = f"{kind}_tokens_per_second"
                ratios[f"{kind} to {peer}"] = ours_[key] / results[peer][key]
    if plain is not None:
        ratios["loading to transformers"] = plain["loading_seconds"] / results["ours float32"]["loading_seconds"]
        for key in ("loaded", "all"):
            ratios[f"peak memory {key} to transformers"] = ours_["peak_bytes"][key] / plain["peak_bytes"][key]
    columns = ("", "decode tok/s", "bound", "prefill tok/s", "load s", "peak MB loaded", "peak MB all")
    rows = [
        (
            name,
            r["decode_tokens_per_second"],
            r["bound_tokens_per_second"],
            r["prefill_tokens_per_second"],
            r["loading_seconds"],
            r["peak_bytes"]["loaded"] / 1e6,
            r["peak_bytes"]["all"] / 1e6,
        )
        for name, r in results.items()
    ]
    print(machine.table(columns, rows))
    print(f"reading memory: {bandwidth / 1e9:.1f} GB/s with {options.threads} threads")
    for name, ratio in ratios.items():
        target = f" (target {TARGETS[name]:g})" if name in TARGETS else ""
        print(f"{name}: {ratio:.2f}{target}")
    settings = {key: getattr(options, key) for key in ("prefill_tokens", "prompt_tokens", "new_tokens", "repeats")}
    machine.write_result(
        "open_model_speed",
        {
            "machine": machine.describe(options.threads),
            "model": Path(options.model).name,
            "settings": settings | {"greedy": True, "batch": 1},
            "read_bandwidth_bytes_per_second": bandwidth,
            "ratios": ratios,
            "targets": TARGETS,
            "results": results,
        },
        options.quick,
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as problem:
        sys.exit(str(problem))
