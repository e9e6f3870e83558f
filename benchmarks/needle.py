"""Does a model with a context of 131,072 tokens find one token in them? Trains a tiny one on short sequences, and asks.

    python benchmarks/needle.py            # trains 500 steps, then asks at 1,024 to 131,072 tokens: some ten minutes
    python benchmarks/needle.py --quick    # smoke run, writes runs/quick/

The task is associative recall (Arora et al. 2023, arXiv 2312.04927). Among filler tokens stand pairs, a key followed by
its value; the last token is one of the keys and the model has to give its value, of 64 that there are. It has two
layers: the first attends to 4 tokens, where it can see which token stands before one; the second to everything, where
it can look for the token that stands behind the key (Olsson et al. 2022, arXiv 2209.11895).

It trains on 128 tokens whose positions are spread over the whole context, by random gaps between runs of neighbours
(as in Zhu et al. 2023, arXiv 2309.10400), so that it meets every distance but never more than 128 keys. Two questions
remain for 131,072: whether llama3-scaled rotary positions leave enough dimensions that do not turn over such distances,
and whether the needle's score stands out from so many others. It does where

    gap = score(needle) - log(mean(exp(scores of all others))) > log(keys - 1)

which is 11.8 there and 4.8 in training; the gap is measured.

Control: the same weights with the second layer limited to the last 1,024 tokens find the needles there, and no others.
"""

import argparse
import math
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import machine
from lalia.inference.context import Context
from lalia.inference.decoder import Decoder
from lalia.model.cache import KVCache
from lalia.model.config import ModelConfig, RopeScaling
from lalia.model.transformer import Transformer
from lalia.training.trainer import initialize

CONTEXT = 131_072
NUM_KEYS = NUM_VALUES = 64
FILLER = NUM_KEYS + NUM_VALUES
VOCAB_SIZE = 256
"""Ids: keys, values, filler."""

STEPS, BATCH, LENGTH, NUM_PAIRS, LEARNING_RATE = 500, 32, 128, 16, 3e-3
RUNS = 8
"""Average number of gaps in the positions of a training sequence."""

LENGTHS = (1024, 4096, 16_384, 65_536, 131_072)
NUM_NEEDLES, NUM_HAYSTACKS = 32, 2
PIECE = 512
FIRST_WINDOW, CONTROL_WINDOW = 4, 1024


class ControlConfig(ModelConfig):
    """The second layer, too, has a window."""

    def window_of_layer(self, layer: int) -> int | None:
        return CONTROL_WINDOW if layer == 1 else super().window_of_layer(layer)


def make_config(kind: type[ModelConfig] = ModelConfig) -> ModelConfig:
    return kind(
        family="llama",
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_theta=500_000.0,
        rope_scaling=RopeScaling(kind="llama3", factor=32.0, original_max_position_embeddings=8192),
        sliding_window=FIRST_WINDOW,
        layer_types=("sliding_attention", "full_attention"),
    )


