"""Time to quality: how long we train to reach the bits per byte that peers end with.

    python benchmarks/time_to_quality.py --run runs/shakespeare --nanogpt DIR --nanochat DIR
    python benchmarks/time_to_quality.py --run runs/shakespeare --transformers --litgpt DIR --extra DIR

Same documents, same held-out works, same machine, same threads. Peers train with their own unmodified scripts; their
evaluations, compilation and start-up are not counted as training time. Each peer's end value is the better of two
ways to score every held-out byte once: non-overlapping windows, and windows that slide.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch

import machine
import peer_litgpt
import peer_nanochat
import peer_nanogpt
import peer_transformers
from lalia.errors import UserError
from lalia.files import fingerprint, read_json, sha256_file, write_json

TARGETS = {"nanogpt": 1 / 6, "nanochat": 0.75, "transformers": 0.6, "litgpt": 0.6}
"""Our training seconds to a peer's end value, as a share of the peer's training seconds: at most this.

0.6 for every peer that trains for --peer-minutes; nanochat's is for its own, shorter budget.
"""

EVERYTHING = 10**9
"""As pretrain.evaluation_bytes: every evaluation reads all of the held-out text."""


def measure_nanogpt(options: argparse.Namespace, documents: Path) -> dict[str, Any]:
    """nanoGPT with the CPU command of its README, and once more with torch.compile, which the README turns off."""
    folder = machine.checkout(options.nanogpt, "nanogpt", "train.py")
    work = options.work / "nanogpt"
    train, held_out = (peer_nanochat.read_texts(documents / f"{split}.parquet") for split in ("train", "validation"))
    data = peer_nanogpt.prepare(work / "data", train, held_out)
    ids = peer_nanogpt.vocabulary(train, held_out)
    failed: list[str] = []
    settings = peer_nanogpt.SETTINGS | ({"max_iters": 30, "lr_decay_iters": 30} if options.quick else {})
    runs: list[dict[str, Any]] = []
    for compiled in (False,) if options.quick else (False, True):
        out, log = work / f"out-{compiled}", work / "logs" / f"train-{compiled}.log"
        try:
            result = peer_nanogpt.train(folder, work / "data", out, options.threads, compiled, settings, log)
        except RuntimeError as error:
            if not compiled:
                raise
            failed.append(f"with torch.compile: {error}")  # not what its README says to do on a CPU
            continue
        for name, stride in (("bits_per_byte", settings["block_size"]), ("bits_per_byte_sliding", 16)):
            scored = peer_nanogpt.score(folder, out / "ckpt.pt", ids, held_out, int(stride))
            result[name] = scored["bits_per_byte"]
        result["end_bits_per_byte"] = min(result["bits_per_byte"], result["bits_per_byte_sliding"])
        runs.append({"name": "as its README" if not compiled else "with torch.compile", **result})
    return {
        "commit": machine.commit(folder),
        "patched": "nothing; data folder in the form of its data/shakespeare_char/prepare.py",
        "tuning": "README command for CPU; always_save_checkpoint=True so that the last model is scored",
        "data": data,
        "failed": failed,
        "sliding_stride": 16,
        "runs": runs,
    }


def measure_nanochat(options: argparse.Namespace, documents: Path) -> dict[str, Any]:
    """nanochat of depth 4 for a fixed training time, compiled or not, whichever is faster here.

    float32 is what it chooses on a CPU; bfloat16 is its documented override (NANOCHAT_DTYPE).
    """
    folder = machine.checkout(options.nanochat, "nanochat", "scripts/base_train.py")
    base, threads, stride = options.work / "nanochat", options.threads, 256
    data = peer_nanochat.prepare(folder, base, threads, documents, 4096, seed=1)
    budget = options.nanochat_minutes * 60
    probe_steps = 4 if options.quick else 14
    probe_batch = 1024 if options.quick else 4096
    runs: list[dict[str, Any]] = []
    probes: list[dict[str, Any]] = []
    failed: list[str] = []
    for dtype in options.nanochat_dtype:
        tried: list[dict[str, Any]] = []
        for compiled in (False,) if options.quick else (False, True):
            variant, name = peer_nanochat.Variant(compiled, dtype), f"probe-{dtype}-{compiled}"
            try:
                probe = peer_nanochat.train(folder, base, threads, variant, probe_steps, -1, probe_batch, name)
            except RuntimeError as error:
                if not compiled:
                    raise
                failed.append(f"{dtype} with torch.compile: {error}")
                continue
            tried.append(probe)
        probes += tried
        best = max(tried, key=lambda probe: probe["tokens_per_second"])
        speed = float(best["tokens_per_second"])
        batches: list[int] = options.nanochat_batch or [peer_nanochat.scaled_batch(speed * budget)]
        for batch in [probe_batch] if options.quick else batches:
            steps = 6 if options.quick else round(budget * speed / batch)
            every = 3 if options.quick else math.ceil(60 * speed / batch)
            name = f"{dtype}-batch-{batch}"
            variant = peer_nanochat.Variant(best["compiled"], dtype)
            result = peer_nanochat.train(folder, base, threads, variant, steps, every, batch, name)
            curve = peer_nanochat.score(folder, base, threads, variant, result, documents, stride)
            if not options.quick and abs(result["training_seconds"] / budget - 1) > 0.03:
                print(f"note: trained {result['training_seconds']:.0f} s instead of {budget:.0f} s (the speed changed)")
            end = min(curve[-1]["bits_per_byte"], curve[-1]["bits_per_byte_sliding"])
            title = f"depth 4, {dtype}, batch {batch} tokens"
            runs.append({**result, "name": title, "curve": curve, "end_bits_per_byte": end})
    return {
        "commit": machine.commit(folder),
        "patched": "nothing; a stand-in for the import of wandb when it is not installed",
        "tuning": "runs/runcpu.sh with depth 4, the horizon that fits the time, and batch by its own scaling rule",
        "torch_note": "its pyproject pins torch 2.9.1; measured with the same torch as everyone here",
        "data": data,
        "failed": failed,
        "sliding_stride": stride,
        "probes": [
            {k: p[k] for k in ("compiled", "dtype", "tokens_per_second", "compile_and_first_steps_seconds")}
            for p in probes
        ],
        "runs": runs,
    }


def measure_transformers(options: argparse.Namespace, documents: Path) -> dict[str, Any]:
    """The transformers Trainer on a small Llama for --peer-minutes, compiled or not, whichever is faster here."""
    tokenizer, threads = _tokenizer(options), options.threads
    shared = (options.work / "transformers", options.extra, tokenizer, documents, threads)
    measured = _measure_for_minutes(
        options,
        lambda compiled, steps: peer_transformers.train(*shared, compiled, steps),
        lambda trained: peer_transformers.score(*shared, trained),
    )
    return {
        "version": machine.describe(threads)["transformers"],
        "patched": "nothing; a callback reads the clock after each step",
        "tuning": "learning rate 1e-3, cosine over the steps that fit the time, 5 % warm-up; else its defaults",
        **measured,
    }


def measure_litgpt(options: argparse.Namespace, documents: Path) -> dict[str, Any]:
    """`litgpt pretrain` on the same Llama for --peer-minutes, compiled or not, whichever is faster here."""
    folder = machine.checkout(options.litgpt, "litgpt", "litgpt/pretrain.py")
    tokenizer, threads = _tokenizer(options), options.threads
    work, extra = options.work / "litgpt", options.extra
    peer_litgpt.prepare(work, documents)
    measured = _measure_for_minutes(
        options,
        lambda compiled, steps: peer_litgpt.train(folder, work, extra, tokenizer, threads, compiled, steps),
        lambda trained: peer_litgpt.score(folder, work, extra, tokenizer, documents, threads, trained),
    )
    return {
        "commit": machine.commit(folder),
        "patched": "nothing",
        "tuning": "its tinystories.yaml with this shape, learning rate 1e-3, cosine over steps that fit, 5 % warm-up",
        **measured,
    }


def _measure_for_minutes(
    options: argparse.Namespace,
    train: Callable[[bool, int], dict[str, Any]],
    score: Callable[[dict[str, Any]], dict[str, float]],
) -> dict[str, Any]:
    """Probe the speed without and with torch.compile, train the faster way for --peer-minutes, score.

    When neither way trains here, no runs and the reason under "skipped".

    Args:
        options: of the command line.
        train: (compiled, steps) -> result.
        score: result of `train` -> bits per byte of the last model.
    """
    budget = options.peer_minutes * 60
    probes: list[dict[str, Any]] = []
    failed: list[str] = []
    for compiled in (False,) if options.quick else (False, True):
        try:
            probes.append(train(compiled, 4 if options.quick else 14))
        except RuntimeError as error:
            failed.append(f"{'with' if compiled else 'without'} torch.compile: {error}")
    if not probes:
        reason = f"it cannot train here with torch {torch.__version__}: {failed[0]}"
        return {"failed": failed, "skipped": reason, "runs": []}
    best = max(probes, key=lambda probe: probe["tokens_per_second"])
    result = best if options.quick else train(best["compiled"], max(3, round(budget / best["seconds_per_step"])))
    if not options.quick and abs(result["training_seconds"] / budget - 1) > 0.03:
        print(f"note: trained {result['training_seconds']:.0f} s instead of {budget:.0f} s (the speed changed)")
    scores = score(result)
    how = "with torch.compile" if best["compiled"] else "without torch.compile"
    end = min(scores["bits_per_byte"], scores["bits_per_byte_sliding"])
    return {
        "failed": failed,
        "probes": [
            {key: probe[key] for key in ("compiled", "tokens_per_second", "compile_and_first_steps_seconds")}
            for probe in probes
        ],
        "runs": [{**result, "name": f"width 256, 4 layers, {how}", **scores, "end_bits_per_byte": end}],
    }


def _tokenizer(options: argparse.Namespace) -> Path:
    """Our run's tokenizer, which the peers without one of their own get.

    Raises:
        UserError: if the run has none.
    """
    folder = options.run / "tokens" / "tokenizer"
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: no tokenizer.json there; make it with: lalia tokenize --run {options.run}")
    return folder


def read_ours(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The evaluations over all of the held-out text in our metrics.jsonl files: one curve per file.

    Evaluations of an excerpt are left out: peers are scored on all of it.

    Raises:
        UserError: if a file is missing or holds no such evaluation.
    """
    curves: list[dict[str, Any]] = []
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path} is missing; pretrain first, or give the file with --metrics")
        events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        events = [event for event in events if event.get("event") == "evaluation"]
        whole = [event for event in events if event.get("all_of_validation", True)]
        if len(whole) < len(events):
            print(
                f"\n{path}: {len(events) - len(whole)} of {len(events)} evaluations read an excerpt and are left out; "
                f"for a fine curve train with pretrain.evaluation_bytes={EVERYTHING}"
            )
        if not whole:
            raise UserError(f"{path} has no evaluation of all held-out text; train to the end")
        points = [{"seconds": float(e["seconds"]), "bits_per_byte": float(e["bits_per_byte"])} for e in whole]
        curves.append({"metrics": str(path), "curve": points, "end_bits_per_byte": points[-1]["bits_per_byte"]})
    return curves


