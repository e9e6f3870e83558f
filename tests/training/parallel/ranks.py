"""Runs a function in several processes that train together, over gloo on CPUs.

    results = run(function, 2, *args)     # function(*args) in 2 processes; what each returned, by rank

The function and its arguments must be picklable, so the function is one of a module, not of a test. It finds its
process group started; `lalia.training.parallel.world.start(config)` lays a mesh over it. Processes are forked from a
server that has everything imported, so that only the first run of a session pays for it.
"""

import faulthandler
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = str(Path(__file__).parents[3])

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "torch._dynamo",  # which DTensor imports at its first use
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "lalia.training.objectives",
    ]
)


def run(function: Callable[..., Any], size: int, *args: Any, timeout_seconds: float = 180.0) -> list[Any]:
    """function(*args) in `size` processes; returns their results by rank, tensors on the CPU by value.

    Raises:
        AssertionError: with the traceback of the first rank that failed, or the ranks that did not end in time. The
            others are killed.
    """
    if ROOT not in sys.path:  # children get this path, and look for `tests` in it
        sys.path.insert(0, ROOT)
    processes, connections = [], {}
    results: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(size):
                receiver, sender = _context.Pipe(duplex=False)
                work = (function, args, rank, size, str(Path(folder, "rendezvous")), sender, timeout_seconds)
                process = _context.Process(target=_child, args=work, daemon=True)
                process.start()
                sender.close()
                processes.append(process)
                connections[receiver] = rank
            deadline = time.monotonic() + timeout_seconds
            while len(results) < size:
                waiting = [c for c, rank in connections.items() if rank not in results]
                ready = wait(waiting, max(0.0, deadline - time.monotonic()))
                if not ready:
                    late = [connections[c] for c in waiting]
                    raise AssertionError(f"ranks {late} of {size} did not end within {timeout_seconds:g} s")
                for connection in ready:
                    rank = connections[connection]  # pyright: ignore[reportArgumentType]
                    results[rank] = _received(connection, rank, size)  # pyright: ignore[reportArgumentType]
            for process in processes:
                process.join(10.0)
        finally:
            for process in processes:
                process.kill()
                process.join()
    return [results[rank] for rank in range(size)]


def _received(connection: Connection, rank: int, size: int) -> Any:
    try:
        failed, result = pickle.loads(connection.recv_bytes())  # noqa: S301 (from a process of our own)
    except EOFError:
        raise AssertionError(f"rank {rank} of {size} died without a word") from None
    if failed:
        raise AssertionError(f"rank {rank} of {size} failed first:\n{result}")
    return result


def _child(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    size: int,
    rendezvous: str,
    sender: Connection,
    timeout_seconds: float,
) -> None:
    faulthandler.dump_traceback_later(max(1.0, timeout_seconds - 3.0))  # where a rank hangs
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the machine's name need not resolve
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_seconds),
        )
        message = (False, function(*args))
    except BaseException:  # noqa: BLE001 (the parent raises it)
        message = (True, traceback.format_exc())
    sender.send_bytes(pickle.dumps(message))
    sender.close()
    if not message[0]:
        dist.barrier()  # nobody leaves while another still talks to it
        dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()
