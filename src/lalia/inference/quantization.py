"""Weights as 4- or 8-bit integers in groups, for generating on a CPU: less memory, and less to read for each token.

Each group of 32 (or 64, 128) consecutive weights of a row has a scale and an offset: w = scale * code + offset. The
products are PyTorch's int4 kernel, `aten::_weight_int4pack_mm_for_cpu`, which multiplies bfloat16 activations by
scale * (code - 8) + zero in float32, with scale and zero in bfloat16. An 8-bit code is two 4-bit ones,
16 * high + low, whose matrices stand side by side, so that the same kernel serves both; tests/inference/
test_quantization.py holds both to the plain product with the dequantised weights.

A quantised weight keeps its place in the `Transformer`: it is a parameter without values of its own, which computes
`F.linear` and `F.embedding` from its codes and refuses everything else, training above all.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lalia.errors import UserError
from lalia.formats.gguf.file import GGUFFile
from lalia.formats.gguf.groups import EXACT, codes_of
from lalia.formats.gguf.kinds import KINDS
from lalia.formats.weights import Reader, TensorSource
from lalia.model.families.family import Piece
from lalia.model.transformer import Transformer

BITS = {"int8": 8, "int4": 4}
INT4_GROUP = 32
INT8_GROUPS = (128, 64, 32)
"""The largest that divides a row."""
ROWS_MULTIPLE = 16
"""Rows of a packed matrix: the kernel takes no others."""
FEW_ROWS = {4: 4, 8: 2}
"""Up to so many activations at a time the int4 kernel is faster than bfloat16 products, measured on AMD Zen 4."""
COPY_LIMIT_BYTES = 1 << 30
"""Models that take more than this in bfloat16 get no copy in it: memory matters more there than fast prompts."""
CHUNK_ROWS = 4096
# The operator itself: looking it up in torch.ops takes as long as a small operation.
_int4_product = torch.ops.aten._weight_int4pack_mm_for_cpu.default
QUANTIZED = re.compile(
    r"embedding\.weight|head\.weight|layers\.\d+\.(attention\.(qkv|output)|feed_forward\.(up|down))(\.weight)?"
)
"""Parameters that are quantised: everything a token's forward pass reads in bulk."""


