"""llama.cpp as the outside reference, through the prebuilt wheel of xllamacpp."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

CHILD = Path(__file__).with_name("llama_cpp_child.py")

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None,
    reason="llama.cpp is not installed: pip install xllamacpp (in the extra lalia[test] where there is a wheel)",
)


def ask(model: Path, requests: list[tuple[str, Any]], context: int = 256) -> list[Any]:
    """Answers of llama.cpp on a GGUF file, from a process of its own.

    Args:
        requests: ("tokenize", {"content", "add_special", "parse_special"}) gives ids; ("template", {"messages"}) the
            prompt; ("greedy", {"prompt": ids, "n_predict"}) ids; ("log_probs", {"tokens", "vocab_size"}) log
            probabilities of the next token.
    """
    job, result = model.with_suffix(".job.json"), model.with_suffix(".result.json")
    job.write_text(
        json.dumps({"model": str(model), "context": context, "result": str(result), "requests": requests}),
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, str(CHILD), str(job)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"llama.cpp failed on {model}:\n{done.stderr[-4000:]}"
    return json.loads(result.read_text(encoding="utf-8"))


def next_log_probs(model: Path, tokens: list[int], vocab_size: int) -> Tensor:
    """Log probabilities of the token after `tokens`, float32 (vocab_size,)."""
    (answer,) = ask(model, [("log_probs", {"tokens": tokens, "vocab_size": vocab_size})])
    return torch.tensor(answer)
