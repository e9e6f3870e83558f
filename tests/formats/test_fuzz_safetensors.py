"""A model folder changed at random 1,000 times: each loads, or is refused by a UserError; nothing else.

The cases run in a process of their own, so that a crash is seen, whose address space may grow by LIMIT_BYTES and no
more, so that an allocation of what a damaged file asks for is seen as well. Everything follows from the seed; a failing
case is repeated with `python -m tests.formats.test_fuzz_safetensors FOLDER FIRST COUNT`.
"""

import json
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lalia.errors import UserError
from lalia.formats.hf_folder import load_model, save_model
from lalia.inference.language_model import load
from lalia.model.config import ModelConfig
from lalia.model.transformer import Transformer
from lalia.tokenizer.bpe import train_tokenizer
from lalia.tokenizer.config import TokenizerConfig

SIZE_KEYS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size",
)  # fmt: skip
NUM_CASES = 1000
LIMIT_BYTES = 256 << 20
"""The folders are 120 kB; PyTorch's own arenas and threads need some of this."""
CASE_SECONDS = 5.0
ROOT = Path(__file__).parents[2]

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 31, 32, 64, 255, 2**15, 10**6, 2**31 - 1, 2**31, 2**32, 10**9, 10**12,
    2**53, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63), 0.5, 1e-300, 1e300, -0.0, float("nan"), float("inf"), "", "0",
    "float32", "int8", "../../etc/passwd", "a" * 5000, "\x00", "\ud800", [], [1], [0] * 1000, {}, {"a": 1}, [[[]]],
    ["full_attention"], {"rope_type": "yarn", "factor": 1e9}, {"rope_type": "llama3"}, {"rope_type": "linear"},
    {"rope_type": "default", "rope_theta": 0}, {"AutoModel": "own.Model"},
]  # fmt: skip
KEYS = [
    "model_type", "architectures", "auto_map", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings", "rope_theta", "rope_scaling",
    "rope_parameters", "layer_types", "sliding_window", "use_sliding_window", "max_window_layers", "rms_norm_eps",
    "tie_word_embeddings", "attention_bias", "hidden_act", "quantization_config", "torch_dtype", "dtype",
    "num_experts", "eos_token_id", "partial_rotary_factor",
]  # fmt: skip
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "F4", "C64", "", "f32", 1, None]
TYPES = ["llama", "qwen2", "qwen3", "qwen3_moe", "gpt2", "bert", "distilbert", "gemma2", "gemma3_text", "mixtral",
         "phi", "clip", "clip_vision_model", "grok-1", "nanochat", "bloom", "__class__"]  # fmt: skip


def write_seeds(folder: Path) -> None:
    """Two good folders: `whole`, and `sharded` in two files with an index."""
    config = ModelConfig(
        family="qwen3",
        vocab_size=320,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=24,
        max_position_embeddings=32,
        qk_norm="before_rope",
    )
    model = Transformer(config)
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        weight.data.normal_(generator=generator)
    text = "a model folder that is changed at random must load or be refused in words that help"
    for name, shard_bytes in (("whole", 1 << 30), ("sharded", 12_000)):
        save_model(model, folder / name, {"eos_token_id": 304, "temperature": 0.7}, max_shard_bytes=shard_bytes)
        train_tokenizer([text], TokenizerConfig(vocab_size=320)).save(folder / name)


def mutate(folder: Path, rng: random.Random) -> str:
    """Change one file of a folder, or its header, or a value in it; what was done, in words."""
    name = rng.choice(sorted(path.name for path in folder.iterdir()))
    kind = rng.random()
    if kind < 0.35:
        name = rng.choice(sorted(path.name for path in folder.glob("*.safetensors")))
        return f"{name}: {_mutate_header(folder / name, rng)}"
    if kind < 0.75:
        name = rng.choice(["config.json", "config.json", *sorted(path.name for path in folder.glob("*.json"))])
        return f"{name}: {_mutate_json(folder / name, rng)}"
    return f"{name}: {_mutate_bytes(folder / name, rng)}"