@dataclass
class Groups:
    """A matrix of integer codes with a scale and an offset for each group of a row.

    Attributes:
        codes: (rows, columns) uint8, below 2 ** bits.
        scale, offset: (rows, columns / group) float32; w = scale * code + offset.
        bits: 4 or 8.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor
    bits: int

    @property
    def group(self) -> int:
        return self.codes.shape[1] // self.scale.shape[1]

    def dequantized(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """(rows, columns) float32"""
        codes = self.codes[rows]
        values = codes.view(*codes.shape[:-1], -1, self.group).float()
        return values.mul_(self.scale[rows].unsqueeze(-1)).add_(self.offset[rows].unsqueeze(-1)).view(codes.shape)

    def num_bytes(self) -> int:
        """Of codes packed at their bits, and of scales and offsets as the kernel has them, in bfloat16."""
        # For 8 bits the kernel takes two scales and two offsets of each group, one for each half of the code.
        return self.codes.numel() * self.bits // 8 + self.scale.numel() * self.bits

    @staticmethod
    def concatenated(parts: Sequence["Groups"]) -> "Groups":
        """One matrix below the other. Four-bit codes among eight-bit ones become the middle ones of those."""
        assert len({part.group for part in parts}) == 1
        if len({part.bits for part in parts}) > 1:
            parts = [
                part if part.bits == 8 else Groups(part.codes + 120, part.scale, part.offset - 120 * part.scale, 8)
                for part in parts
            ]
        codes, scale, offset = (torch.cat([getattr(p, name) for p in parts]) for name in ("codes", "scale", "offset"))
        return Groups(codes, scale, offset, parts[0].bits)


def quantize(weight: Tensor, bits: int, group: int | None = None) -> Groups:
    """Round a matrix to 4 bits between the least and the largest of each group, or to 8 bits around zero.

    Args:
        weight: (rows, columns), any float dtype.
        bits: 4 or 8.
        group: weights that share a scale; None means 32 for 4 bits, and 128, 64 or 32 for 8.

    Raises:
        UserError: if the weights hold NaN or infinity.
    """
    columns = weight.shape[1]
    group = group or (INT4_GROUP if bits == 4 else next(g for g in INT8_GROUPS if columns % g == 0))
    assert columns % group == 0 and bits in (4, 8)
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    scales, offsets = [], []
    for start in range(0, len(weight), CHUNK_ROWS):
        values = weight[start : start + CHUNK_ROWS].detach().float().view(-1, columns // group, group)
        low, high = values.amin(-1), values.amax(-1)
        if not bool((low.isfinite() & high.isfinite()).all()):
            raise UserError("the weights hold NaN or infinity: they cannot be quantised; use an earlier checkpoint")
        # Scale and zero as the kernel has them, in bfloat16, so that the codes are the nearest to what it computes.
        if bits == 4:
            scale = ((high - low) / 15).bfloat16().float()
            zero = (low + 8 * scale).bfloat16().float()
        else:
            scale = (torch.maximum(high, -low) / 127).bfloat16().float()
            zero = torch.zeros_like(scale)
        middle = 2 ** (bits - 1)
        divisor = torch.where(scale == 0, 1.0, scale).unsqueeze(-1)
        code = ((values - zero.unsqueeze(-1)) / divisor).round_().add_(middle).clamp_(0, 2**bits - 1)
        codes[start : start + CHUNK_ROWS] = code.view(-1, columns)
        scales.append(scale)
        offsets.append(zero - middle * scale)
    return Groups(codes, torch.cat(scales), torch.cat(offsets), bits)


class QuantizedLinear:
    """x W^T (+ b) with W in groups of codes.

    Few rows of x take the int4 kernel, which reads a quarter of what bfloat16 would; more rows take a bfloat16 copy of
    W, if there is one, because then arithmetic counts and not memory.

    Attributes:
        num_bytes: read for one row of x.
        copy_bytes: of the copy.
    """

    def __init__(self, groups: Groups, copy: bool = False) -> None:
        rows, columns = groups.codes.shape
        self.shape, self.group, self.bits = (rows, columns), groups.group, groups.bits
        padded = -rows % ROWS_MULTIPLE
        planes = 1 if groups.bits == 4 else 2
        self.packed = torch.empty(rows + padded, planes * columns // 2, dtype=torch.uint8)
        for start in range(0, rows, CHUNK_ROWS):  # the kernel's packing takes codes as int32
            code = groups.codes[start : start + CHUNK_ROWS]
            if planes == 2:
                code = torch.cat((code >> 4, code & 15), 1)
            code = F.pad(code, (0, 0, 0, padded if start + CHUNK_ROWS >= rows else 0)).int()
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(code, 2)
            self.packed[start : start + len(code)] = packed
        scale = groups.scale.bfloat16().float()
        zero = (groups.offset + 8 * groups.scale).bfloat16()
        if planes == 2:  # 16 * high + low = 16 * (high - 8) + (low - 8) + 136
            zero = (groups.offset + 136 * groups.scale).bfloat16()
            scale, zero = torch.cat((16 * scale, scale), 1), torch.cat((zero, torch.zeros_like(zero)), 1)
        pairs = F.pad(torch.stack((scale.bfloat16(), zero), -1), (0, 0, 0, 0, 0, padded))  # (rows, groups, 2)
        self.scales = pairs.transpose(0, 1).contiguous()  # (groups, rows, 2)
        self.num_bytes = self.packed.numel() + 2 * self.scales.numel()
        self.few_rows = FEW_ROWS[groups.bits]
        self.copy, self.copy_bytes = None, 0
        if copy and _multiplies_bfloat16():
            values = torch.empty(rows, columns, dtype=torch.bfloat16)
            for start in range(0, rows, CHUNK_ROWS):
                values[start : start + CHUNK_ROWS] = groups.dequantized(slice(start, start + CHUNK_ROWS))
            self.copy = torch.ops.mkldnn._reorder_linear_weight(values, 16)
            self.copy_bytes = values.nbytes

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(rows, columns of W) -> (rows, rows of W) in the dtype of x."""
        half = x.bfloat16()
        if self.copy is not None and x.shape[0] > self.few_rows:
            out = torch.ops.mkldnn._linear_pointwise(half, self.copy, None, "none", [], "")
        else:
            out = self._few(half)
        out = out.float() if x.dtype == torch.float32 else out.to(x.dtype)
        return out if bias is None else out.add_(bias)

    def _few(self, x: Tensor) -> Tensor:
        if self.bits == 8:
            x = torch.cat((x, x), 1)
        out = _int4_product(x, self.packed, self.group, self.scales)
        return out if out.shape[1] == self.shape[0] else out[:, : self.shape[0]].contiguous()

    def dequantized(self) -> Tensor:
        """W as the kernel has it, (rows, columns) float32: the products with the unit vectors."""
        return torch.cat([self._few(rows).t() for rows in torch.eye(self.shape[1]).bfloat16().split(64)], 1).float()


