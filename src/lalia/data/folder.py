"""The user's own texts: a file or a folder of .txt, .md, .jsonl and .parquet files."""

import codecs
import difflib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lalia.data.config import DataConfig
from lalia.data.documents import Document
from lalia.data.sources import Inputs
from lalia.errors import UserError
from lalia.files import sha256_file

_COLUMNS = ("text", "id", "source", "license", "language", "metadata")

# Longest first: the UTF-32 mark begins with that of UTF-16.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)

_SKIP_REMEDY = 'remove the file, or drop such files with data.on_bad_file="skip"'

# Documents stay in memory until they are split; text, cleaned text and the encoded output coexist for a while.
_MEMORY_PER_INPUT_BYTE = {".parquet": 10}
_DEFAULT_MEMORY_PER_INPUT_BYTE = 3


class BadFile(UserError):
    """A file that cannot be read as text: damaged, binary, or not UTF-8. data.on_bad_file decides what follows."""


def read_folder(config: DataConfig) -> Inputs:
    """Read all texts under config.path, files in the order of their paths.

    Raises:
        UserError: if the path is missing or holds no readable text, a row is malformed, or (unless
            on_bad_file="skip") a file is damaged, binary or not UTF-8.
    """
    inputs = Inputs(str(config.path))
    root, files = list_files(config, inputs)
    _check_memory(files)
    for path in files:
        name = path.relative_to(root).as_posix()
        try:
            _check_name(name)
            digest, documents = READERS[path.suffix.lower()](path, name, config, inputs)
        except BadFile as error:
            if config.on_bad_file == "error":
                raise
            inputs.bad_files.append({"path": ascii(name)[1:-1], "problem": str(error)})
            continue
        inputs.files.append({"path": name, "bytes": path.stat().st_size, "sha256": digest})
        inputs.documents.extend(documents)
    check_ids(inputs.documents)
    return inputs


