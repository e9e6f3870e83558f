"""The release of Grok-1: read its checkpoint and write it as a model folder.

The release (github.com/xai-org/grok-1, checkpoint.py and model.py) is a folder of files tensor00000_000,
tensor00001_000, ..., one per tensor, in the order in which JAX flattens a dictionary: keys sorted as text, so layer 10
stands before layer 2. Each file is a pickle of one numpy array, or of a QuantizedWeight8bit with an int8 `weight`
(..., in, out) and bfloat16 `scales` (..., groups, out), where each group of rows has a scale per column: one group
where the output was split over eight devices, eight where the input was.

A pickle may run code when it is loaded. Here none is loaded: `_read_layout` walks its instructions, admits the few that
describe such arrays, calls nothing, and gives their shapes, types and places in the file; the numbers are then read
from the mapped file.
"""

import math
import mmap
import pickletools
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lalia.errors import CorruptFile, UserError
from lalia.files import write_json
from lalia.formats.hf_folder import CONFIG, DTYPES, INDEX, MAX_SHARD_BYTES, WEIGHTS, write_tensors
from lalia.formats.weights import assemble, listed
from lalia.model.config import ModelConfig
from lalia.model.families import registry
from lalia.model.transformer import Transformer

GROK_1 = ModelConfig(
    family="grok-1",
    vocab_size=131_072,
    hidden_size=6144,
    num_hidden_layers=64,
    num_attention_heads=48,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=32_768,
    max_position_embeddings=8192,
    norm_eps=1e-5,
    norm_order="sandwich",
    embedding_multiplier=78.38367176906169,
    output_multiplier=0.5773502691896257,
    attention_softcap=30.0,
    activation="gelu_tanh",
    num_experts=8,
    num_experts_per_token=2,
    normalize_expert_weights=False,
)
"""The sizes and constants of the release (run.py there)."""

ENTRIES = (
    ("moe_block.experts.@.linear.weight", "gate"),
    ("moe_block.experts.@.linear_1.weight", "down"),
    ("moe_block.experts.@.linear_v.weight", "gate"),
    ("attn.k_proj.weight", "key"),
    ("attn.o_proj.weight", "output"),
    ("attn.q_proj.weight", "query"),
    ("attn.v_proj.weight", "key"),
    ("pre_attn_norm.scale", "norm"),
    ("post_attn_norm.scale", "norm"),
    ("pre_moe_norm.scale", "norm"),
    ("post_moe_norm.scale", "norm"),
    ("moe_block.gate.weight", "router"),
)
"""The files of a layer in their order: the weight's name in the model folder and which shape it has; @ is an expert.

Their names in the release: moe/linear, moe/linear_1, moe/linear_v, multi_head_attention/key, .../linear, .../query,
.../value, rms_norm, rms_norm_1, rms_norm_2, rms_norm_3, router.
"""


@dataclass(frozen=True)
class StoredArray:
    """An array in a file: `kind` is f4, i1 or bfloat16; its bytes, in C order, begin at `offset`."""

    kind: str
    shape: tuple[int, ...]
    offset: int