def _multiplies_bfloat16() -> bool:
    """Whether the processor does, so that bfloat16 products are faster than float32 ones."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()


class QuantizedWeight(nn.Parameter):
    """A weight of a `Transformer` whose values are codes.

    For PyTorch it is a parameter on the meta device: shape without values.

    Attributes:
        kernel: the product with a vector; None for a weight of several experts and for one only looked up.
        groups: the codes; kept where rows are looked up, otherwise the packed ones of the kernel are enough.
        experts: one weight for each expert, for a weight of three dimensions.
        note: what the report says of it.
    """

    kernel: QuantizedLinear | None
    groups: Groups | None
    experts: "list[QuantizedWeight]"
    note: str

    def __new__(cls, *args: Any, **kwargs: Any) -> "QuantizedWeight":
        raise TypeError("use quantized_weight(...)")

    def num_bytes(self) -> int:
        """Of codes, scales and offsets."""
        if self.experts:
            return sum(expert.num_bytes() for expert in self.experts)
        if self.kernel is not None:
            return self.kernel.num_bytes
        assert self.groups is not None
        return self.groups.num_bytes()

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the matrix, as an embedding gives them: (...) -> (..., columns)."""
        assert self.groups is not None, "rows of this weight were not kept"
        return self.groups.dequantized(ids.reshape(-1)).to(dtype).view(*ids.shape, -1)

    def __iter__(self) -> Iterator[Tensor]:
        if not self.experts:
            raise UserError(_REFUSAL)
        return iter(self.experts)

    def __deepcopy__(self, memo: Any) -> Any:
        raise UserError(_REFUSAL)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UserError(_REFUSAL)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and not isinstance(args[0], QuantizedWeight):
            return _linear(*args, **kwargs)
        if func is F.embedding:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            return weight.rows(args[0], torch.float32)
        if func in (Tensor.to, Tensor.detach):  # its values have one dtype and one place
            return args[0]
        if func is Tensor.requires_grad_ and not any(args[1:]) and not kwargs.get("requires_grad"):
            return args[0]
        if func == _DEVICE:
            return torch.device("cpu")
        if func not in _HARMLESS:
            raise UserError(_REFUSAL)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


_REFUSAL = (
    "this model's weights are quantised, for generating only: they cannot be trained, saved or changed; load it "
    "without quantize="
)
_DEVICE = Tensor.device.__get__  # pyright: ignore[reportAttributeAccessIssue]
_HARMLESS = {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "is_meta", "requires_grad", "grad", "data", "is_leaf", "grad_fn", "ndim",
                 "_version", "layout", "is_sparse", "is_cuda")
    if hasattr(getattr(Tensor, name), "__get__")
} | {Tensor.numel, Tensor.size, Tensor.dim, Tensor.data_ptr, Tensor.nelement, Tensor.element_size, Tensor.__repr__,
     Tensor.__hash__, Tensor.is_floating_point, Tensor.is_complex, Tensor.__len__}  # fmt: skip


def _linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        raise UserError(_REFUSAL)
    assert weight.kernel is not None
    return weight.kernel(x.reshape(-1, x.shape[-1]), bias).view(*x.shape[:-1], -1)


def quantized_weight(
    groups: Groups | Sequence[Groups], lookup: bool, product: bool, copy: bool, note: str
) -> QuantizedWeight:
    """A parameter for a `Transformer`.

    Args:
        groups: of a matrix, or of one for each expert.
        lookup: whether rows are looked up (an embedding).
        product: whether it is multiplied (everything but an embedding that is not also the head).
        copy: whether to keep a bfloat16 copy too, which makes prompts and batches faster.
        note: what the report says of it.
    """
    several = [] if isinstance(groups, Groups) else list(groups)
    first = groups if isinstance(groups, Groups) else groups[0]
    shape = (len(several), *first.codes.shape) if several else first.codes.shape
    # Labelled bfloat16, the dtype of the kernel, so that nothing takes its float32 paths.
    weight = Tensor._make_subclass(QuantizedWeight, torch.empty(shape, dtype=torch.bfloat16, device="meta"), False)
    assert isinstance(weight, QuantizedWeight)
    weight.experts = [quantized_weight(each, lookup, product, copy, note) for each in several]
    weight.groups = first if lookup and not several else None
    weight.kernel = QuantizedLinear(first, copy) if product and not several else None
    weight.note = note
    return weight


def quantize_model(model: Transformer, how: str) -> list[dict[str, Any]]:
    """Replace a model's matrices by quantised ones, in place; already quantised ones stay as they are.

    Returns:
        The report of `quantization_report`.

    Raises:
        UserError: on another word than int8 or int4, or on weights that hold NaN.
    """
    bits = bits_of(how)
    for name, weight in list(model.named_parameters()):
        if not isinstance(weight, QuantizedWeight) and can_be_quantized(name, tuple(weight.shape)):
            matrices = list(weight.detach()) if weight.dim() == 3 else [weight.detach()]
            groups = [quantize(matrix, bits) for matrix in matrices]
            replace(model, name, make_weight(model, name, groups, f"int{bits} from {_name(weight.dtype)}"))
    return quantization_report(model)


