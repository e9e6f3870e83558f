"""The importer of Grok-1's release: a tiny checkpoint in its layout, and pickles that would like to run code."""

import os
import pickle
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lalia.errors import CorruptFile, UserError
from lalia.formats.grok import GROK_1, GrokCheckpoint, _read_layout, _values, convert_grok, load_grok
from lalia.formats.hf_folder import load_model, read_config
from lalia.model.config import ModelConfig
from lalia.model.transformer import Transformer
from tests.formats.grok_reference import load_grok_reference
from tests.formats.references import MODELS, make_input, make_reference

NUM_LAYERS = 11  # layer 10 comes before layer 2
SIZES = {"num_hidden_layers": NUM_LAYERS, "rms_norm_eps": 1e-5, "intermediate_size": 64, "vocab_size": 97}
ORDER = (
    "moe_block.experts.linear",
    "moe_block.experts.linear_1",
    "moe_block.experts.linear_v",
    "attn.k_proj",
    "attn.o_proj",
    "attn.q_proj",
    "attn.v_proj",
    "pre_attn_norm",
    "post_attn_norm",
    "pre_moe_norm",
    "post_moe_norm",
    "moe_block.gate",
)
"""The files of a layer, in the words of the reference; in the release's: moe/linear ... rms_norm_3, router."""


class QuantizedWeight8bit:
    """As the release's class: pickled by name, with two arrays in it."""

    def __init__(self, weight: np.ndarray, scales: Any) -> None:
        self.weight, self.scales = weight, scales


class Bfloat16Array:
    """Pickled as numpy pickles an array of the type that JAX's ml_dtypes adds (protocol 4)."""

    def __init__(self, values: Tensor) -> None:
        self.values = values.to(torch.bfloat16).contiguous()

    def __reduce__(self) -> Any:
        dtype = Opaque(np.dtype, (Opaque.scalar, False, True), (3, "<", None, None, None, 2, 2, 64))
        content = self.values.view(torch.int16).numpy().tobytes()
        state = (1, tuple(self.values.shape), dtype, False, content)
        return np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), state  # type: ignore[attr-defined]


class Opaque:
    """Pickles as a call of `what` with a state."""

    scalar: Any = None

    def __init__(self, what: Any, arguments: tuple[Any, ...], state: Any = None) -> None:
        self.parts = (what, arguments, state)

    def __reduce__(self) -> Any:
        return self.parts


@pytest.fixture
def their_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """pickle writes a class by its name only if it finds it there."""
    scalar = type("bfloat16", (), {"__module__": "ml_dtypes"})
    module: Any = types.ModuleType("ml_dtypes")
    module.bfloat16 = scalar
    monkeypatch.setitem(sys.modules, "ml_dtypes", module)
    monkeypatch.setattr(sys.modules["__main__"], "QuantizedWeight8bit", QuantizedWeight8bit, raising=False)
    monkeypatch.setattr(QuantizedWeight8bit, "__module__", "__main__")
    monkeypatch.setattr(Opaque, "scalar", scalar)
    yield


def make() -> Any:
    return make_reference("grok-1", **SIZES)


def config() -> ModelConfig:
    settings = MODELS["grok-1"][2] | SIZES
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    changed = {key: settings[key] for key in (*same, "intermediate_size", "max_position_embeddings", "num_experts")}
    return GROK_1.model_copy(update={**changed, "embedding_multiplier": settings["hidden_size"] ** 0.5})


