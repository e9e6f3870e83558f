"""A process of several dies, hangs or is told to stop: the job starts again by itself and ends with the same bytes."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.end_to_end.conftest import environment

STEPS = 60
RECIPE = f"""
name = "faults"
[data]
path = "texts"
[tokenizer]
vocab_size = 320
[model]
hidden_size = 32
num_hidden_layers = 2
[pretrain]
steps = {STEPS}
sequence_length = 32
batch_size = 4
precision = "float32"
checkpoint_seconds = 0.2
evaluations = 1
timeout_seconds = 15.0
[pretrain.parallel]
shard = 2
[finetune]
enabled = false
"""
WORDS = str.split(
    "the king and a queen of every house speak of war in winter but of love when spring comes to old gardens"
)
DEADLINE_SECONDS = 240.0


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and a run whose model is not trained yet."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "texts").mkdir()
    for number in range(8):
        words = [WORDS[(7 * i * i + number * i + i // 5) % len(WORDS)] for i in range(900)]
        (folder / "texts" / f"{number}.txt").write_text(" ".join(words), encoding="utf-8")
    (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    command = [sys.executable, "-m", "lalia", "tokenize", "recipe.toml", "--run", "run"]
    subprocess.run(command, cwd=folder, env=settings(), check=True, capture_output=True, timeout=DEADLINE_SECONDS)
    return folder


def settings() -> dict[str, str]:
    return environment() | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def train(folder: Path, disturb: Callable[[int, Path], None] | None = None) -> tuple[int, str, str]:
    """Two processes under torchrun; `disturb` is given torchrun's pid and the log. Status, stderr, weights' hash."""
    arguments = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "2", "--monitor-interval", "0.2"]
    verb = ["-m", "--", "lalia", "pretrain", "recipe.toml", "--run", "run"]
    with (folder / "stderr.txt").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *arguments, *verb],
            cwd=folder,
            env=settings(),
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        try:
            if disturb is not None:
                disturb(process.pid, folder / "run" / ".base.partial" / "metrics.jsonl")
            status = process.wait(DEADLINE_SECONDS)
        finally:
            process.kill()
    weights = folder / "run" / "base" / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.exists() else ""
    return status, (folder / "stderr.txt").read_text(encoding="utf-8"), digest


def workers(launcher: int) -> list[int]:
    """The processes that torchrun started, by rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    ranks = {}
    for child in map(int, children):
        entries = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        rank = next((e.partition(b"=")[2] for e in entries if e.startswith(b"RANK=")), None)
        if rank is not None:
            ranks[int(rank)] = child
    return [ranks[rank] for rank in sorted(ranks)]


def wait_for_step(metrics: Path, step: int) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        if metrics.exists():
            lines = metrics.read_text(encoding="utf-8").splitlines()
            if any(json.loads(line).get("step", 0) >= step for line in lines if line.endswith("}")):
                return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


@pytest.fixture(scope="module")
def undisturbed(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("undisturbed") / "work"
    shutil.copytree(prepared, folder)
    status, errors, digest = train(folder)
    assert status == 0, errors
    return digest


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    """A copy of what is prepared, for one test."""
    return Path(shutil.copytree(prepared, tmp_path / "work"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_brings_all_back(folder: Path, undisturbed: str, rank: int) -> None:

    def kill(launcher: int, metrics: Path) -> None:
        wait_for_step(metrics, 20)
        os.kill(workers(launcher)[rank], signal.SIGKILL)

    status, errors, digest = train(folder, kill)
    assert status == 0, errors
    assert "continuing at step" in errors
    assert digest == undisturbed
    events = [json.loads(line) for line in (folder / "run/base/metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "step"] == list(range(1, STEPS + 1))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_process_that_hangs_is_named_and_replaced(folder: Path, undisturbed: str) -> None:

    def stop(launcher: int, metrics: Path) -> None:
        wait_for_step(metrics, 20)
        os.kill(workers(launcher)[1], signal.SIGSTOP)

    status, errors, digest = train(folder, stop)
    assert status == 0, errors
    assert "Look at process 1 and its machine: step" in errors, errors
    assert digest == undisturbed


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_job_that_is_told_to_stop_saves_and_continues(folder: Path, undisturbed: str) -> None:

    def terminate(launcher: int, metrics: Path) -> None:
        wait_for_step(metrics, 20)
        os.kill(launcher, signal.SIGTERM)

    status, errors, digest = train(folder, terminate)
    assert (status != 0, digest) == (True, "")
    assert "stopped by SIGTERM at step" in errors, errors
    newest = max((folder / "run" / ".base.partial").glob("step-*"))
    convert = ["convert", str(newest), "--to", "hf", "--out", "half"]
    for arguments in (convert, ["generate", "half", "the king", "--max-tokens", "5", "--seed", "1"]):
        done = subprocess.run([sys.executable, "-m", "lalia", *arguments], cwd=folder, env=settings(), check=False)
        assert done.returncode == 0, arguments
    status, errors, digest = train(folder)
    assert status == 0, errors
    assert "continuing at step" in errors
    assert digest == undisturbed


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Two network namespaces with a cable between them: machines that share nothing but the disk."""
    names = [f"lalia{os.getpid()}{side}" for side in "ab"]
    ip = shutil.which("ip")
    if ip is None or os.geteuid() != 0:
        pytest.skip("network namespaces need ip and root")
    commands = [
        *(["netns", "add", name] for name in names),
        ["link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1]],
        *(["-n", name, "addr", "add", f"10.77.0.{i}/24", "dev", "cable"] for i, name in enumerate(names, 1)),
        *(["-n", name, "link", "set", device, "up"] for name in names for device in ("lo", "cable")),
    ]
    try:
        for command in commands:
            done = subprocess.run([ip, *command], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"ip {' '.join(command)}: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run([ip, "netns", "del", name], capture_output=True, check=False)


@pytest.mark.slow
def test_two_machines_train_as_one(folder: Path, undisturbed: str, machines: list[str]) -> None:
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "10.77.0.1:29511", "--rdzv-id", "machines"]
    processes = []
    for rank, machine in enumerate(machines):
        place = ["--nnodes", "2", "--node-rank", str(rank), "--local-addr", f"10.77.0.{rank + 1}"]
        place += ["--rdzv-conf", f"is_host={1 - rank}"]  # torchrun would know it by the name of the machine
        verb = ["-m", "--", "lalia", "pretrain", "recipe.toml", "--run", "run"]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", *place, *meeting, *verb]
        processes.append(
            subprocess.Popen(
                ["ip", "netns", "exec", machine, *command],
                cwd=folder,
                env=settings() | {"GLOO_SOCKET_IFNAME": "cable"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        errors = [process.communicate(timeout=DEADLINE_SECONDS)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    weights = folder / "run" / "base" / "model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == undisturbed


@pytest.mark.slow
def test_other_numbers_give_other_bytes(folder: Path, undisturbed: str) -> None:
    """Negative control: a step less is noticed in the bytes."""
    (folder / "recipe.toml").write_text(RECIPE.replace(f"steps = {STEPS}", f"steps = {STEPS - 1}"), encoding="utf-8")
    status, errors, digest = train(folder)
    assert status == 0, errors
    assert digest != undisturbed