def time_to(curve: Sequence[dict[str, float]], bits_per_byte: float) -> float | None:
    """Seconds at which a curve first reaches a value, linear between evaluations; None if it never does.

    When its first evaluation is already there, that evaluation's seconds: an upper bound.
    """
    for i, point in enumerate(curve):
        if point["bits_per_byte"] <= bits_per_byte:
            if i == 0:
                return point["seconds"]
            before = curve[i - 1]
            share = (before["bits_per_byte"] - bits_per_byte) / (before["bits_per_byte"] - point["bits_per_byte"])
            return before["seconds"] + share * (point["seconds"] - before["seconds"])
    return None


def compare(
    peers: dict[str, dict[str, Any]], ours: Sequence[dict[str, Any]], targets: dict[str, float]
) -> list[dict[str, Any]]:
    """For each run of each peer, our earliest time to its end value, the ratio to its training time, its target.

    A peer that was scored along the way and was better there than at its end (too many epochs) has a second row, with
    its best value and the time to that.
    """
    rows: list[dict[str, Any]] = []
    for peer, measured in peers.items():
        for run in measured["runs"]:
            ends = [(run["name"], run["end_bits_per_byte"], run["training_seconds"])]
            best = min(run.get("curve", ()), key=lambda point: point["bits_per_byte"], default=None)
            if best is not None and best["bits_per_byte"] < run["end_bits_per_byte"]:
                ends.append((f"{run['name']}, its best", best["bits_per_byte"], best["seconds"]))
            for name, value, peer_seconds in ends:
                times = [(time, o["metrics"]) for o in ours if (time := time_to(o["curve"], value))]
                seconds, source = min(times, default=(None, None))
                ratio = seconds / peer_seconds if seconds else None
                rows.append(
                    {
                        "peer": peer,
                        "run": name,
                        "peer_end_bits_per_byte": value,
                        "peer_training_seconds": peer_seconds,
                        "our_seconds_to_that": seconds,
                        "ratio_ours_to_peer": ratio,
                        "target_ratio": targets[peer],
                        "met": ratio is not None and ratio <= targets[peer],
                        "our_metrics": source,
                    }
                )
    return rows