def folder_fingerprint(config: DataConfig) -> list[Any]:
    """Path, size and modification time of every file that `read_folder` would read."""
    root, files = list_files(config, Inputs(""))
    stats = [(path.relative_to(root).as_posix(), path.stat()) for path in files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def list_files(config: DataConfig, inputs: Inputs) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the files to read, sorted; counts the others in inputs.skipped.

    Raises:
        UserError: if the path is missing, is a file of an unknown kind, or holds no file of a known kind.
    """
    known = ", ".join(READERS)
    path = Path(str(config.path)).expanduser()
    try:
        if not path.exists():
            raise UserError(
                f"data.path {str(path)!r} does not exist (seen from {Path.cwd()}); give an existing file or folder"
            )
        if not path.is_dir():
            if path.suffix.lower() not in READERS:
                raise UserError(f"data.path {str(path)!r} is not one of {known}; convert it to plain text (.txt)")
            return path.parent, [path]
        files = []
        for file, reason in sorted(_walk(path, set())):
            if reason is None:
                files.append(file)
            else:
                inputs.skipped[reason] += 1
    except OSError as error:
        raise UserError(f"cannot read {error.filename} ({error.strerror}); make it readable (chmod u+rX)") from None
    if not files:
        found = "; ".join(f"{count} {reason}" for reason, count in sorted(inputs.skipped.items())) or "it is empty"
        raise UserError(f"data.path {str(path)!r} holds no {known} file ({found}); add texts in one of these forms")
    return path, files


def _walk(folder: Path, seen: set[str]) -> Iterator[tuple[Path, str | None]]:
    """Files below `folder`, each with the reason for not reading it, or None. Links are followed, loops are not."""
    real = os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    with os.scandir(folder) as entries:
        for entry in entries:
            path = folder / entry.name
            if entry.name.startswith("."):
                yield path, "hidden (name begins with a dot)"
            elif entry.is_dir() and (path / "run.lock").exists():
                yield path, "a run folder of Lalia (holds run.lock)"
            elif entry.is_dir():
                yield from _walk(path, seen)
            elif not entry.is_file():
                yield path, "not a regular file (broken link, socket, pipe)"
            elif path.suffix.lower() not in READERS:
                yield path, f"of unknown kind ({path.suffix.lower() or 'no suffix'})"
            else:
                yield path, None


def decode(content: bytes, name: str) -> str:
    """Decode UTF-8, or UTF-8/16/32 with a byte order mark.

    Raises:
        BadFile: naming the file, the byte offset and the remedy.
    """
    mark, encoding = next(((m, e) for m, e in _BYTE_ORDER_MARKS if content.startswith(m)), (b"", "utf-8"))
    if encoding == "utf-8" and (offset := content.find(b"\0")) >= 0:
        raise BadFile(f"{name} is binary (or UTF-16 without a byte order mark): NUL at byte {offset}; {_SKIP_REMEDY}")
    try:
        # Through a view: the mark is not copied away, and offsets in the error count from behind it.
        return str(memoryview(content)[len(mark) :], encoding)
    except UnicodeDecodeError as error:
        offset = error.start + len(mark)
        value = content[offset : offset + 1].hex()
        raise BadFile(
            f"{name} is not valid {encoding.upper()}: byte 0x{value} at byte {offset}; convert it (iconv -f "
            f'LATIN1 -t UTF-8, with its real encoding), or drop such files with data.on_bad_file="skip"'
        ) from None


def _read_text(path: Path, name: str, config: DataConfig, inputs: Inputs) -> tuple[str, list[Document]]:
    content = _read_bytes(path, name)
    digest = hashlib.sha256(content).hexdigest()
    row = {"text": decode(content, name)}
    return digest, [_document(row, name, name, config, name)]


def _read_jsonl(path: Path, name: str, config: DataConfig, inputs: Inputs) -> tuple[str, list[Document]]:
    content = _read_bytes(path, name)
    documents = []
    for number, line in enumerate(decode(content, name).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{name} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not valid JSON ({error}); put one object per line, or mend it") from None
        if not isinstance(row, dict):
            raise UserError(f'{where} holds {_kind(row)}, expected an object such as {{"text": "..."}}')
        _require_text(row, where)
        inputs.ignored_columns.update(row.keys() - set(_COLUMNS))
        documents.append(_document(row, f"{name}#{number:06d}", name, config, where))
    return hashlib.sha256(content).hexdigest(), documents


def _read_parquet(path: Path, name: str, config: DataConfig, inputs: Inputs) -> tuple[str, list[Document]]:
    documents = []
    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            _require_text(dict.fromkeys(columns), name)
            inputs.ignored_columns.update(set(columns) - set(_COLUMNS))
            wanted = [column for column in columns if column in _COLUMNS]
            rows = (row for batch in file.iter_batches(columns=wanted) for row in batch.to_pylist())
            for number, row in enumerate(rows):
                documents.append(_document(row, f"{name}#{number:06d}", name, config, f"{name} row {number}"))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise BadFile(f"{name} is not a readable Parquet file ({error}); {_SKIP_REMEDY}") from None
    return sha256_file(path), documents


Reader = Callable[[Path, str, DataConfig, Inputs], tuple[str, list[Document]]]
READERS: dict[str, Reader] = {".txt": _read_text, ".md": _read_text, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _read_bytes(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadFile(
            f"cannot read {name} ({error.strerror}); make it readable (chmod u+r), or {_SKIP_REMEDY}"
        ) from None


def _require_text(keys: Iterable[str], where: str) -> None:
    keys = list(keys)
    if "text" in keys:
        return
    nearest = difflib.get_close_matches("text", [str(key).lower() for key in keys], n=1, cutoff=0.4)
    original = next((key for key in keys if nearest and str(key).lower() == nearest[0]), None)
    hint = f'rename {original!r} to "text"' if original else f"keys here: {', '.join(map(repr, keys)) or 'none'}"
    raise UserError(f'{where} has no "text"; {hint}')


def _document(row: dict[str, Any], default_id: str, name: str, config: DataConfig, where: str) -> Document:
    text = row.get("text")
    if text is not None and not isinstance(text, str):
        raise UserError(f'{where}: "text" is {_kind(text)}, expected a string')
    return Document(
        id=_string(row, "id", default_id, where),
        text=text or "",
        source=_string(row, "source", name, where),
        license=_string(row, "license", config.license, where),
        language=_string(row, "language", config.language, where),
        metadata=_metadata(row.get("metadata"), where),
    )


def _string(row: dict[str, Any], key: str, default: str, where: str) -> str:
    value = row.get(key)
    if value is None or value == "":
        return default
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise UserError(f'{where}: "{key}" is {_kind(value)}, expected a string')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f'{where}: "{key}" = {value!a} is not valid Unicode; use another {key}') from None
    return value


def _metadata(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except ValueError as error:
            raise UserError(f'{where}: "metadata" is not valid JSON ({error}); give an object') from None
    if not value:
        return {}
    if not isinstance(value, dict):
        raise UserError(f'{where}: "metadata" is {_kind(value)}, expected an object')
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", bytes: "binary", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _check_name(name: str) -> None:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise BadFile(f"the file name {name!a} is not valid UTF-8; rename the file") from None


def check_ids(documents: list[Document]) -> None:
    """Ids decide the split and must be unique.

    Raises:
        UserError: naming an id that stands twice and both places.
    """
    sources: dict[str, str] = {}
    for document in documents:
        if document.id in sources:
            raise UserError(
                f"the id {document.id!r} stands twice (in {sources[document.id]} and {document.source}); ids decide "
                'the split and must be unique: rename one, or leave "id" out and it is made from file and line'
            )
        sources[document.id] = document.source


def _check_memory(files: list[Path]) -> None:
    """Refuse at once what would end in an out-of-memory kill after minutes."""
    total = sum(path.stat().st_size for path in files)
    needed = sum(
        path.stat().st_size * _MEMORY_PER_INPUT_BYTE.get(path.suffix.lower(), _DEFAULT_MEMORY_PER_INPUT_BYTE)
        for path in files
    )
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > available:
        raise UserError(
            f"data.path holds {total / 2**30:.1f} GiB in {len(files)} files, and collecting them may need "
            f"{needed / 2**30:.1f} GiB of memory of {available / 2**30:.1f} GiB; give a smaller folder"
        )
