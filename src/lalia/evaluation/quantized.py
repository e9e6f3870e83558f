"""What quantising a model costs and gains: bits per byte, perplexity, bytes and speed, before and after."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lalia.data.documents import read_documents
from lalia.errors import UserError
from lalia.inference.language_model import LanguageModel, load
from lalia.inference.quantization import bits_of, quantization_report, weight_bytes
from lalia.inference.sampling import SamplingParams

PROMPT_TOKENS, NEW_TOKENS, REPEATS = 32, 32, 3
MAX_CHARACTERS = 200_000
"""Of a run's held-out text, how much is scored."""
WINDOW = 1024
"""Tokens that one forward pass scores at most."""


def compare_quantized(model: Path | str, texts: Sequence[str], how: str) -> dict[str, Any]:
    """Score the same texts with a model in float32 and quantised.

    Args:
        model: folder, GGUF file or name of a stored model. Of a GGUF file the weights that are quantised keep their
            own bits, whatever `how` says; `kinds` shows it.
        texts: held-out texts. Each begins as a document does; its first token is not scored where the tokenizer has
            no token that begins a text.
        how: int8 or int4.

    Returns:
        before, after: each with bits_per_byte, perplexity (per token), size_bytes (weights that a step reads) and
            tokens_per_second (generating alone, the best of three).
        change: bits_per_byte and perplexity, relative: 0.01 is one per cent worse.
        kinds: number of weights of each kind after.
        tokens, bytes: scored.

    Raises:
        UserError: if there is no text of two tokens, and as `lalia.load`.
    """
    bits_of(how)
    found: dict[str, dict[str, float]] = {}
    kinds: dict[str, int] = {}
    tokens = num_bytes = 0
    for name, quantize in (("before", "none"), ("after", how)):
        loaded = load(model, quantize=quantize)
        nats, tokens, num_bytes = score(loaded, texts)
        found[name] = {
            "bits_per_byte": nats / math.log(2) / num_bytes,
            "perplexity": math.exp(nats / tokens),
            "size_bytes": weight_bytes(loaded.model, torch.float32),
            "tokens_per_second": _speed(loaded, texts),
        }
        if name == "after":
            for row in quantization_report(loaded.model):
                kinds[row["kind"]] = kinds.get(row["kind"], 0) + math.prod(row["shape"])
    before, after = found["before"], found["after"]
    change = {name: after[name] / before[name] - 1 for name in ("bits_per_byte", "perplexity")}
    return {"how": how, **found, "change": change, "kinds": kinds, "tokens": tokens, "bytes": num_bytes}


def held_out_texts(model: Path, text: Path | None) -> list[str]:
    """What to compare on: a file of text, or the held-out documents of the run that a model folder is in.

    Raises:
        UserError: if the file cannot be read, or there is neither.
    """
    if text is not None:
        try:
            return [text.expanduser().read_text(encoding="utf-8")]
        except UnicodeDecodeError as error:
            raise UserError(f"{text} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    documents = model.resolve().parent / "documents"
    if not documents.is_dir():
        raise UserError(f"{model} is in no run, so there is no held-out text; give one with --text FILE")
    texts = [document.text for document in read_documents(documents, "validation")]
    kept: list[str] = []
    while texts and sum(map(len, kept)) < MAX_CHARACTERS:
        kept.append(texts.pop(0)[:MAX_CHARACTERS])
    return kept


def report(results: dict[str, Any]) -> list[str]:
    """Lines for people."""
    before, after, change = results["before"], results["after"], results["change"]
    rows = (("bits per byte", "bits_per_byte", 4), ("perplexity", "perplexity", 3))
    lines = [f"{'':<24}{'float32':>12}{'quantised':>12}"]
    for label, key, digits in rows:
        shown = f"{label:<24}{before[key]:>12.{digits}f}{after[key]:>12.{digits}f}"
        lines.append(f"{shown}   {change[key]:+.2%}")
    lines.append(f"{'MB of weights':<24}{before['size_bytes'] / 1e6:>12,.1f}{after['size_bytes'] / 1e6:>12,.1f}")
    lines.append(f"{'tokens/s':<24}{before['tokens_per_second']:>12,.1f}{after['tokens_per_second']:>12,.1f}")
    kinds = ", ".join(f"{count:,} in {kind}" for kind, count in results["kinds"].items())
    return [*lines, f"weights: {kinds}; scored: {results['tokens']:,} tokens"]


def score(model: LanguageModel, texts: Sequence[str]) -> tuple[float, int, int]:
    """Sum of -log p(token | tokens before it in its window) in nats, tokens scored, UTF-8 bytes of the texts.

    Raises:
        UserError: if no text has two tokens.
    """
    window = min(WINDOW, model.max_length)
    nats, tokens, num_bytes = 0.0, 0, 0
    for text in texts:
        ids = model.encode(text)
        if len(ids) < 2:
            continue
        for start in range(0, len(ids) - 1, window):
            nats -= float(model.log_probs(ids[start : start + window + 1]).double().sum())
        tokens += len(ids) - 1
        num_bytes += len(text.encode())
    if not tokens:
        raise UserError("none of the texts has two tokens; give longer ones")
    return nats, tokens, num_bytes


def _speed(model: LanguageModel, texts: Sequence[str]) -> float:
    """Tokens per second of one generation, its prompt not counted."""
    longest = max(texts, key=len)
    prompt = model.tokenizer.decode(model.encode(longest)[:PROMPT_TOKENS])
    new = max(1, min(NEW_TOKENS, model.max_length - len(model.encode(prompt)) - 1))
    greedy, best = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True), 0.0
    for _ in range(REPEATS):
        arrivals: list[float] = []
        request = model.engine.submit(model.encode(prompt), greedy)
        for _ in request:
            arrivals.append(time.perf_counter())
        if len(arrivals) > 1:
            best = max(best, (len(arrivals) - 1) / (arrivals[-1] - arrivals[0]))
    return best
