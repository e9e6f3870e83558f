"""A small writer of ONNX graphs: nodes one by one, weights straight from torch tensors into the file."""

import contextlib
import importlib.metadata
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

OPSET, IR_VERSION = 18, 9
"""Old enough for every onnxruntime since 1.15 and for the browsers' builds; LayerNormalization came with 17."""
MAX_INLINE_BYTES = 1_500_000_000
"""A protobuf message ends at 2 GiB; weights of more bytes go into a second file."""
ALIGNMENT = 4096
"""Offsets in the second file, so that it can be mapped."""
WEIGHTS_SUFFIX = "_data"
"""model.onnx has its weights in model.onnx_data, the name that transformers.js looks for."""

DTYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.int64: TensorProto.INT64,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
}


@dataclass(frozen=True)
class Value:
    """An input or output: name, dtype (such as "int64") and shape, dynamic dimensions by name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class Graph:
    """Nodes and weights of one graph, in the order of computation. Values are their names.

    `op("Add", a, b)` appends a node and gives the name of its output; operands may be names or Python numbers (a
    float becomes a float32 scalar, an int or a list of ints an int64 constant).
    """

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, Tensor] = {}
        self.inputs: list[Value] = []
        self.outputs: list[Value] = []
        self._constants: dict[tuple[str, Any], str] = {}

    def input(self, name: str, dtype: str, *shape: int | str) -> str:
        """Declare an input."""
        self.inputs.append(Value(name, dtype, shape))
        return name

    def output(self, name: str, value: str, dtype: str, *shape: int | str) -> None:
        """Declare an output."""
        self.nodes.append(helper.make_node("Identity", [value], [name]))
        self.outputs.append(Value(name, dtype, shape))

    def weight(self, name: str, value: Tensor) -> str:
        """A weight; the tensor is kept, not copied."""
        assert name not in self.weights
        self.weights[name] = value.detach()
        return name

    def op(self, kind: str, *operands: str | float | Sequence[int], **attributes: Any) -> str:
        """Append a node with one output."""
        return self.ops(1, kind, *operands, **attributes)[0]

    def ops(self, count: int, kind: str, *operands: str | float | Sequence[int], **attributes: Any) -> list[str]:
        """Append a node with `count` outputs."""
        names = [f"v{len(self.nodes)}_{i}" for i in range(count)]
        inputs = [operand if isinstance(operand, str) else self._constant(operand) for operand in operands]
        self.nodes.append(helper.make_node(kind, inputs, names, **attributes))
        return names

    def _constant(self, value: float | Sequence[int]) -> str:
        kind = type(value).__name__
        key = (kind, tuple(value) if isinstance(value, list | tuple) else value)
        if key not in self._constants:
            name = self._constants[key] = f"constant{len(self._constants)}"
            self.weights[name] = torch.tensor(value, dtype=torch.float32 if kind == "float" else torch.int64)
        return self._constants[key]

    def save(self, path: Path, metadata: dict[str, str], max_inline_bytes: int = MAX_INLINE_BYTES) -> list[Path]:
        """Write the graph; the files are whole or absent.

        Args:
            path: ends in .onnx.
            metadata: of the model, text by key.
            max_inline_bytes: weights of more bytes go into a file beside it, its name with "_data" appended.

        Returns:
            the files written.
        """
        data = path.with_name(path.name + WEIGHTS_SUFFIX)
        total = sum(value.numel() * value.element_size() for value in self.weights.values())
        split = total > max_inline_bytes
        with contextlib.ExitStack() as stack:
            # The weights first: a graph without them would be half a model.
            sink = stack.enter_context(_new_file(data)) if split else None
            initializers = [self._tensor(name, value, sink, data.name) for name, value in self.weights.items()]
            stack.enter_context(_new_file(path)).write(self._model(initializers, metadata).SerializeToString())
        if not split:
            data.unlink(missing_ok=True)
        return [path, data] if split else [path]

    def _tensor(self, name: str, value: Tensor, sink: IO[bytes] | None, location: str) -> TensorProto:
        array = value.to("cpu").contiguous().numpy()
        tensor = TensorProto(name=name, data_type=DTYPES[value.dtype], dims=value.shape)
        if sink is None or array.nbytes < 1024:
            tensor.raw_data = array.tobytes()
            return tensor
        sink.write(bytes(-sink.tell() % ALIGNMENT))
        tensor.data_location = TensorProto.EXTERNAL
        for key, entry in (("location", location), ("offset", sink.tell()), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(entry))
        sink.write(np.ascontiguousarray(array).data)
        return tensor

    def _model(self, initializers: list[TensorProto], metadata: dict[str, str]) -> onnx.ModelProto:
        def info(value: Value) -> onnx.ValueInfoProto:
            kind = helper.np_dtype_to_tensor_dtype(np.dtype(value.dtype))
            return helper.make_tensor_value_info(value.name, kind, value.shape)

        graph = helper.make_graph(
            self.nodes, "lalia", [info(v) for v in self.inputs], [info(v) for v in self.outputs], initializers
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="lalia",
            producer_version=importlib.metadata.version("lalia"),
        )
        helper.set_model_props(model, metadata)
        return model


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[IO[bytes]]:
    """A temporary neighbour, fsynced and renamed at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
