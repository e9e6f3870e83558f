"""A GGUF file, read as if it were a Hugging Face model folder."""

import functools
import mmap
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lalia.errors import CorruptFile, UserError
from lalia.formats.gguf.architectures import IGNORED, SYNONYMS, Architecture, known_architecture, pattern
from lalia.formats.gguf.config_in import config_values
from lalia.formats.gguf.container import REMEDY, Container, StoredTensor, map_file, parse
from lalia.formats.gguf.kinds import KINDS, dequantize


class _Source(NamedTuple):
    """Where the values of one of the model folder's tensors are.

    Attributes:
        expert: which slice of a 3-D tensor, None for the whole of another.
        swapped_heads: heads whose rotary pairs change from neighbours to halves, 0 for none.
        offset: what is subtracted.
    """

    stored: StoredTensor
    expert: int | None = None
    swapped_heads: int = 0
    transposed: bool = False
    offset: float = 0.0


class GGUFFile:
    """An open GGUF file: config, tensors under Hugging Face names, tokenizer metadata.

    The file is mapped, so opening costs its header only. It must not be overwritten in place while it is open.

    Attributes:
        path: of the file.
        metadata: plain values; an array of strings is a list, of numbers or flags a numpy array.
        chat_template: Jinja source, None if the file has none.
    """

    def __init__(self, path: Path | str) -> None:
        """
        Raises:
            UserError: if there is no such file, or for what is not read: version, byte order, kinds of tensors.
            CorruptFile: if the file is no GGUF file, is cut short or contradicts itself.
        """
        self.path = Path(path)
        self._data: mmap.mmap = map_file(self.path)
        container: Container = parse(self._data, self.path)
        self.metadata: dict[str, Any] = container.metadata
        self._stored: dict[str, StoredTensor] = container.tensors
        template = self.metadata.get("tokenizer.chat_template")
        if template is not None and not isinstance(template, str):
            raise CorruptFile(f"{self.path}: tokenizer.chat_template is {type(template).__name__}, expected text")
        self.chat_template: str | None = template

    @functools.cached_property
    def architecture(self) -> Architecture:
        """What general.architecture names; UserError if it is not known."""
        try:
            return known_architecture(self.metadata.get("general.architecture"))
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None

    @property
    def where(self) -> str:
        """What messages call it."""
        return str(self.path)

    def config_values(self) -> dict[str, Any]:
        """Content of an equivalent config.json, in the spelling of transformers 5.

        Raises:
            UserError: for an architecture or setting that is not implemented.
            CorruptFile: for metadata that is missing or of another type.
        """
        return dict(self._config_values)

    @functools.cached_property
    def _config_values(self) -> dict[str, Any]:
        architecture = self.architecture
        shapes = {name: stored.shape for name, stored in self._stored.items()}
        divisors = self._stored.get("rope_freqs.weight")
        try:
            return config_values(
                self.metadata,
                architecture.name,
                shapes,
                None if divisors is None else self._read(_Source(divisors), None).float().numpy(),
            )
        except CorruptFile as error:
            raise CorruptFile(f"{self.path}: {error}; {REMEDY}") from None
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None

    @functools.cached_property
    def _sources(self) -> dict[str, _Source]:
        architecture = self.architecture
        sources: dict[str, _Source] = {}
        unknown = []
        for name, stored in self._stored.items():
            template, layer = pattern(name)
            if template in IGNORED:
                continue
            if template not in architecture.tensors:
                template = SYNONYMS.get(template, template)
            if template not in architecture.tensors:
                unknown.append(name)
                continue
            theirs = architecture.tensors[template].replace("#", str(layer))
            stacked = "%" in theirs
            # The rows of a bias are its values.
            transposed = template in architecture.transposed
            expected = (3,) if stacked else (2,) if transposed else (1, 2)
            if len(stored.shape) not in expected:
                raise CorruptFile(f"{self.path}: tensor {name} has shape {list(stored.shape)}; {REMEDY}")
            source = _Source(
                stored,
                swapped_heads=self._heads(name) if architecture.interleaved and architecture.is_rotated(name) else 0,
                transposed=transposed,
                offset=1.0 if architecture.norm_offset and architecture.is_norm(name) else 0.0,
            )
            each = range(stored.shape[0]) if stacked else [None]
            for expert in each:
                full = theirs.replace("%", str(expert))
                if full in sources:
                    raise CorruptFile(f"{self.path}: {name} and {sources[full].stored.name} are both {full}; {REMEDY}")
                sources[full] = source._replace(expert=expert)
        if unknown:
            listed = ", ".join(unknown[:8]) + (f" and {len(unknown) - 8} more" if len(unknown) > 8 else "")
            raise UserError(f"{self.path}: tensors that architecture {architecture.name!r} does not have: {listed}")
        return sources

    def _heads(self, name: str) -> int:
        """Heads of a query or key tensor, checked against its rows."""
        values = self._config_values
        heads = values["num_attention_heads" if ".attn_q." in name else "num_key_value_heads"]
        shape = self._stored[name].shape
        if shape[0] % (2 * heads):
            raise CorruptFile(
                f"{self.path}: {name} has shape {list(shape)}, which {heads} heads do not divide; {REMEDY}"
            )
        return heads

    def _source(self, name: str) -> _Source:
        if name not in self._sources:
            raise UserError(f"{self.path} has no tensor {name}")
        return self._sources[name]

    def names(self) -> list[str]:
        """The Hugging Face names of the tensors.

        Raises:
            UserError: for an unknown architecture, or naming tensors that it does not have.
        """
        return list(self._sources)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor as the model folder has it."""
        source = self._source(name)
        shape = source.stored.shape if source.expert is None else source.stored.shape[1:]
        return shape[::-1] if source.transposed else shape

    def kind(self, name: str) -> str:
        """Kind of a tensor's data: "F32", "Q4_1" and so on."""
        return self._source(name).stored.kind.name

    def tensor(self, name: str, out: Tensor | None = None) -> Tensor:
        """Values of a tensor as the model folder has it.

        Args:
            out: contiguous, of the tensor's shape and any float dtype: is filled, without another copy of the values
                in memory, and returned.

        Returns:
            Without `out`: float32 if the tensor is quantized, else of the file's own float type, and then perhaps a
            view of the mapped file.
        """
        return self._read(self._source(name), out)

    def release_pages(self) -> None:
        """Let the system take back the memory of what was read of the mapped file; it is read again where needed."""
        self._data.madvise(mmap.MADV_DONTNEED)

    def blocks(self, name: str) -> tuple[str, Tensor]:
        """The kind and the bytes of a tensor as they are in the file, rows in the order of the model folder.

        Returns:
            kind, uint8 (rows, bytes of a row); a vector is one row.

        Raises:
            UserError: for a tensor that the model folder stores transposed, or whose values differ.
        """
        source = self._source(name)
        if source.transposed or source.offset:
            raise UserError(f"{name} differs from the file's {source.stored.name} by more than the order of its rows")
        return source.stored.kind.name, self._blocks(source)

    def _blocks(self, source: _Source) -> Tensor:
        stored = source.stored
        num_rows = 1
        for size in stored.shape[:-1]:
            num_rows *= size
        start, num_bytes = stored.start, stored.num_bytes
        if source.expert is not None:
            num_rows, num_bytes = num_rows // stored.shape[0], num_bytes // stored.shape[0]
            start += source.expert * num_bytes
        blocks = torch.frombuffer(self._data, dtype=torch.uint8, count=num_bytes, offset=start).view(num_rows, -1)
        if source.swapped_heads:
            vector = len(stored.shape) == 1
            rows = blocks.view(stored.shape[0], -1) if vector else blocks  # a bias is plain numbers
            rows = rows.view(source.swapped_heads, -1, 2, rows.shape[1]).transpose(1, 2)
            blocks = rows.reshape(num_rows, -1)
        return blocks

    def _read(self, source: _Source, out: Tensor | None) -> Tensor:
        stored = source.stored
        kind, blocks = KINDS[stored.kind.name], self._blocks(source)
        shape = stored.shape if source.expert is None else stored.shape[1:]
        changed = source.transposed or bool(source.offset)
        if out is not None and not changed:
            assert out.shape == shape and out.is_contiguous(), (out.shape, shape)
            dequantize(kind, blocks, out.view(blocks.shape[0], -1))
            return out
        if kind.dtype is not None:
            aligned = blocks.data_ptr() % kind.dtype.itemsize == 0
            values = (blocks if aligned else blocks.clone()).view(kind.dtype).view(shape)
        else:
            values = torch.empty(shape)
            dequantize(kind, blocks, values.view(blocks.shape[0], -1))
        if source.offset:
            values = values.float() - source.offset
        if source.transposed:
            values = values.T
        return values if out is None else out.copy_(values)
