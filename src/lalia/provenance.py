"""What a run's figures depend on besides its settings: the code, the machine, the versions, the command.

Of the environment variables only those named here are recorded: the others may hold anything.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lalia.devices import cpu_name, memory_bytes, num_cpus
from lalia.errors import CorruptFile
from lalia.files import read_json, write_bytes, write_json

PACKAGES = ("torch", "numpy", "tokenizers", "safetensors", "pydantic", "pyarrow", "ftfy", "triton", "torchao", "ray")
"""Packages whose version may change a result or its speed."""

VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "CUBLAS_WORKSPACE_CONFIG",
    "PYTORCH_CUDA_ALLOC_CONF",
    "NVIDIA_TF32_OVERRIDE",
    "WORLD_SIZE",
)

LARGEST_DIFF = 1 << 20
"""Bytes of a diff that are kept; what is cut off is said in its last line."""

MOST_STARTS = 200

PACKAGE = Path(__file__).parent
CHECKOUT = PACKAGE.parents[1]
"""The source tree, if the package is not installed as a wheel."""


def record_start(folder: Path, lalia: str, argv: list[str] | None = None) -> None:
    """Write what this process is: environment.json, one more entry in run.json, and code-HASH.diff.

    run.json keeps an entry for every process that worked on the run, so that a run which was continued with other code
    shows it. The diff is that of the package's source tree against its commit; there is none if nothing was changed.
    `lalia` is the package's version.
    """
    diff = code_diff()
    name = f"code-{hashlib.sha256(diff).hexdigest()[:12]}.diff" if diff else None
    if name and not (folder / name).exists():
        write_bytes(folder / name, diff)
    write_json(folder / "environment.json", environment(lalia))
    entry = {
        "time": round(time.time(), 3),
        "argv": sys.argv if argv is None else argv,
        "lalia": lalia,
        "commit": commit(),
        "source_sha256": source_sha256(),
        "diff": name,
    }
    starts = [*read_starts(folder), entry]
    write_json(folder / "run.json", {"starts": starts if len(starts) <= MOST_STARTS else [starts[0], *starts[-199:]]})


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """The processes that worked on a run, the first one first; none if that is not recorded or no longer readable."""
    try:
        content = read_json(folder / "run.json")
    except CorruptFile:
        return []
    starts = content.get("starts") if isinstance(content, dict) else None
    return [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []


def environment(lalia: str) -> dict[str, Any]:
    """Machine and versions that a run's figures depend on."""
    found: dict[str, Any] = {
        "lalia": lalia,
        "commit": commit(),
        "python": platform.python_version(),
        **{name: number for name in PACKAGES if (number := _version(name))},
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": num_cpus(),
        "memory_bytes": memory_bytes(),
    }
    if gpus := _gpus():
        found["gpus"] = gpus
    return found | {name: os.environ[name] for name in VARIABLES if name in os.environ}


def commit() -> str | None:
    """Commit of the source tree, ending in -dirty if it was changed; None if the package is installed without one."""
    return _git("describe", "--always", "--dirty", "--abbrev=12").decode().strip() or None


def source_sha256() -> str:
    """Hash of the package's own Python files: equal for a checkout and for a wheel made of it."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(PACKAGE).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def code_diff() -> bytes:
    """Changes of the package's source tree since its commit, new files included; empty if there are none."""
    source = str(PACKAGE.relative_to(CHECKOUT))
    diff = _git("diff", "HEAD", "--no-color", "--no-ext-diff", "--no-textconv", "--", source)
    for path in _git("ls-files", "--others", "--exclude-standard", "-z", "--", source).decode().split("\0"):
        if path:
            diff += _git("diff", "--no-color", "--no-ext-diff", "--no-textconv", "--no-index", "--", os.devnull, path)
    if len(diff) > LARGEST_DIFF:
        whole = f"{len(diff)} bytes with SHA-256 {hashlib.sha256(diff).hexdigest()}"
        diff = diff[:LARGEST_DIFF] + f"\n# cut here: the whole diff has {whole}\n".encode()
    return diff


def _git(*arguments: str) -> bytes:
    """What git prints about the source tree; nothing where there is no git, or no tree."""
    if not (CHECKOUT / ".git").exists():
        return b""
    try:
        return subprocess.run(
            ["git", "-C", str(CHECKOUT), *arguments], capture_output=True, timeout=20, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return b""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpus() -> list[str]:
    """Name, driver and power limit of every NVIDIA device, by the driver's own tool."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    found = [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines()]
    return [
        f"{name}, driver {driver}, limit {limit}" for name, driver, limit in (row for row in found if len(row) == 3)
    ]
