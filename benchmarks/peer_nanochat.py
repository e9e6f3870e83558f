"""nanochat beside us: its own tokenizer, training script and evaluation arithmetic, unmodified, on our text.

What is ours: the parquet shards it reads, the command line (its runs/runcpu.sh, with a smaller depth, batch and
horizon), a stand-in for `wandb` when that is not installed (it is imported and, in a "dummy" run, never called), and
the windows over whole held-out documents that its evaluate_bpb is given.

As a script (`python peer_nanochat.py '{...}'`) it does one task with nanochat's modules in a process of its own,
because nanochat reads its folder and its number type from the environment when it is imported.
"""

import importlib
import importlib.util
import json
import math
import random
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch

import machine

LENGTH = 512
"""Sequence length in tokens, as in runs/runcpu.sh."""

SETTINGS = {
    "depth": 4,
    "head-dim": 64,
    "window-pattern": "L",
    "max-seq-len": LENGTH,
    "eval-every": -1,  # the saved checkpoints are scored afterwards, outside the measured time
    "core-metric-every": -1,
    "sample-every": -1,
}

RECIPE_BATCH, RECIPE_TOKENS = 16_384, 16_384 * 5000
"""Batch and horizon of runs/runcpu.sh, in tokens."""


def scaled_batch(horizon_tokens: float) -> int:
    """Batch in tokens for a shorter horizon: runcpu.sh's, scaled by nanochat's own rule B ~ D^0.383 (power of 2)."""
    return 2 ** round(math.log2(RECIPE_BATCH * (horizon_tokens / RECIPE_TOKENS) ** 0.383))


@dataclass(frozen=True)
class Variant:
    """How it computes: whether torch.compile does anything, and its compute dtype (on a CPU it chooses float32)."""

    compiled: bool = False
    dtype: str = "float32"


def environment(checkout: Path, base: Path, threads: int, variant: Variant) -> dict[str, str]:
    """Environment of its processes: its code, its folder, threads and variant."""
    path = f"{checkout}:{machine.REPOSITORY / 'src'}"
    if importlib.util.find_spec("wandb") is None:
        stand_in = base / "stand_in"
        stand_in.mkdir(parents=True, exist_ok=True)
        (stand_in / "wandb.py").write_text('"""Stand-in: imported by base_train, unused in a dummy run."""\n')
        path += f":{stand_in}"
    return machine.environment(
        threads,
        PYTHONPATH=path,
        NANOCHAT_BASE_DIR=str(base),
        NANOCHAT_DTYPE=variant.dtype,
        TORCHDYNAMO_DISABLE="0" if variant.compiled else "1",
    )


def prepare(checkout: Path, base: Path, threads: int, documents: Path, vocab_size: int, seed: int) -> dict[str, Any]:
    """Train its tokenizer on the training text with its own script, then write the shards it trains on.

    Its loader crops: of a document longer than a row it uses the first row and drops the rest, and it fills up a row
    with the head of another document, dropping the tail. Whole plays would lose it nearly everything, so it gets
    pieces that fill its rows exactly, which lose nothing; and shuffled, as the data it is made for is.

    Args:
        checkout: nanochat's folder.
        base: its NANOCHAT_BASE_DIR, which gets the shards, the tokenizer and the checkpoints.
        threads: threads it may use.
        documents: folder with train.parquet and validation.parquet (column text).
        vocab_size: of its tokenizer; its default of 32,768 would be larger than 5 MB of text can fill.
        seed: of the shuffle.
    """
    train, held_out = read_texts(documents / "train.parquet"), read_texts(documents / "validation.parquet")
    # scripts.tok_train reads at most 10,000 characters of a document: cut, it sees all of the text.
    _write_shards(base, [text[i : i + 10_000] for text in train for i in range(0, len(text), 10_000)], held_out)
    command = [sys.executable, "-m", "scripts.tok_train", f"--vocab-size={vocab_size}"]
    output = machine.run(
        command, checkout, environment(checkout, base, threads, Variant()), base / "logs" / "tokenizer.log"
    )
    seconds = re.search(r"^Training time: ([\d.]+)s", output, re.M)
    task = {"do": "pieces", "documents": str(documents.resolve())}
    pieces = _in_its_process(checkout, base, threads, Variant(), task, base / "logs" / "pieces.log")
    random.Random(seed).shuffle(pieces["train"])
    _write_shards(base, pieces["train"], pieces["validation"])
    return {
        "tokenizer_command": " ".join(command[1:]),
        "tokenizer_seconds": float(seconds[1]) if seconds else None,
        "vocab_size": vocab_size,
        "pieces": len(pieces["train"]),
        "pieces_filling_a_row_exactly": pieces["exact"],
        "train_tokens": pieces["tokens"],
        "train_bytes": sum(len(piece.encode()) for piece in pieces["train"]),
        "shuffle_seed": seed,
    }


