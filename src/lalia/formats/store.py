"""The local model store: published models by name, so that `lalia chat smollm2` works from any folder.

    ~/.cache/lalia/models/          or $LALIA_HOME/models
      smollm2/                      README.md (the card), source.json, the model's files
      ORG--NAME/                    a model of the Hugging Face Hub, called ORG/NAME

A cache folder of the user, because a model is fetched once and used from everywhere, and because everything here can be
fetched again. Models trained here are elsewhere (runs/), and are called by their path.
"""

import contextlib
import datetime
import difflib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lalia.errors import CorruptFile, UserError
from lalia.files import read_json, replace_directory, sha256_file, write_json, write_text
from lalia.formats.known import PACKAGES
from lalia.progress import Progress

SOURCE, CARD = "source.json", "README.md"
LONGEST_NAME = 200
"""Characters of a model's name; the Hub allows 96, file systems 255 bytes for a folder."""
LONGEST_PATH = 4096
PART = r"[A-Za-z0-9](?:[A-Za-z0-9_]|[-.](?![-.]))*(?<![-.])"
NAME = re.compile(rf"({PART})(?:/({PART}))?(?:@({PART}))?")
"""NAME, ORG/NAME, either with @REVISION. As on the Hub, no "--" and no "..", so that ORG--NAME can be read back."""


@dataclass(frozen=True)
class Source:
    """Where a model in the store came from; source.json, and what its card says.

    Attributes:
        name: what the user calls it.
        title, origin, upstream: the model, what was fetched (with version or commit), who published it first.
        license: an SPDX name where one is known.
        fetched: date, YYYY-MM-DD in UTC.
        files: of each file of the model its size in bytes and hex SHA-256.
    """

    name: str
    title: str
    origin: str
    upstream: str
    license: str
    fetched: str
    files: Mapping[str, Mapping[str, Any]]


def store_folder() -> Path:
    """The folder of all models: `models` in $LALIA_HOME, else in ~/.cache/lalia. It need not exist."""
    return Path(os.environ.get("LALIA_HOME") or "~/.cache/lalia").expanduser().absolute() / "models"


def model_folder(name: str) -> Path:
    """The folder of a model in the store, whether or not it is there.

    Raises:
        UserError: if the name is none: empty, too long, with "..", a control character, or more than one slash.
    """
    bare = name.removeprefix("hf:")
    if not bare or len(bare) > LONGEST_NAME:
        raise UserError(f"a model name of {len(bare)} characters; expected 1 to {LONGEST_NAME}, such as smollm2")
    if not NAME.fullmatch(bare):
        raise UserError(
            f"{name!r} is no model name; expected NAME or ORG/NAME, with @REVISION if you like, of letters, digits and "
            "single . _ - between them"
        )
    return store_folder() / bare.replace("/", "--")


def find_model(model: str | os.PathLike[str]) -> Path:
    """The path of a model: an existing path first, then a name in the store.

    A path that does not exist is given back as it is, for the loader to say what is near it.

    Raises:
        UserError: if it is neither a possible path nor a name in the store (near names are offered, and the command
            that fetches it where that is known), or if a link leads out of the store.
    """
    text = os.fspath(model)
    if not text or len(text) > LONGEST_PATH or any(ord(character) < 32 for character in text):
        shown = f"a text of {len(text)} characters" if len(text) > LONGEST_PATH else repr(text)
        raise UserError(f"{shown} is no path and no name of a model; give a folder, or a name of `lalia models`")
    path = Path(os.path.expanduser(text))
    try:
        if path.exists():
            return path
    except OSError as error:
        raise UserError(f"cannot use {text[:80]!r} ({error.strerror}); give the path of a model folder") from None
    if not text.startswith("hf:") and not NAME.fullmatch(text):
        return path
    folder = model_folder(text)
    if folder.is_dir():
        return _inside(folder)
    if not text.startswith("hf:") and len(path.parts) > 1 and path.parent.is_dir():
        return path
    raise UserError(_unknown(text))


def stored_name(folder: Path) -> str | None:
    """The name of the model in `folder`, if that is in the store."""
    same = folder.absolute().parent.resolve() == store_folder().resolve()
    return folder.name.replace("--", "/") if same else None


def stored_models() -> list[dict[str, Any]]:
    """What is in the store: {"name", "bytes", "license", "origin", "fetched", "path"}; None where nobody said."""
    found = []
    for folder in sorted(_folders()):
        source = read_source(folder)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        facts = {key: source.get(key) for key in ("license", "origin", "fetched")}
        found.append({"name": stored_name(folder), "bytes": size, **facts, "path": str(folder)})
    return found


def near_names(name: str, others: Iterable[str] = ()) -> list[str]:
    """Names of known models and of `others` that look like `name`, the nearest first."""
    return difflib.get_close_matches(name, sorted({*PACKAGES, *others}), n=3, cutoff=0.6)