def quantized(weight: Tensor, groups: int) -> tuple[QuantizedWeight8bit, Tensor]:
    """int8 with a bfloat16 scale per column and group of rows, and the values that these say; weight (..., in, out)."""
    *lead, rows, columns = weight.shape
    grouped = weight.view(*lead, groups, rows // groups, columns)
    scales = (grouped.abs().amax(-2, keepdim=True) / 127).to(torch.bfloat16).float()
    numbers = (grouped / scales).round().clamp(-127, 127)
    stored = QuantizedWeight8bit(numbers.view(weight.shape).to(torch.int8).numpy(), Bfloat16Array(scales.squeeze(-2)))
    return stored, (numbers * scales).view(weight.shape)


def write_checkpoint(theirs: Any, folder: Path, quantize: bool) -> None:
    """The reference's weights in the release's layout; with `quantize`, the reference takes over what was written."""
    folder.mkdir()
    number = 0

    def put(content: Any) -> None:
        nonlocal number
        with (folder / f"tensor{number:05d}_000").open("wb") as file:
            pickle.dump(content, file, protocol=4)
        number += 1

    def matrix(names: list[str], stacked: bool, groups: int | None) -> None:
        weights = [theirs._get(name) for name in names]
        values = torch.stack([weight.detach().t() for weight in weights])  # (experts or 1, in, out)
        if quantize and groups:
            stored, values = quantized(values.contiguous(), groups)
            if not stacked:
                stored.weight, stored.scales = stored.weight[0], Bfloat16Array(stored.scales.values[0])
            for weight, value in zip(weights, values, strict=True):
                weight.data.copy_(value.t())
            put(stored)
        else:
            put(np.ascontiguousarray((values if stacked else values[0]).numpy()))

    put(theirs._get("model.embed_tokens.weight").detach().numpy())
    put(theirs._get("model.norm.scale").detach().numpy())
    names = sorted(f"decoder_layer_{layer}/x" for layer in range(theirs.settings["num_hidden_layers"]))
    for layer in (int(name.split("_")[2].split("/")[0]) for name in names):
        for entry in ORDER:
            at = f"model.layers.{layer}.{entry}"
            if "norm" in entry:
                put(theirs._get(f"{at}.scale").detach().numpy())
            elif "experts" in entry:
                before, after = at.split("experts")
                experts = [f"{before}experts.{expert}{after}.weight" for expert in range(theirs.num_experts)]
                matrix(experts, True, 8 if entry.endswith("linear_1") else 1)
            else:
                groups = None if entry.endswith("gate") else 8 if entry.endswith("o_proj") else 1
                matrix([f"{at}.weight"], False, groups)


def differs(ours: Transformer, theirs: Any) -> float:
    tokens = make_input("grok-1")
    with torch.no_grad():
        return (ours.logits(ours(tokens)) - theirs(tokens).logits).abs().max().item()


@pytest.mark.parametrize("quantize", [False, True], ids=["float", "int8"])
@pytest.mark.usefixtures("their_modules")
def test_a_checkpoint_in_the_releases_layout(quantize: bool, tmp_path: Path) -> None:
    theirs = make()
    untouched = make()
    write_checkpoint(theirs, tmp_path / "ckpt-0", quantize)
    ours = load_grok(tmp_path / "ckpt-0", config())
    # What was written, exactly: for int8 the reference has the rounded values.
    assert differs(ours, theirs) <= 1e-5
    with torch.no_grad():
        before, after = (model(make_input("grok-1")).logits for model in (untouched, theirs))
    error = ((after - before).square().mean() / before.square().mean()).sqrt().item()
    print(f"what 8 bits cost, of the logits' root mean square: {error:.1%}")
    assert (0.001 < error < 0.1) if quantize else error == 0  # 11 layers deep, with choices of experts that tip over
    convert_grok(tmp_path / "ckpt-0", tmp_path / "out", config(), torch.float32, max_shard_bytes=100_000)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 5
    assert read_config(tmp_path / "out") == config()
    assert differs(load_model(tmp_path / "out"), theirs) <= 1e-5
    with torch.no_grad():
        again, expected = (
            model(make_input("grok-1")).logits for model in (load_grok_reference(tmp_path / "out"), theirs)
        )
    assert (again - expected).abs().max() <= 1e-5


def test_layers_stand_in_the_order_of_their_names(tmp_path: Path) -> None:
    theirs = make()
    write_checkpoint(theirs, tmp_path / "ckpt-0", False)
    names = GrokCheckpoint(tmp_path / "ckpt-0", config()).names()
    layers = list(dict.fromkeys(name.split(".")[2] for name in names[2:]))
    assert layers == ["0", "1", "10", *map(str, range(2, 10))]
    # Negative control: two layers' files exchanged are two layers exchanged, which shows.
    for entry in range(12):
        one, other = (tmp_path / "ckpt-0" / f"tensor{2 + 12 * place + entry:05d}_000" for place in (2, 3))
        first, second = one.read_bytes(), other.read_bytes()
        one.write_bytes(second)
        other.write_bytes(first)
    assert differs(load_grok(tmp_path / "ckpt-0", config()), theirs) > 1e-2


def test_the_published_sizes() -> None:
    with torch.device("meta"):
        assert Transformer(GROK_1).num_parameters() == 315_684_820_992


class Runs:
    """A pickle that calls `function` when it is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.parts = function, arguments

    def __reduce__(self) -> Any:
        return self.parts


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_checkpoint(make(), tmp_path / "ckpt-0", False)
    return tmp_path / "ckpt-0"


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (lambda flag: Runs(os.system, f"touch {flag}"), r"posix\.system"),
        (lambda flag: Runs(eval, f"open({str(flag)!r}, 'w')"), r"__builtin__\.eval|builtins\.eval"),
        (lambda flag: Runs(getattr, np.ndarray, "tofile"), r"__builtin__\.getattr|builtins\.getattr"),
        (lambda flag: Runs(exec, f"open({str(flag)!r}, 'w')"), r"__builtin__\.exec|builtins\.exec"),
        (lambda flag: Runs(np.load, str(flag)), r"numpy\.load"),
        (lambda flag: Runs(np.dtype, Runs(os.system, f"touch {flag}")), r"posix\.system"),
        (
            lambda flag: np.array([Runs(os.system, f"touch {flag}")], dtype=object),
            r"posix\.system|EMPTY_LIST|_codecs\.encode",
        ),
        (lambda flag: QuantizedWeight8bit, r"QuantizedWeight8bit"),
    ],
    ids=["os.system", "eval", "getattr", "exec", "numpy.load", "nested", "object array", "another module"],
)
def test_code_is_refused_by_name_and_does_not_run(content: Any, name: str, checkpoint: Path, tmp_path: Path) -> None:
    flag = tmp_path / "it ran"
    for protocol in (4, 2):
        data = pickle.dumps(content(flag), protocol=protocol)
        (checkpoint / "tensor00003_000").write_bytes(data)
        with pytest.raises(UserError, match=rf"tensor00003_000: the pickle (asks for|has the inst).*({name}).*not run"):
            GrokCheckpoint(checkpoint, config())
    assert not flag.exists()
    if name.startswith("posix") and "|" not in name:  # negative control: loaded, it would have run
        pickle.loads(pickle.dumps(Runs(flag.touch)))  # noqa: S301 - our own
        assert flag.exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "is empty"),
        (lambda data: data[:40], "only 2 remain"),
        (lambda data: data[:53], "cut short"),
        (lambda data: data[:-100], "bytes where .* are left"),
        (lambda data: b"not a pickle at all", "instruction|cut short|no tensor"),
        (lambda data: data.replace(b"\x8c\x02f4", b"\x8c\x02f8"), "numbers of type 'f8'"),
        (lambda data: data.replace(b"\x8c\x02f4", b"\x8c\x02O8"), "numbers of type 'O8'"),
        (lambda data: data.replace(b"K0\x85", b"K1\x85"), "192 bytes for shape"),
        (lambda data: b"\x80\x04" + b"N0" * 2000, "instruction POP|more than 1000"),
        (lambda data: b"\x80\x04\x8e" + b"\xff" * 8 + b".", "bytes where 1 are left"),
        (lambda data: b"\x80\x04N.", "NoneType where an array"),
        (lambda data: pickle.dumps(np.zeros(47, "f4"), 4), r"has shape \[47\], expected \[48\]"),
        (lambda data: pickle.dumps(np.zeros(48, "i1"), 4), "is i1 without scales"),
        (lambda data: pickle.dumps(np.zeros(48, ">f4"), 4), "byte order '>'"),
        (lambda data: pickle.dumps(np.zeros((0, 48), "f4"), 4), "array of shape"),
    ],
)
def test_damage(damage: Any, message: str, checkpoint: Path) -> None:
    path = checkpoint / "tensor00001_000"  # the last norm, of 48 numbers
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises((CorruptFile, UserError), match=message):
        GrokCheckpoint(checkpoint, config())


@pytest.mark.usefixtures("their_modules")
def test_scales_that_do_not_fit(checkpoint: Path) -> None:
    weight = np.zeros((48, 32), "i1")  # a key projection
    for groups, columns in ((5, 32), (1, 31)):
        stored = QuantizedWeight8bit(weight, Bfloat16Array(torch.ones(groups, columns)))
        (checkpoint / "tensor00005_000").write_bytes(pickle.dumps(stored, 4))
        with pytest.raises(CorruptFile, match=r"tensor00005_000 \(key\) is i1 \[48, 32\] with scales bfloat16"):
            GrokCheckpoint(checkpoint, config())


def test_files_missing_or_left_over(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder .*ckpt-1; give the release's folder"):
        GrokCheckpoint(tmp_path / "ckpt-1")
    with pytest.raises(CorruptFile, match=r"missing tensor00134_000.* and 628 more; .* 64 layers has 770 files"):
        GrokCheckpoint(checkpoint)
    (checkpoint / "tensor00134_000").write_bytes(b"x")
    with pytest.raises(CorruptFile, match="left over tensor00134_000; a checkpoint of 11 layers has 134 files"):
        GrokCheckpoint(checkpoint, config())


@pytest.mark.usefixtures("their_modules")
def test_2000_mutations_give_an_answer_or_a_clear_error(tmp_path: Path) -> None:
    """Bytes changed, cut out, doubled and exchanged: never another exception, never code, never an unchecked size."""
    weight = torch.arange(48.0).view(16, 3)
    stored, _ = quantized(weight, 8)
    good = [pickle.dumps(weight.numpy(), 4), pickle.dumps(stored, 4)]
    rng, path, outcomes = np.random.default_rng(5), tmp_path / "tensor00000_000", {True: 0, False: 0}
    for number in range(2000):
        data = bytearray(good[number % 2])
        for _ in range(rng.integers(1, 4)):
            at, other, what = *rng.integers(0, len(data), 2), rng.integers(0, 4)
            if what == 0:
                data[at] = rng.integers(0, 256)
            elif what == 1:
                del data[at : at + rng.integers(1, 9)]
            elif what == 2:
                data[at:at] = data[other : other + rng.integers(1, 30)]
            else:
                data[at], data[other] = data[other], data[at]
        path.write_bytes(bytes(data))
        try:
            arrays = [array for array in _read_layout(path) if array is not None]
            assert all(0 <= array.offset <= len(data) for array in arrays)
            assert all(_values(path, array, None).numel() <= len(data) for array in arrays)
            outcomes[True] += 1
        except (UserError, CorruptFile):
            outcomes[False] += 1
    print(outcomes)
    assert min(outcomes.values()) > 100  # damage to the numbers themselves cannot be seen