def _mutate_bytes(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    # The first bytes are the header's length and the header; most others are weights, where every bit is a number.
    where = rng.randrange(min(len(content), rng.choice([8, 200, len(content)])))
    size = rng.choice([1, 2, 8, 100])
    what = rng.choice(["flip", "cut", "zero", "ones", "insert", "repeat", "append", "delete", "digit"])
    if what == "flip":
        content[where] ^= 1 << rng.randrange(8)
    elif what == "cut":
        del content[where:]
    elif what in ("zero", "ones"):
        content[where : where + size] = (b"\x00" if what == "zero" else b"\xff") * len(content[where : where + size])
    elif what == "insert":
        content[where:where] = rng.randbytes(size)
    elif what == "repeat":
        content[where:where] = content[where : where + size]
    elif what == "append":
        content += rng.randbytes(size)
    elif what == "delete":
        del content[where : where + size]
    else:
        digits = [i for i, byte in enumerate(content[:4000]) if 48 <= byte < 58]
        where = rng.choice(digits or [0])
        content[where : where + 1] = rng.choice([b"9", b"0", b"-1", b"99999999999999999999", b"1e5", b"null"])
    path.write_bytes(content)
    return f"{what} at {where}"


def _mutate_header(path: Path, rng: random.Random) -> str:
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    what = rng.choice(
        ["shape", "dtype", "offset", "swap", "rename", "drop", "add", "double", "length", "value", "meta"]
    )
    if what == "shape":
        entry["shape"] = rng.choice(
            [
                [],
                [0],
                entry["shape"][::-1],
                [*entry["shape"], 1],
                [-1],
                [2**63, 2],
                [2**32, 2**32],
                [10**30],
                [rng.choice(VALUES)],
            ]
        )
    elif what == "dtype":
        entry["dtype"] = rng.choice(DTYPES)
    elif what == "offset":
        entry["data_offsets"][rng.randrange(2)] = rng.choice(
            [0, -1, 1, len(data), len(data) + 4096, 2**63, 2**64, None]
        )
    elif what == "swap":  # two tensors on the same bytes, or on each other's
        other = rng.choice([key for key in header if key != "__metadata__"])
        entry["data_offsets"] = header[other]["data_offsets"]
    elif what == "rename":
        header[
            rng.choice(
                ["", "x", name.upper(), f"{name}.", "model.layers.999.mlp.up_proj.weight", "\x00", "lm_head.weight"]
            )
        ] = header.pop(name)
    elif what == "drop":
        del header[name]
    elif what == "add":
        header[rng.choice(["extra", "model.layers.2.input_layernorm.weight", "lm_head.weight"])] = dict(entry)
    elif what == "value":
        entry[rng.choice(sorted(entry))] = rng.choice(VALUES)
    elif what == "meta":
        header["__metadata__"] = rng.choice(VALUES)
    encoded = json.dumps(header).encode("utf-8", errors="surrogatepass")
    if what == "double":
        encoded = encoded[:-1] + b", " + json.dumps({name: entry}).encode()[1:]
    length = len(encoded)
    if what == "length":
        length = rng.choice([0, 1, length - 1, length + 1, len(content), 2**31, 2**63, 2**64 - 1])
    path.write_bytes(struct.pack("<Q", length) + encoded + data)
    return f"{what} of {name}"


def _mutate_json(path: Path, rng: random.Random) -> str:
    values = json.loads(path.read_text(encoding="utf-8"))
    if path.name == "config.json" and rng.random() < 0.6:
        key = rng.choice(KEYS)
        value = rng.choice(TYPES) if key == "model_type" and rng.random() < 0.7 else rng.choice(VALUES)
        values[key] = value
        if key == "model_type":
            values.pop("architectures")
        said = f"{key} = {value!r}"[:100]
    else:
        parent: Any = values
        key: Any = ""
        steps: list[Any] = []
        while isinstance(parent, dict | list) and parent:
            key = rng.choice(sorted(parent) if isinstance(parent, dict) else range(len(parent)))
            steps.append(key)
            child = parent[key]
            if not isinstance(child, dict | list) or not child or rng.random() < 0.2:
                break
            parent = child
        what = rng.choice(["set", "set", "drop", "double"])
        said = f"{what} {steps}"
        if what == "set":
            parent[key] = value = rng.choice(VALUES)
            said += f" = {value!r}"[:100]
        elif what == "drop":
            del parent[key]
        elif isinstance(parent, list):
            parent.append(parent[key])
        else:
            parent[f"{key}2"] = parent[key]
    text = json.dumps(values)
    if rng.random() < 0.05:
        text = text.replace("{", '{"hidden_size": 10000000000, "hidden_size": 1,', 1)
        said += ", doubled keys"
    path.write_bytes(text.encode("utf-8", errors="surrogatepass"))
    return said


def use(folder: Path) -> None:
    """What is to be tried: load the model, its tokenizer and its end tokens; use what loads."""
    model = load_model(folder)
    with torch.no_grad():
        model.logits(model(torch.zeros(1, 3, dtype=torch.int64)))
    load(folder, max_batch=1)


def run_cases(seeds: Path, first: int, count: int, attempt: Callable[[Path], None]) -> dict[str, Any]:
    """Outcomes by kind, and what failed: neither a success nor a UserError, or not in time."""
    outcomes: dict[str, int] = {}
    failures: list[str] = []

    def too_long(*_: Any) -> None:
        raise TimeoutError(f"more than {CASE_SECONDS} seconds")

    signal.signal(signal.SIGALRM, too_long)
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(first, first + count):
            rng = random.Random(number)
            folder = Path(scratch) / "model"
            shutil.copytree(seeds / rng.choice(["whole", "whole", "sharded"]), folder)
            done = mutate(folder, rng)
            print(number, file=sys.stderr, flush=True)  # the last one names the case that crashed
            signal.setitimer(signal.ITIMER_REAL, CASE_SECONDS)
            try:
                attempt(folder)
                outcome = "loaded"
            except UserError as error:
                outcome = type(error).__name__
                if len(str(error)) > 4100 or not str(error).replace("\n", " ").isprintable():
                    failures.append(
                        f"{number}: {done}: a message of {len(str(error))} characters: {str(error)[:200]!r}"
                    )
            except BaseException as error:  # noqa: BLE001 (that is what is looked for)
                outcome = "failed"
                last = traceback.extract_tb(error.__traceback__)[-1]
                failures.append(
                    f"{number}: {done}: {type(error).__name__}: {str(error)[:200]} ({last.name}:{last.lineno})"
                )
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            shutil.rmtree(folder)
    return {"outcomes": outcomes, "failures": failures}


def limit_memory() -> None:
    """From here on the address space may grow by LIMIT_BYTES. Linux only: elsewhere it is not enforced or unknown."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        size = int(statm.read_text().split()[0]) * resource.getpagesize() + LIMIT_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def in_a_process(seeds: Path, first: int, count: int, attempt: str = "use") -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.formats.test_fuzz_safetensors", str(seeds), str(first), str(count), attempt]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    cases = [line for line in done.stderr.splitlines() if line.isdigit()]
    assert done.returncode == 0, f"crashed ({done.returncode}) in case {cases[-1:]}: {done.stderr[-2000:]}"
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seeds")
    write_seeds(folder)
    return folder


def test_the_seeds_are_good(seeds: Path) -> None:
    for folder in sorted(seeds.iterdir()):
        use(folder)
    assert len(list((seeds / "sharded").glob("*.safetensors"))) > 1


def test_changed_at_random(seeds: Path) -> None:
    result = in_a_process(seeds, 0, NUM_CASES)
    assert not result["failures"], "\n".join(result["failures"])
    assert min(result["outcomes"][kind] for kind in ("loaded", "UserError", "CorruptFile")) > 50, result["outcomes"]


def enormous(seeds: Path) -> None:
    """Sizes that the file does not have, which must be found out before memory is taken."""
    folder = shutil.copytree(seeds / "whole", seeds / "enormous")
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for key in SIZE_KEYS:
        for size in (10**5, 10**9, 2**40, 2**62):
            path.write_text(json.dumps({**values, key: size}))
            try:
                load_model(folder)
            except UserError:
                continue
            raise AssertionError(f"{key} = {size} was accepted")


def careless(folder: Path) -> None:
    """Negative control: a loader without checks."""
    config = json.loads((folder / "config.json").read_text())
    assert config["vocab_size"] * config["hidden_size"] > 0 and config["architectures"][0]


def deadly(folder: Path) -> None:
    """Negative control: a loader that asks for twice the memory allowed, and then dies."""
    try:
        torch.empty(2 * LIMIT_BYTES, dtype=torch.uint8)
    except RuntimeError:
        print("memory was refused", file=sys.stderr)
    signal.raise_signal(signal.SIGSEGV)


ATTEMPTS = {"use": use, "deadly": deadly}


def test_sizes_are_believed_only_as_far_as_the_file_has_them(seeds: Path) -> None:
    """hidden_size = 10**9 and the like are refused before memory is taken."""
    limited = "import sys; from pathlib import Path; from tests.formats.test_fuzz_safetensors import *; "
    limited += "seeds = Path(sys.argv[1]); use(seeds / 'whole'); limit_memory(); enormous(seeds)"
    command = [sys.executable, "-c", limited, str(shutil.copytree(seeds, seeds.with_name("seeds-enormous")))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_careless_loaders_are_found_out(seeds: Path) -> None:
    before = signal.getsignal(signal.SIGALRM)
    try:
        failures = run_cases(seeds, 0, 200, careless)["failures"]
    finally:
        signal.signal(signal.SIGALRM, before)
    assert len(failures) > 5 and any("KeyError" in failure for failure in failures)
    with pytest.raises(AssertionError, match=r"crashed \(-11\) in case \['0'\]") as caught:
        in_a_process(seeds, 0, 2, "deadly")
    assert sys.platform != "linux" or "memory was refused" in str(caught.value)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, first, count, *chosen = sys.argv[1:]
    for seed in sorted(Path(folder).iterdir()):
        use(seed)  # whatever PyTorch sets up at first use
    limit_memory()
    print(json.dumps(run_cases(Path(folder), int(first), int(count), ATTEMPTS[chosen[0] if chosen else "use"])))