def read_source(folder: Path) -> dict[str, Any]:
    """The content of source.json; empty where there is none or it does not parse (the model itself may be fine)."""
    with contextlib.suppress(CorruptFile):
        source = read_json(folder / SOURCE)
        if isinstance(source, dict):
            return source
    return {}


def is_whole(folder: Path) -> bool:
    """Whether all files that source.json names are there with their sizes. Reads no contents."""
    files = read_source(folder).get("files")
    if not isinstance(files, dict) or not files:
        return False
    sizes = {name: fact.get("bytes") if isinstance(fact, dict) else None for name, fact in files.items()}
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())


@contextlib.contextmanager
def filling(folder: Path, progress: Progress) -> Iterator[Path]:
    """A temporary folder that becomes `folder` if the block succeeds, and nothing if it does not.

    One process fills the store at a time; another waits. What a killed one left is removed.

    Raises:
        UserError: if the store cannot be written, or the disk is full.
    """
    store, temporary = folder.parent, folder.with_name(f".{folder.name}.partial")
    try:
        store.mkdir(parents=True, exist_ok=True)
        lock = os.open(store, os.O_RDONLY)
    except OSError as error:
        raise UserError(
            f"cannot make the model store {store} ({error.strerror}); set LALIA_HOME to a folder you may write to"
        ) from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.say("Another lalia pull is at work; waiting for it.")
            fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            yield temporary
            for path in temporary.rglob("*"):
                if path.is_file():
                    with path.open("rb+") as file:
                        os.fsync(file.fileno())
            replace_directory(temporary, folder)
        except OSError as error:
            if not error.errno:  # not of the disk
                raise
            raise UserError(f"cannot write to the model store {store} ({error.strerror}); {_room(store)}") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    finally:
        os.close(lock)


def need_room(folder: Path, size: int) -> None:
    """Check before fetching that `size` bytes fit.

    Raises:
        UserError: if they do not.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            f"this model needs {size / 1e6:,.0f} MB while it is fetched, but {folder.parent} has {free / 1e6:,.0f} MB "
            "free; free some, or set LALIA_HOME to a folder on another disk"
        )


def facts_of_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below a folder, by its path there."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in paths
    }


def today() -> str:
    """The date in UTC, for cards."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def write_card(folder: Path, source: Source, about: str, use: str) -> None:
    """Write README.md and source.json.

    Args:
        about: what the model can and cannot do, Markdown.
        use: commands that use it.
    """
    lines = "\n".join(f"| `{name}` | {fact['bytes']:,} | `{fact['sha256']}` |" for name, fact in source.files.items())
    write_text(
        folder / CARD,
        f"---\nlicense: {json.dumps(source.license)}\nbase_model: {json.dumps(source.upstream)}\n---\n\n"
        f"# {source.title}\n\n{about}\n\n## Use\n\n```sh\n{use}\n```\n\n## Source\n\n"
        f"- Published as {source.upstream}\n- Fetched from {source.origin} on {source.fetched} (UTC) by `lalia pull`; "
        f"the files are unchanged\n- License: {source.license}\n\n"
        f"| file | bytes | SHA-256 |\n| --- | --- | --- |\n{lines}\n",
    )
    write_json(folder / SOURCE, asdict(source))


def _folders() -> list[Path]:
    store = store_folder()
    if not store.is_dir():
        return []
    return [path for path in store.iterdir() if path.is_dir() and not path.name.startswith(".")]


def _inside(folder: Path) -> Path:
    if folder.resolve().parent != folder.parent.resolve():
        raise UserError(
            f"{folder} is a link to {folder.resolve()}, outside the model store; give that path itself instead of the "
            "name"
        )
    return folder


def _unknown(name: str) -> str:
    bare = name.removeprefix("hf:")
    if bare in PACKAGES:
        return f"the model {bare} is not on this machine yet; fetch it with: lalia pull {bare}"
    have = [stored_name(folder) or folder.name for folder in sorted(_folders())]
    near = near_names(bare, have)
    if near:
        missing = [other for other in near if other not in have]
        fetch = f" (fetch it with: lalia pull {missing[0]})" if missing else ""
        hint = f"did you mean {' or '.join(near)}?{fetch}"
    elif "/" in bare:
        hint = f"if it is a model of the Hugging Face Hub, fetch it with: lalia pull hf:{bare}"
    else:
        known = ", ".join(PACKAGES)
        hint = f"in the store: {', '.join(have) or 'nothing yet'}; lalia pull fetches {known} and hf:ORG/NAME"
    return f"there is no folder {bare} and no model of that name in {store_folder()}; {hint}"


def _room(store: Path) -> str:
    free = shutil.disk_usage(store).free
    return f"{free / 1e6:,.0f} MB are free there; free some, or set LALIA_HOME to a folder on another disk"