def quantized_reader(source: TensorSource, how: str | None) -> Reader:
    """For `lalia.formats.weights.assemble`: reads the large matrices quantised, one at a time.

    A GGUF file's quantised tensors keep their own bits, codes and groups, whatever `how` says, if their kind is one of
    `lalia.formats.gguf.groups.EXACT`; others are rounded anew to int8. Weights in floating point are quantised as
    `how` says, and stay as they are for None.
    """
    bits = None if how is None else bits_of(how)

    def read(model: Transformer, name: str, pieces: Sequence[tuple[str, Piece]]) -> QuantizedWeight | None:
        shape = tuple(model.get_parameter(name).shape)
        if not can_be_quantized(name, shape):
            return None
        kinds = sorted({source.kind(stored) for stored, _ in pieces})
        coded = isinstance(source, GGUFFile) and any(KINDS[kind].dtype is None for kind in kinds)
        if not coded and bits is None:
            return None
        exact = isinstance(source, GGUFFile) and coded and not any(piece.transposed for _, piece in pieces)
        exact = exact and all(kind in EXACT for kind in kinds)
        matrices: list[list[Groups]] = [[] for _ in range(shape[0] if len(shape) == 3 else 1)]
        for stored, piece in pieces:
            if exact:
                assert isinstance(source, GGUFFile)
                groups = Groups(*codes_of(*source.blocks(stored)))
            else:
                values = source.tensor(stored)
                group = INT4_GROUP if coded else None
                groups = quantize(values.t() if piece.transposed else values, bits or 8, group)
            matrices[piece.start // shape[-2] if len(shape) == 3 else 0].append(groups)
        whole = [Groups.concatenated(parts) for parts in matrices]
        if isinstance(source, GGUFFile):
            source.release_pages()
        how_made = "as in the file" if exact else f"int{whole[0].bits} from {' and '.join(kinds)}"
        return make_weight(model, name, whole, f"{' and '.join(kinds)}, {how_made}" if exact else how_made)

    return read


def make_weight(model: Transformer, name: str, groups: Sequence[Groups], note: str) -> QuantizedWeight:
    """The quantised weight for the parameter `name`."""
    lookup = name == "embedding.weight"
    tied = model.config.head == "language_model" and model.config.tie_word_embeddings
    several = len(groups) > 1 or not name.endswith(".weight")
    c = model.config  # its count, because walking through all modules for each weight takes as long as reading them
    copy = 2 * c.num_matrix_parameters() <= COPY_LIMIT_BYTES
    return quantized_weight(groups if several else groups[0], lookup, not lookup or tied, copy, note)


def replace(model: Transformer, name: str, weight: nn.Parameter) -> None:
    """Put another parameter in the place of `name`."""
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, weight)


def bits_of(how: str) -> int:
    """4 or 8.

    Raises:
        UserError: naming the words there are.
    """
    if how not in BITS:
        raise UserError(f"quantize = {how!r}; expected {' or '.join(BITS)}, or None to compute as the weights are")
    return BITS[how]


def can_be_quantized(name: str, shape: Sequence[int]) -> bool:
    """Whether a parameter is one of the large matrices, with rows that are whole groups."""
    return QUANTIZED.fullmatch(name) is not None and shape[-1] % INT4_GROUP == 0


def is_quantized(model: Transformer) -> bool:
    return any(isinstance(weight, QuantizedWeight) for weight in model.parameters())


def quantization_report(model: Transformer) -> list[dict[str, Any]]:
    """What each weight is: name, shape, kind (int4, int8 or a float dtype), group, bytes, note.

    Weights that a quantised model keeps in floating point are listed too, with the reason.
    """
    rows = []
    for name, weight in model.named_parameters():
        shape = tuple(weight.shape)
        row: dict[str, Any] = {"name": name, "shape": shape}
        if isinstance(weight, QuantizedWeight):
            some = weight.experts[0] if weight.experts else weight
            part = some.kernel or some.groups
            assert part is not None
            row |= {"kind": f"int{part.bits}", "group": part.group, "bytes": weight.num_bytes(), "note": weight.note}
        else:
            why = "small"
            if QUANTIZED.fullmatch(name):
                whole = shape[-1] % INT4_GROUP == 0
                why = "" if whole else f"rows of {shape[-1]} are no multiple of {INT4_GROUP}"
            elif weight.dim() > 1:
                why = "not read in bulk"
            row |= {"kind": _name(weight.dtype), "group": None, "bytes": weight.nbytes, "note": why}
        rows.append(row)
    return rows


def weight_bytes(model: Transformer, dtype: torch.dtype) -> int:
    """Bytes of weights that one step of decoding reads, a tied head counted once."""
    return sum(
        weight.num_bytes() if isinstance(weight, QuantizedWeight) else weight.numel() * dtype.itemsize
        for weight in model.parameters()
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
