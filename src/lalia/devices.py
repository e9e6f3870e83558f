"""What this machine has: processors, memory, thread settings."""

import os
import platform
from pathlib import Path

from lalia.errors import UserError


def num_cpus() -> int:
    """Processors this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


def process_rank() -> int:
    """Number of this process among those that torchrun (or Ray) started to work together; 0 alone."""
    return int(os.environ.get("RANK", "0"))


def num_processes() -> int:
    """Processes that were started to work together; 1 alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def cpu_name() -> str:
    """Model name of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def memory_bytes() -> int:
    """Memory this process may fill: the machine's, or less where a control group (a container, a job) limits it."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(physical, cgroup_memory_limit() or physical)


def cgroup_memory_limit(groups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The least memory limit among this process's control group and those that contain it; None without one.

    Args:
        groups: lines "number:controllers:path"; version 2 has number 0 and no controllers.
        mounted: where the groups are mounted. Inside a container it is often the container's own group that is
            mounted there, and its path names nothing: then the root counts.
    """
    try:
        lines = groups.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    limits: list[int] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, name = (mounted / "memory", "memory.limit_in_bytes") if controllers else (mounted, "memory.max")
        group = root / path.lstrip("/")
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(root))):
            try:
                text = (folder / name).read_text(encoding="utf-8").strip()
            except OSError:
                continue
            if text.isdigit() and int(text) < 1 << 62:  # "max", and version 1's number of that meaning
                limits.append(int(text))
    return min(limits, default=None)


def peak_memory_bytes() -> int:
    """Largest resident size this process has had since `reset_peak_memory`, or ever where there is no such reset."""
    import resource
    import sys

    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # no Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory() -> bool:
    """Let `peak_memory_bytes` count from here on; False where the system cannot (it is Linux that can)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def use_threads(count: int | None = None) -> int:
    """Set the threads PyTorch computes with (default: one per processor, or OMP_NUM_THREADS) and return them."""
    import torch

    if count is None:
        asked = os.environ.get("OMP_NUM_THREADS", "")
        count = int(asked) if asked.isdigit() and int(asked) > 0 else num_cpus()
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)
    return count


def make_deterministic() -> None:
    """Let PyTorch use only algorithms that give the same bits every time, and refuse operations that have none.

    On a CPU a run repeats bit for bit without it, with the same number of threads; on a GPU it costs speed.

    Raises:
        UserError: if cuBLAS has begun, or was told, to work with buffers that make its results vary.
    """
    import torch

    if torch.cuda.is_available():
        found = os.environ.get(CUBLAS_WORKSPACE)
        if found is None and not torch.cuda.is_initialized():
            os.environ[CUBLAS_WORKSPACE] = found = DETERMINISTIC_WORKSPACES[0]
        if found not in DETERMINISTIC_WORKSPACES:
            raise UserError(
                f"pretrain.deterministic = true needs {CUBLAS_WORKSPACE}={' or '.join(DETERMINISTIC_WORKSPACES)} "
                f"before the first use of the GPU, it is {found or 'not set'}; set it and start again"
            )
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.use_deterministic_algorithms(True)
    # By default it also fills all new memory with NaN, which shows reads of it and changes no result.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")
"""Those that NVIDIA's cuBLAS documentation calls reproducible."""
