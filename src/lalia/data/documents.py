"""Documents and the Parquet files they are kept in."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from lalia.errors import CorruptFile
from lalia.files import write_bytes

Split = Literal["train", "validation"]

SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "text", "source", "license", "language", "metadata")])

# One row group holds about this many bytes of text: far below the 2 GiB of a 32-bit Arrow string column, and small
# enough to read one group at a time.
ROW_GROUP_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True)
class Document:
    """A text with where it comes from and on what terms.

    For a play `metadata` is {"kind": "play", "title", "genre", "speakers": [...], "scenes": [{"act", "scene",
    "speeches": [[speaker, start, end], ...]}]} with character offsets: text[start:end] is the speech.
    """

    id: str
    text: str
    source: str
    license: str
    language: str
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return len(self.text) if self.text.isascii() else len(self.text.encode("utf-8", "surrogatepass"))


def documents_path(folder: Path, split: Split) -> Path:
    """The Parquet file of one split."""
    return folder / f"{split}.parquet"


def write_documents(folder: Path, split: Split, documents: Iterable[Document]) -> Path:
    """Write one split as zstd-compressed Parquet; the same documents in the same order give the same bytes."""
    sink = pa.BufferOutputStream()
    # No dictionary: looking for repeated texts costs time and finds none, and zstd shrinks the short columns.
    with pq.ParquetWriter(sink, SCHEMA, compression="zstd", use_dictionary=False) as writer:
        for group in _row_groups(documents):
            columns = {
                "id": [document.id for document in group],
                "text": [document.text for document in group],
                "source": [document.source for document in group],
                "license": [document.license for document in group],
                "language": [document.language for document in group],
                "metadata": [_to_json(document.metadata) for document in group],
            }
            writer.write_table(pa.table(columns, schema=SCHEMA))
    path = documents_path(folder, split)
    write_bytes(path, sink.getvalue().to_pybytes())
    return path


def read_documents(folder: Path, split: Split) -> list[Document]:
    """Read one split in the order in which it was written (by id).

    Raises:
        CorruptFile: if the file is missing or is not what `write_documents` writes.
    """
    path = documents_path(folder, split)
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise CorruptFile(f"{path} is missing; run the collect stage again") from None
    except (pa.ArrowException, OSError) as error:
        raise CorruptFile(f"{path} is damaged ({error}); delete its folder and run the collect stage again") from None
    if table.schema.names != SCHEMA.names:
        raise CorruptFile(
            f"{path} has columns {table.schema.names}, expected {SCHEMA.names}; run the collect stage again"
        )
    rows = zip(*(table.column(name).to_pylist() for name in SCHEMA.names), strict=True)
    return [Document(*row[:-1], metadata=json.loads(row[-1])) for row in rows]


def _to_json(metadata: dict[str, Any]) -> str:
    return json.dumps(metadata, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)


def _row_groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    group: list[Document] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document.text)
        if size >= ROW_GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group