def train(
    checkout: Path,
    base: Path,
    threads: int,
    variant: Variant,
    steps: int,
    save_every: int,
    batch_tokens: int,
    name: str,
) -> dict[str, Any]:
    """Run its scripts.base_train; training seconds (a step's own clock, `dt`) up to each saved checkpoint.

    The first two steps contain the compilation: they are counted as typical steps and reported beside.
    """
    flags = {
        **SETTINGS,
        "device-type": "cpu",
        "device-batch-size": min(32, batch_tokens // LENGTH),  # 32: runcpu.sh
        "total-batch-size": batch_tokens,
        "num-iterations": steps,
        "save-every": save_every,
        "model-tag": name,
    }
    command = [sys.executable, "-m", "scripts.base_train", *(f"--{key}={value}" for key, value in flags.items())]
    log = base / "logs" / f"{name}.log"
    output = machine.run(command, checkout, environment(checkout, base, threads, variant), log)
    seconds = [float(value) / 1000 for value in re.findall(r"^step \d+/\d+ .*?\| dt: ([\d.]+)ms", output, re.M)]
    if len(seconds) != steps:
        raise RuntimeError(f"{len(seconds)} steps in {log}, expected {steps}")
    typical = statistics.median(seconds[2:])
    counted = [typical, typical, *seconds[2:]]
    saved = sorted({*range(save_every, steps, save_every), steps}) if save_every > 0 else [steps]
    return {
        "command": " ".join(command[1:]),
        **asdict(variant),
        "steps": steps,
        "batch_tokens": batch_tokens,
        "training_seconds": sum(counted),
        "compile_and_first_steps_seconds": sum(seconds[:2]),
        "seconds_per_step": typical,
        "tokens_per_second": batch_tokens / typical,
        "last_epoch": int(re.findall(r"\| epoch: (\d+)", output)[-1]),
        "checkpoint_folder": str(base / "base_checkpoints" / name),
        "checkpoints": [{"step": step, "seconds": sum(counted[:step])} for step in saved],
    }


def score(
    checkout: Path, base: Path, threads: int, variant: Variant, trained: dict[str, Any], documents: Path, stride: int
) -> list[dict[str, Any]]:
    """Score every checkpoint of `train` on validation.parquet: bits per byte over training seconds.

    Non-overlapping windows for every checkpoint; for the last one also windows that slide by `stride` and nanochat's
    own loader.
    """
    task = {
        "do": "score",
        "documents": str(documents.resolve()),
        "checkpoint_folder": trained["checkpoint_folder"],
        "steps": [point["step"] for point in trained["checkpoints"]],
        "stride": stride,
    }
    log = base / "logs" / f"{Path(trained['checkpoint_folder']).name}.score.log"
    scores = _in_its_process(checkout, base, threads, Variant(dtype=variant.dtype), task, log)
    return [{**point, **scores[str(point["step"])]} for point in trained["checkpoints"]]


def windows(
    documents: Sequence[Sequence[int]], first: int, stride: int, batch: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches (inputs, targets) in which every token of every document is a target exactly once; -1 is ignored.

    Each row starts with the token `first`, as in its training, and holds up to LENGTH targets; the first window of a
    document scores all of them, each later one only those that no window before has scored: `stride` of them.
    stride = LENGTH gives non-overlapping windows (the last of a document moved back to be full).
    """
    rows: list[tuple[list[int], list[int]]] = []
    for ids in documents:
        done = start = 0
        while done < len(ids):
            start = max(0, min(start, len(ids) - LENGTH))
            part = list(ids[start : start + LENGTH])
            fill = LENGTH - len(part)
            target = [-1] * (done - start) + part[done - start :] + [-1] * fill
            rows.append(([first, *part[:-1]] + [first] * fill, target))
            done, start = start + len(part), start + stride
    for i in range(0, len(rows), batch):
        inputs, targets = zip(*rows[i : i + batch], strict=True)
        yield torch.tensor(inputs, dtype=torch.long), torch.tensor(targets, dtype=torch.long)


def read_texts(path: Path) -> list[str]:
    """The column `text` of a parquet file."""
    return pyarrow.parquet.read_table(path, columns=["text"])["text"].to_pylist()


def _write_shards(base: Path, train: Sequence[str], held_out: Sequence[str]) -> None:
    folder = base / "base_data_climbmix"  # the name its dataset.py expects; its last shard is the validation split
    folder.mkdir(parents=True, exist_ok=True)
    for i, texts in enumerate((train, held_out)):
        columns = pyarrow.table({"text": list(texts)})
        pyarrow.parquet.write_table(columns, folder / f"shard_{i:05d}.parquet", row_group_size=256)


def _in_its_process(checkout: Path, base: Path, threads: int, variant: Variant, task: dict[str, Any], log: Path) -> Any:
    command = [sys.executable, str(Path(__file__).resolve()), json.dumps(task)]
    output = machine.run(command, checkout, environment(checkout, base, threads, variant), log)
    return json.loads(output.strip().splitlines()[-1])


def _pieces_here(task: dict[str, Any]) -> dict[str, Any]:
    """In its process: the documents cut into texts that its tokenizer encodes to exactly LENGTH tokens."""
    tokenizer: Any = importlib.import_module("nanochat.tokenizer").get_tokenizer()
    found: dict[str, Any] = {"exact": 0, "tokens": 0}
    for split in ("train", "validation"):
        pieces: list[str] = []
        for text in read_texts(Path(task["documents"]) / f"{split}.parquet"):
            start = 0
            while start < len(text):
                ids = tokenizer.encode(text[start : start + LENGTH * 12])
                raw = [tokenizer.decode_single_token_bytes(token) for token in ids[: LENGTH + 8]]
                piece = _cut(raw, tokenizer) if len(ids) > LENGTH else text[start : start + LENGTH * 12]
                pieces.append(piece)
                start += len(piece)
                if split == "train":
                    count = len(tokenizer.encode(piece))
                    found["exact"] += count == LENGTH
                    found["tokens"] += count
        found[split] = pieces
    return found


def _cut(raw: Sequence[bytes], tokenizer: Any) -> str:
    """The first tokens of `raw` as a text that encodes to LENGTH tokens; a cut inside a word can change the count."""
    for end in sorted(range(LENGTH - 8, LENGTH + 8), key=lambda count: abs(count - LENGTH)):
        try:
            piece = b"".join(raw[:end]).decode()
        except UnicodeDecodeError:
            continue  # inside a character
        if len(tokenizer.encode(piece)) == LENGTH:
            return piece
    return b"".join(raw[:LENGTH]).decode()


def _score_here(task: dict[str, Any]) -> dict[str, dict[str, float]]:
    """In its process: its checkpoint loader, tokenizer and evaluate_bpb on our windows and on its own loader."""
    manager: Any = importlib.import_module("nanochat.checkpoint_manager")
    evaluate_bpb: Any = importlib.import_module("nanochat.loss_eval").evaluate_bpb
    own_loader: Any = importlib.import_module("nanochat.dataloader").tokenizing_distributed_data_loader_bos_bestfit
    token_bytes: Any = importlib.import_module("nanochat.tokenizer").get_token_bytes("cpu")
    texts, batch = read_texts(Path(task["documents"]) / "validation.parquet"), 8
    num_bytes = sum(len(text.encode()) for text in texts)
    scores: dict[str, dict[str, float]] = {}
    for step in task["steps"]:
        model, tokenizer, _ = manager.build_model(task["checkpoint_folder"], step, torch.device("cpu"), "eval")
        documents = [tokenizer.encode(text) for text in texts]
        num_tokens = sum(map(len, documents))
        last = step == task["steps"][-1]
        result: dict[str, float] = {}
        for name, stride in (("bits_per_byte", LENGTH), ("bits_per_byte_sliding", int(task["stride"]))):
            if name == "bits_per_byte" or last:
                batches = list(windows(documents, tokenizer.get_bos_token_id(), stride, batch))
                scored = sum(int(token_bytes[targets[targets >= 0]].sum()) for _, targets in batches)
                if scored != num_bytes:
                    raise RuntimeError(f"scored {scored} bytes of {num_bytes}")
                result[name] = evaluate_bpb(model, batches, len(batches), token_bytes)
        if last:
            rows = own_loader(tokenizer, batch, LENGTH, split="val", device="cpu")
            result["bits_per_byte_its_own_loader"] = evaluate_bpb(
                model, rows, max(1, num_tokens // (batch * LENGTH)), token_bytes
            )
            result["bytes_per_token"] = num_bytes / num_tokens
        scores[str(step)] = result
    return scores


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    print(json.dumps(_pieces_here(request) if request["do"] == "pieces" else _score_here(request)))