def measured_once(
    name: str,
    options: argparse.Namespace,
    documents: Path,
    measure: Callable[[argparse.Namespace, Path], dict[str, Any]],
) -> dict[str, Any]:
    """A peer's measurement; with --reuse the one kept in the work folder, if made from the same inputs."""
    kept = options.work / f"{name}.json"
    inputs = {
        "documents": [sha256_file(documents / f"{split}.parquet") for split in ("train", "validation")],
        "commit": machine.describe(options.threads)["transformers"]
        if name == "transformers"
        else machine.commit(getattr(options, name)),
        "threads": options.threads,
        "quick": options.quick,
        "torch": torch.__version__,
        "nanochat": [options.nanochat_minutes, options.nanochat_batch, options.nanochat_dtype]
        if name == "nanochat"
        else None,
    }
    if name in ("transformers", "litgpt"):
        inputs["tokenizer"] = sha256_file(_tokenizer(options) / "tokenizer.json")
        inputs["minutes"] = options.peer_minutes
    if options.reuse and kept.is_file() and (old := read_json(kept))["inputs"] == fingerprint(inputs):
        print(f"{name}: reusing the measurement of {old['machine']['date']}")
        return {**old, "reused": True}
    print(f"{name}: measuring", flush=True)
    result = {
        "inputs": fingerprint(inputs),
        "machine": machine.describe(options.threads),
        **measure(options, documents),
    }
    if "skipped" in result:
        print(f"{name}: skipped: {result['skipped']}")
    else:
        write_json(kept, result)
    return result


