"""What every benchmark shares: the machine's description, thread control, subprocesses, tables and the result file."""

import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lalia.devices import cpu_name, num_cpus
from lalia.errors import UserError
from lalia.files import write_json

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


def describe(threads: int) -> dict[str, Any]:
    """The machine and the software a measurement ran on."""
    return {
        "cpu": cpu_name(),
        "cores": num_cpus(),
        "threads": threads,
        "load_average_1min": round(os.getloadavg()[0], 2),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": _version("torch"),
        "transformers": _version("transformers"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "lalia_commit": commit(REPOSITORY),
    }


def commit(folder: Path) -> str:
    """Commit of the checkout at `folder`, "+changes" when tracked files differ, or why there is none.

    `folder` itself has to be the checkout: git would otherwise answer for a repository that merely contains it.
    """
    top = _git(folder, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != folder.resolve():
        return "unknown (not a git checkout)"
    head = _git(folder, "rev-parse", "HEAD") or "unknown (no commit yet)"
    return head + ("+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")


def checkout(folder: Path | None, name: str, needed: str) -> Path:
    """The user's checkout of a peer, checked to hold the file `needed`.

    Raises:
        UserError: if it was not given or does not hold that file.
    """
    if folder is None or not (folder / needed).is_file():
        raise UserError(f"--{name} {folder}: no {needed} there; give the folder of a checkout of {name}")
    return folder.resolve()


def environment(threads: int, **more: str) -> dict[str, str]:
    """Environment of a subprocess that may use `threads` threads, with no tracker or hub to talk to."""
    count = {key: str(threads) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    offline = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **count, **offline, **more}


def restart_with(threads: int) -> None:
    """Start this program anew with OMP_NUM_THREADS set, unless it is: threads made later obey nothing else."""
    if os.environ.get("OMP_NUM_THREADS") != str(threads):
        os.execve(sys.executable, [sys.executable, *sys.argv], environment(threads))


def run(command: Sequence[str], cwd: Path, env: Mapping[str, str], log: Path) -> str:
    """Run a peer's own command, its output (both streams) to `log`, and return that output.

    Raises:
        RuntimeError: if it fails, with the last lines of its output.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"  $ {' '.join(command)}", file=sys.stderr)
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(command, cwd=cwd, env=dict(env), stdout=file, stderr=subprocess.STDOUT, check=False)
    output = log.read_text(encoding="utf-8", errors="replace")
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed ({done.returncode}), log {log}:\n{output[-3000:]}")
    return output


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Plain text table, first column to the left; floats with 4 significant digits."""
    cells = [list(columns), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in cells
    )


def write_result(name: str, content: Mapping[str, Any], quick: bool) -> Path:
    """Write benchmarks/results/NAME.json; a smoke run is no result and goes to runs/quick/."""
    path = REPOSITORY / "runs" / "quick" / f"{name}.json" if quick else RESULTS / f"{name}.json"
    write_json(path, {"benchmark": name, "quick": quick, **content})
    print(f"\nwrote {path.relative_to(REPOSITORY)}")
    return path


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
