"""Files that are either whole or absent: atomic writes, fingerprints, locks."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lalia.errors import CorruptFile, UserError


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` through a temporary neighbour, fsync and rename: readers see old or new, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text(path: Path, content: str) -> None:
    """`write_bytes` for UTF-8 text."""
    write_bytes(path, content.encode("utf-8"))


def write_json(path: Path, content: Any) -> None:
    """`write_bytes` for JSON, indented, keys in the order given."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file that Lalia wrote.

    Raises:
        CorruptFile: if it is missing or does not parse, with the remedy.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CorruptFile(f"{path} is missing; run the stage that makes it again") from None
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise CorruptFile(f"{path} is not valid JSON ({error}); delete it and run the same command again") from None
    except OSError as error:
        raise CorruptFile(f"cannot read {path} ({error.strerror}); make it readable, or delete it") from None


def replace_directory(temporary: Path, target: Path) -> None:
    """Move a finished directory to its final name, replacing an older one; fsync first so that a crash keeps it."""
    for folder in [*(p for p in temporary.rglob("*") if p.is_dir()), temporary]:
        _fsync(folder)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(temporary, target)
    _fsync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _fsync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fingerprint(content: Any) -> str:
    """Hex SHA-256 (first 16 digits) of the canonical JSON of `content`; the identity of a stage's inputs."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the run folder exclusively; the kernel releases it when the process ends, however it ends.

    Raises:
        UserError: if another process holds it (its pid is named), or the folder cannot be written or locked.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "run.lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot write to the run folder {folder} ({error.strerror}); choose another with --run FOLDER"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            pid = file.read().strip() or "unknown"
            raise UserError(
                f"{folder} is in use by a running process (pid {pid}); wait for it, stop it, or choose another "
                "folder with --run FOLDER"
            ) from None
        except OSError as error:
            raise UserError(
                f"{folder} lies on a file system that cannot lock files ({error.strerror}); choose another with "
                "--run FOLDER"
            ) from None
        file.seek(0)
        file.truncate()
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