class GrokCheckpoint:
    """The release's folder as a `lalia.formats.weights.TensorSource`, its experts and projections one by one.

    All files are looked at when it is made (their beginnings, not their numbers); a tensor is read when asked for.
    """

    def __init__(self, folder: Path, config: ModelConfig = GROK_1) -> None:
        """`config` gives the sizes, which the release keeps in its program, not in its files.

        Raises:
            UserError: if the folder is not there, or holds a pickle of something else.
            CorruptFile: if files are missing, left over, cut short or of other shapes.
        """
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}; give the release's folder ckpt-0")
        self.where, self.config = str(folder), config
        self._arrays: dict[str, tuple[Path, StoredArray, StoredArray | None, int | None]] = {}
        shapes = _shapes(config)
        names = list(_names(config))
        paths = [folder / f"tensor{number:05d}_000" for number in range(len(names))]
        missing = [path.name for path in paths if not path.is_file()]
        left = sorted({path.name for path in folder.glob("tensor*")} - {path.name for path in paths})
        if missing or left:
            found = f"missing {listed(missing)}" if missing else f"left over {listed(left)}"
            raise CorruptFile(
                f"{folder}: {found}; a checkpoint of {config.num_hidden_layers} layers has {len(paths)} files, "
                f"{paths[0].name} to {paths[-1].name}"
            )
        problems = []
        for path, (name, kind) in zip(paths, names, strict=True):
            weight, scales = _read_layout(path)
            problems += _wrong(path, kind, weight, scales, shapes[kind])
            if "@" not in name:
                self._arrays[name] = path, weight, scales, None
            for expert in range(config.num_experts if "@" in name else 0):
                self._arrays[name.replace("@", str(expert))] = path, weight, scales, expert
        if problems:
            raise CorruptFile(f"{folder}: {'; '.join(problems[:4])}. Is this checkpoint of the sizes given?")

    def names(self) -> list[str]:
        """Names of all tensors, as in a model folder."""
        return list(self._arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor in the model folder's layout."""
        _, weight, _, expert = self._arrays[name]
        shape = weight.shape if expert is None else weight.shape[1:]
        return shape if _as_it_lies(name) else shape[::-1]

    def kind(self, name: str) -> str:
        """F32, or Q8 for integers with scales."""
        return "F32" if self._arrays[name][2] is None else "Q8"

    def tensor(self, name: str) -> Tensor:
        """The values in float32, (out, in)."""
        path, weight, scales, expert = self._arrays[name]
        values = _values(path, weight, expert)
        if scales is not None:
            factors = _values(path, scales, expert)  # (groups, out)
            groups, out = factors.shape
            values = (values.view(groups, -1, out) * factors[:, None]).view(-1, out)
        return values if _as_it_lies(name) else values.t()


def load_grok(checkpoint: Path, config: ModelConfig = GROK_1, dtype: torch.dtype = torch.float32) -> Transformer:
    """The model of the release's folder, in memory: 1.26 TB in float32 for the published sizes.

    Raises:
        UserError, CorruptFile: as `GrokCheckpoint`.
    """
    return assemble(config, GrokCheckpoint(checkpoint, config), dtype)


def convert_grok(
    checkpoint: Path,
    out: Path,
    config: ModelConfig = GROK_1,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the release's folder as a model folder, never holding more than one file of it in memory.

    config.json comes last, so a conversion that was interrupted is no model folder.

    Args:
        checkpoint: the folder ckpt-0.
        out: created if missing.
        dtype: of the weights on disk; bfloat16 holds what 8-bit integers times bfloat16 scales say to 0.2 %.
        max_shard_bytes: of one file, and of memory; the largest tensor, the embedding, has its own if it is larger.

    Raises:
        UserError, CorruptFile: as `GrokCheckpoint`.
    """
    source = GrokCheckpoint(checkpoint, config)
    shards = _shards(source, dtype.itemsize, max_shard_bytes)
    files = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    files = files if len(shards) > 1 else [WEIGHTS]
    for file, names in zip(files, shards, strict=True):
        write_tensors(out / file, {name: source.tensor(name).to(dtype).contiguous() for name in names})
    if len(shards) > 1:
        total = sum(math.prod(source.shape(name)) for name in source.names()) * dtype.itemsize
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    ids = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    kind = DTYPES[dtype]
    write_json(out / CONFIG, {**registry.to_hf(config), **ids, "dtype": kind, "torch_dtype": kind})


def _shards(source: GrokCheckpoint, itemsize: int, max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name in source.names():
        num_bytes = math.prod(source.shape(name)) * itemsize
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
    return shards


def _names(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """(name in the model folder, kind of shape) of each file."""
    yield "model.embed_tokens.weight", "embedding"
    yield "model.norm.scale", "norm"
    # The release calls them decoder_layer_0/..., and "/" sorts before any digit.
    for layer in sorted(range(config.num_hidden_layers), key=lambda number: f"{number}/"):
        for name, kind in ENTRIES:
            yield f"model.layers.{layer}.{name}", kind


def _shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape in the release of each kind of tensor, (in, out)."""
    return {
        "embedding": (c.vocab_size, c.hidden_size),
        "norm": (c.hidden_size,),
        "gate": (c.num_experts, c.hidden_size, c.intermediate_size),
        "down": (c.num_experts, c.intermediate_size, c.hidden_size),
        "key": (c.hidden_size, c.key_value_size),
        "query": (c.hidden_size, c.query_size),
        "output": (c.query_size, c.hidden_size),
        "router": (c.hidden_size, c.num_experts),
    }


def _as_it_lies(name: str) -> bool:
    return name.endswith((".scale", "embed_tokens.weight"))


def _wrong(path: Path, kind: str, weight: StoredArray, scales: StoredArray | None, shape: tuple[int, ...]) -> list[str]:
    """What is wrong with the arrays of a file, if anything."""
    if weight.shape != shape:
        return [f"{path.name} ({kind}) has shape {list(weight.shape)}, expected {list(shape)}"]
    if scales is None:
        return [] if weight.kind == "f4" else [f"{path.name} ({kind}) is {weight.kind} without scales, expected f4"]
    groups = scales.shape[-2] if len(scales.shape) == len(shape) else 0
    fits = (*shape[:-2], groups, shape[-1]) == scales.shape and groups > 0 and shape[-2] % groups == 0
    if len(shape) < 2 or not fits or weight.kind != "i1" or scales.kind not in ("f4", "bfloat16"):
        found = f"{weight.kind} {list(weight.shape)} with scales {scales.kind} {list(scales.shape)}"
        return [
            f"{path.name} ({kind}) is {found}; expected i1 {list(shape)} with scales [..., groups of rows, columns]"
        ]
    return []


def _values(path: Path, array: StoredArray, expert: int | None) -> Tensor:
    """An array, or one expert of it, in float32."""
    dtype = {"f4": "<f4", "i1": "i1", "bfloat16": "<u2"}[array.kind]
    mapped = np.memmap(path, dtype, "r", array.offset, array.shape)
    part = np.array(mapped if expert is None else mapped[expert])
    if array.kind == "bfloat16":
        return torch.from_numpy(part.view(np.int16)).view(torch.bfloat16).float()
    return torch.from_numpy(part).float()


# The pickle. What the instructions would make is described by these, and nothing is made.


@dataclass(frozen=True)
class _Name:
    text: str


@dataclass(frozen=True)
class _Bytes:
    """Bytes of the file that the pickle holds."""

    offset: int
    size: int


@dataclass
class _Made:
    """What calling `name` with `arguments` would give; `state` is what it would be filled with."""

    name: str
    arguments: Any
    state: Any = None


ARRAY = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
QUANTIZED = ("__main__.QuantizedWeight8bit", "model.QuantizedWeight8bit")
BFLOAT16 = ("ml_dtypes.bfloat16", "jaxlib.xla_extension.bfloat16")
ADMITTED = (*ARRAY, *QUANTIZED, *BFLOAT16, "numpy.ndarray", "numpy.dtype")
"""The names a pickle of the release may mention."""

_PUSHED = ("SHORT_BINUNICODE", "BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_BYTES = {"SHORT_BINBYTES": "<B", "BINBYTES": "<I", "BINBYTES8": "<Q"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
MAX_INSTRUCTIONS = 1000
"""A file of the release has about a hundred."""


def _read_layout(path: Path) -> tuple[StoredArray, StoredArray | None]:
    """The array of a file, or the integers and the scales of one.

    Raises:
        UserError: if the pickle asks for anything but such arrays, by name.
        CorruptFile: if it is cut short or makes no sense.
    """
    if path.stat().st_size == 0:
        raise CorruptFile(f"{path} is empty; copy the checkpoint again")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            made = _described(path, data)
            if isinstance(made, _Made) and made.name in QUANTIZED:
                state = made.state
                if not isinstance(state, dict) or state.keys() != {"weight", "scales"}:
                    raise ValueError(f"a QuantizedWeight8bit of {state!r}")
                return _array(state["weight"]), _array(state["scales"])
            return _array(made), None
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, struct.error) as error:
            if isinstance(error, UserError):
                raise
            raise CorruptFile(f"{path} is no tensor of the release ({error}); copy the checkpoint again") from None


def _described(path: Path, data: mmap.mmap) -> Any:
    """What the pickle would make."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    for _ in range(MAX_INSTRUCTIONS):
        opcode = _OPCODES.get(data.read(1))
        if opcode is None:
            raise ValueError("not a pickle, or cut short")
        name = opcode.name
        if name in _BYTES:
            (size,) = struct.unpack(_BYTES[name], data.read(struct.calcsize(_BYTES[name])))
            if size > len(data) - data.tell():
                raise ValueError(f"{size} bytes where {len(data) - data.tell()} are left")
            stack.append(_Bytes(data.tell(), size))
            data.seek(size, 1)
            continue
        argument: Any = None if opcode.arg is None else opcode.arg.reader(data)  # pyright: ignore[reportArgumentType]
        if name == "STOP":
            (made,) = stack
            return made
        if name in ("PROTO", "FRAME"):
            continue
        if name in _PUSHED:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            count = _TUPLES[name]
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "TUPLE":
            start = marks.pop()
            stack[start:] = [tuple(stack[start:])]
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "SETITEMS":
            start = marks.pop()
            stack[start - 1].update(zip(stack[start::2], stack[start + 1 :: 2], strict=True))
            del stack[start:]
        elif name == "SETITEM":
            key, value = stack[-2:]
            del stack[-2:]
            stack[-1][key] = value
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("STACK_GLOBAL", "GLOBAL"):
            parts = stack[-2:] if name == "STACK_GLOBAL" else str(argument).split(" ", 1)
            if name == "STACK_GLOBAL":
                del stack[-2:]
            stack.append(_admitted(path, ".".join(map(str, parts))))
        elif name in ("REDUCE", "NEWOBJ"):
            made = _Made(stack[-2].text, stack[-1])
            stack[-2:] = [made]
        elif name == "BUILD":
            stack[-2].state = stack[-1]
            del stack[-1]
        else:
            raise UserError(
                f"{path}: the pickle has the instruction {name}, which no tensor of the release needs; it was not run. "
                "Take the checkpoint from where it was published"
            )
    raise ValueError(f"more than {MAX_INSTRUCTIONS} instructions")


def _admitted(path: Path, name: str) -> _Name:
    if name not in ADMITTED:
        raise UserError(
            f"{path}: the pickle asks for {name}, which no tensor of the release needs; it was not run. Take the "
            "checkpoint from where it was published"
        )
    return _Name(name)


def _array(made: Any) -> StoredArray:
    """The array that _reconstruct followed by its state would be."""
    if not isinstance(made, _Made) or made.name not in ARRAY:
        raise ValueError(f"{type(made).__name__} where an array is expected")
    _, shape, dtype, fortran, content = made.state
    (what, *_) = dtype.arguments
    kind = "bfloat16" if isinstance(what, _Name) and what.text in BFLOAT16 else what
    order = dtype.state[1]
    sizes = {"f4": 4, "i1": 1, "bfloat16": 2}
    if dtype.name != "numpy.dtype" or not isinstance(kind, str) or kind not in sizes or order == ">":
        raise ValueError(f"numbers of type {kind!r}, byte order {order!r}; expected f4, i1 or bfloat16, little-endian")
    if fortran or not all(type(size) is int and 0 < size < 2**31 for size in shape):
        raise ValueError(f"an array of shape {shape!r}, Fortran order {fortran!r}")
    if math.prod(shape) * sizes[kind] != content.size:
        raise ValueError(f"{content.size} bytes for shape {list(shape)} of {kind}")
    return StoredArray(kind, tuple(shape), content.offset)