def training_batch(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sequences in which every pair stands three times; the second and third time its value can be known.

    Returns:
        tokens, positions: (BATCH, LENGTH)
        asked, answers: (BATCH, 2 * NUM_PAIRS) places of the keys whose value can be known, and those values.
    """

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    units = LENGTH // 2  # a pair or two fillers; gaps are between units
    tokens = torch.randint(FILLER, VOCAB_SIZE, (BATCH, LENGTH), generator=generator)
    keys = random(BATCH, NUM_KEYS).argsort(1)[:, :NUM_PAIRS, None]
    values = NUM_KEYS + torch.randint(NUM_VALUES, (BATCH, NUM_PAIRS, 1), generator=generator)
    places = random(BATCH, units).argsort(1)[:, : 3 * NUM_PAIRS].view(BATCH, NUM_PAIRS, 3).sort(-1).values * 2
    rows = torch.arange(BATCH)[:, None, None]
    tokens[rows, places], tokens[rows, places + 1] = keys, values

    span = LENGTH * (CONTEXT / LENGTH) ** random(BATCH, 1) - LENGTH  # of all gaps together, uniform in its logarithm
    gaps = -random(BATCH, units).log() * (random(BATCH, units) < RUNS / units)
    gaps = (gaps / gaps.sum(1, keepdim=True).clamp_min(1e-9) * span * 0.999).floor()
    offsets = gaps.cumsum(1).long()
    first = (random(BATCH, 1) * (CONTEXT - LENGTH - offsets[:, -1:])).long()
    positions = first + torch.arange(LENGTH) + offsets.repeat_interleave(2, 1)
    return tokens, positions, places[..., 1:].reshape(BATCH, -1), values.expand(-1, -1, 2).reshape(BATCH, -1)


def train(model: Transformer, steps: int, seed: int) -> list[dict[str, float]]:
    initialize(model, seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, (0.9, 0.98), weight_decay=0.0)
    log = []
    for step in range(steps):
        rate = LEARNING_RATE * min(1.0, (step + 1) / 100) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        tokens, positions, asked, answers = training_batch(generator)
        hidden = model(tokens, positions=positions)
        logits = model.logits(hidden[torch.arange(BATCH)[:, None], asked])
        loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            accuracy = (logits.argmax(-1) == answers).float().mean().item()
            log.append({"step": step, "loss": round(loss.item(), 5), "accuracy": round(accuracy, 4)})
            print(f"  step {step}: loss {loss.item():.4f}, accuracy {accuracy:.3f}", file=sys.stderr, flush=True)
    return log


class Recorder:
    """While it is on, keeps the attention scores (heads, keys) of the second layer's last token."""

    def __init__(self, kv_heads: int) -> None:
        self.kv_heads, self.attend = kv_heads, Context.attend
        self.scores = torch.empty(0)

    def __enter__(self) -> "Recorder":
        recorder = self

        def attend(self: Context, query: Tensor, keys: Tensor, values: Tensor, window: int | None, scale: float):
            if window is None and self.seq == 1:
                filled = keys[0, :, : self.end]  # (kv_heads, keys, head_dim)
                grouped = query.view(recorder.kv_heads, -1, query.shape[-1])
                recorder.scores = (grouped @ filled.transpose(1, 2)).flatten(0, 1) * scale
            return recorder.attend(self, query, keys, values, window, scale)

        Context.attend = attend
        return self

    def __exit__(self, *_: object) -> None:
        Context.attend = self.attend


def haystack(length: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """tokens (length - 1,) with NUM_NEEDLES pairs, one in each of as many equal parts; their places, keys, values."""
    tokens = torch.randint(FILLER, VOCAB_SIZE, (length - 1,), generator=generator)
    part = (length - 1) / NUM_NEEDLES
    within = torch.rand(NUM_NEEDLES, generator=generator) * (part - 2)
    places = (torch.arange(NUM_NEEDLES) * part + within).long()
    keys = torch.randperm(NUM_KEYS, generator=generator)[:NUM_NEEDLES]
    values = NUM_KEYS + torch.randint(NUM_VALUES, (NUM_NEEDLES,), generator=generator)
    tokens[places], tokens[places + 1] = keys, values
    return tokens, places, keys, values


def ask(model: Transformer, length: int, num_haystacks: int, seed: int) -> dict[str, Any]:
    """Prefill haystacks in pieces and ask for each of their needles."""
    config, decoder = model.config, Decoder(model)
    started, trials = time.perf_counter(), []
    generator = torch.Generator().manual_seed(seed + length)
    full = config.window_of_layer(1) is None
    for _ in range(num_haystacks):
        tokens, places, keys, values = haystack(length, generator)
        cache = KVCache(config, 1, length)
        cache.reserve(1, length, exact=True)
        for piece in tokens.split(PIECE):
            decoder(piece[None], cache)
        for place, key, value in zip(places.tolist(), keys.tolist(), values.tolist(), strict=True):
            cache.lengths[0] = length - 1  # the next question takes the place of this one
            with Recorder(config.num_key_value_heads) as recorder:
                logits = decoder.logits(decoder(torch.tensor([[key]]), cache))
            trial = {"distance": length - 1 - place, "found": int(logits.argmax()) == value}
            if full:  # the head that sees the needle best
                scores = recorder.scores.double()
                needle = scores[:, place + 1].clone()
                scores[:, place + 1] = -math.inf
                gap = (needle - scores.logsumexp(1) + math.log(length - 1)).max().item()
                trial |= {"gap": gap, "share": 1 / (1 + (length - 1) * math.exp(-gap))}
            trials.append(trial)
    near = [trial["found"] for trial in trials if trial["distance"] < CONTROL_WINDOW - 8]
    far = [trial["found"] for trial in trials if trial["distance"] > CONTROL_WINDOW + 8]
    row: dict[str, Any] = {
        "length": length,
        "trials": len(trials),
        "found": sum(trial["found"] for trial in trials),
        "found_within_1024": f"{sum(near)}/{len(near)}",
        "found_beyond_1024": f"{sum(far)}/{len(far)}",
        "seconds": round(time.perf_counter() - started, 1),
    }
    if full:
        gaps = sorted(trial["gap"] for trial in trials)
        row |= {"needed_gap": round(math.log(length - 1), 2), "smallest_gap": round(gaps[0], 2)}
        row |= {"median_gap": round(gaps[len(gaps) // 2], 2)}
        row |= {"smallest_share": round(min(trial["share"] for trial in trials), 4)}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description="Needle retrieval by a tiny trained model over 131,072 tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    machine.restart_with(options.threads)
    torch.set_num_threads(options.threads)
    steps, lengths = (20, (1024, 2048)) if options.quick else (options.steps, options.lengths)

    started = time.perf_counter()
    model = Transformer(make_config())
    log = train(model, steps, options.seed)
    training_seconds = time.perf_counter() - started
    control = Transformer(make_config(ControlConfig))
    control.load_state_dict(model.state_dict())
    rows, controls = [], []
    for length in lengths:
        rows.append(ask(model, length, NUM_HAYSTACKS, options.seed))
        controls.append(ask(control, length, NUM_HAYSTACKS, options.seed))
        print(f"  {rows[-1]}\n  control {controls[-1]}", file=sys.stderr, flush=True)

    columns = ("length", "found", "trials", "needed_gap", "smallest_gap", "median_gap", "smallest_share", "seconds")
    print(machine.table(columns, [[row[name] for name in columns] for row in rows]))
    columns = ("length", "found", "trials", "found_within_1024", "found_beyond_1024")
    print("\ncontrol: second layer limited to 1,024 tokens")
    print(machine.table(columns, [[row[name] for name in columns] for row in controls]))
    content = {
        "machine": machine.describe(options.threads),
        "seed": options.seed,
        "num_parameters": model.num_parameters(),
        "training": {"steps": steps, "length": LENGTH, "batch": BATCH, "seconds": round(training_seconds), "log": log},
        "chance": 1 / NUM_VALUES,
        "needles": rows,
        "control": controls,
    }
    machine.write_result("needle", content, options.quick)


if __name__ == "__main__":
    main()
