"""One turn of llama.cpp for open_model_speed.py, in an interpreter that has llama-cpp-python or xllamacpp.

It imports nothing of Lalia, so that the binding may live in an environment of its own. llama.cpp's own timings are
taken: prompt and generation apart, sampling included.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any


def peak_bytes() -> int:
    """Largest resident set of this process so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def prompt(length: int) -> list[int]:
    """As in open_model_speed.py."""
    return [(i * 7919) % 40_000 + 100 for i in range(length)]


def with_xllamacpp(options: argparse.Namespace, xllamacpp: Any) -> dict[str, Any]:
    """Through its in-process server."""
    before = peak_bytes()
    params = xllamacpp.CommonParams()
    params.model.path = options.model
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    params.n_ctx, params.n_parallel = 2048, 1
    began = time.perf_counter()
    server = xllamacpp.Server(params)
    loading, loaded = time.perf_counter() - began, peak_bytes()

    def run(length: int, new: int) -> dict[str, Any]:
        request = {"prompt": prompt(length), "n_predict": new, "temperature": 0, "ignore_eos": True}
        return server.handle_completions({**request, "cache_prompt": False})["timings"]

    run(options.prompt_tokens, 4)
    decode = run(options.prompt_tokens, options.new_tokens)["predicted_per_second"]
    run(options.prefill_tokens, 2)
    prefill = run(options.prefill_tokens, 2)["prompt_per_second"]
    return result(decode, prefill, loading, before, loaded, str(xllamacpp.get_system_info()), "xllamacpp")


def with_llama_cpp_python(options: argparse.Namespace, llama_cpp: Any) -> dict[str, Any]:
    """Through llama-cpp-python's `eval`, which computes logits; the largest is taken by numpy."""
    import numpy

    before = peak_bytes()
    began = time.perf_counter()
    model = llama_cpp.Llama(
        options.model,
        n_ctx=2048,
        n_threads=options.threads,
        n_threads_batch=options.threads,
        n_batch=512,
        verbose=False,
    )
    loading, loaded = time.perf_counter() - began, peak_bytes()
    size = model.n_vocab()

    def best() -> int:
        logits = numpy.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, -1), shape=(size,))
        return int(logits.argmax())

    def run(length: int, new: int) -> tuple[float, float]:
        model.reset()
        began = time.perf_counter()
        model.eval(prompt(length))
        token = best()
        middle = time.perf_counter()
        for _ in range(new):
            model.eval([token])
            token = best()
        return length / (middle - began), new / (time.perf_counter() - middle)

    run(options.prompt_tokens, 4)
    decode = run(options.prompt_tokens, options.new_tokens)[1]
    run(options.prefill_tokens, 2)
    prefill = run(options.prefill_tokens, 2)[0]
    info = llama_cpp.llama_print_system_info().decode()
    return result(decode, prefill, loading, before, loaded, info, "llama-cpp-python")


def result(
    decode: float, prefill: float, loading: float, before: int, loaded: int, info: str, binding: str
) -> dict[str, Any]:
    """As open_model_speed.py expects it."""
    return {
        "decode_tokens_per_second": decode,
        "prefill_tokens_per_second": prefill,
        "loading_seconds": loading,
        "peak_bytes": {"imports": before, "loaded": loaded, "all": peak_bytes()},
        "instructions": " ".join(info.split()),
        "binding": binding,
    }


def main() -> None:
    """Measure with whichever binding there is."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("only", "model", "folder"):
        parser.add_argument(f"--{name}")
    for name in ("prefill-tokens", "prompt-tokens", "new-tokens", "threads"):
        parser.add_argument(f"--{name}", type=int)
    options = parser.parse_args()
    try:
        import llama_cpp  # pyright: ignore[reportMissingImports]

        found = with_llama_cpp_python(options, llama_cpp)
    except ImportError:
        try:
            import xllamacpp  # pyright: ignore[reportMissingImports]
        except ImportError:
            sys.exit("neither llama-cpp-python nor xllamacpp is installed here (--llama-python names an interpreter)")
        found = with_xllamacpp(options, xllamacpp)
    print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main()