def main() -> None:
    """Measure the peers that were given, read our curve, compare, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="our run folder (documents/, base/metrics.jsonl)")
    parser.add_argument("--nanogpt", type=Path, help="checkout of nanoGPT; left out: not compared")
    parser.add_argument("--nanochat", type=Path, help="checkout of nanochat; left out: not compared")
    parser.add_argument("--transformers", action="store_true", help="compare with the installed transformers' Trainer")
    parser.add_argument("--litgpt", type=Path, help="checkout of litgpt; left out: not compared")
    parser.add_argument("--extra", type=Path, help="folder with what those two need: accelerate, lightning, litdata")
    parser.add_argument("--peer-minutes", type=float, default=10.0, help="training time of those two")
    parser.add_argument(
        "--metrics", type=Path, nargs="*", help="our metrics.jsonl files (default RUN/base/metrics.jsonl)"
    )
    parser.add_argument("--pretrain-budget", help="first run: lalia pretrain RUN pretrain.budget=VALUE")
    parser.add_argument(
        "--nanochat-minutes", type=float, default=6.0, help="its target is 0.6 at --peer-minutes or more"
    )
    parser.add_argument(
        "--nanochat-batch", type=int, nargs="*", help="tokens per step (default: its rule); several: all"
    )
    parser.add_argument("--nanochat-dtype", nargs="*", default=["float32"], choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=machine.REPOSITORY / "runs" / "peers", help="scratch folder")
    parser.add_argument("--reuse", action="store_true", help="keep peers' earlier measurements of the same inputs")
    parser.add_argument("--quick", action="store_true", help="smoke run: a few steps, no result worth keeping")
    options = parser.parse_args()
    options.work = (options.work / ("quick" if options.quick else "full")).resolve()
    torch.set_num_threads(options.threads)
    documents: Path = options.run / "documents"
    for split in ("train", "validation"):
        if not (documents / f"{split}.parquet").is_file():
            raise UserError(
                f"{documents / f'{split}.parquet'} is missing; make it with: lalia collect --run {options.run}"
            )
    if options.quick:
        documents = _small(documents, options.work / "documents")
    if options.pretrain_budget:
        settings = {"budget": options.pretrain_budget, "evaluations": 24, "evaluation_bytes": EVERYTHING}
        command = [sys.executable, "-c", "from lalia.cli import main; main()", "pretrain", str(options.run)]
        command += [f"pretrain.{key}={value}" for key, value in settings.items()]
        subprocess.run(command, check=True, env=machine.environment(options.threads))

    peers: dict[str, dict[str, Any]] = {}
    if options.nanogpt:
        peers["nanogpt"] = measured_once("nanogpt", options, documents, measure_nanogpt)
    if options.nanochat:
        peers["nanochat"] = measured_once("nanochat", options, documents, measure_nanochat)
    if options.transformers:
        peers["transformers"] = measured_once("transformers", options, documents, measure_transformers)
    if options.litgpt:
        peers["litgpt"] = measured_once("litgpt", options, documents, measure_litgpt)
    for name, peer in peers.items():
        rows = [
            (r["name"], r["end_bits_per_byte"], r["training_seconds"], r["tokens_per_second"]) for r in peer["runs"]
        ]
        print("\n" + machine.table((name, "bits per byte", "seconds", "tokens/s"), rows))

    metrics: list[Path] = options.metrics or [options.run / "base" / "metrics.jsonl"]
    ours: list[dict[str, Any]] = []
    try:
        ours = read_ours(metrics)
    except UserError as error:
        print(f"\nours: {error}")
    targets = TARGETS | ({"nanochat": 0.6} if options.nanochat_minutes >= options.peer_minutes else {})
    rows = compare(peers, ours, targets)
    columns = ("peer", "run", "its bits/byte", "its s", "our s", "ours/its", "target", "met")
    print("\n" + machine.table(columns, [tuple(row.values())[:8] for row in rows]))
    result = {
        "machine": machine.describe(options.threads),
        "held_out_bytes": sum(len(t.encode()) for t in peer_nanochat.read_texts(documents / "validation.parquet")),
        "comparison": rows,
        "ours": ours,
        "peers": peers,
    }
    machine.write_result("time_to_quality", result, options.quick)


def _small(documents: Path, target: Path) -> Path:
    """A few hundred kilobytes of the documents, for --quick."""
    target.mkdir(parents=True, exist_ok=True)
    for split, count, length in (("train", 4, 100_000), ("validation", 2, 3_000)):
        texts = [text[:length] for text in peer_nanochat.read_texts(documents / f"{split}.parquet")[:count]]
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), target / f"{split}.parquet")
    return target


if __name__ == "__main__":
    try:
        main()
    except UserError as problem:
        sys.exit(str(problem))
