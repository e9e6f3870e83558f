"""kill -9 at any moment, then the same command: the run continues and ends with the same bytes."""

import hashlib
import json
import os
import random
import subprocess
import time
from pathlib import Path

from lalia.stages import STAGES
from tests.end_to_end.conftest import SETTINGS, command, environment, lalia

KILLS_PER_STAGE = int(os.environ.get("LALIA_KILLS_PER_STAGE", "1"))
"""1 for every commit; 3 kills at 21 moments: LALIA_KILLS_PER_STAGE=3 pytest tests/end_to_end/test_kill.py -s"""


def digests(run: Path) -> dict[str, str]:
    """What must not depend on interruptions: every artefact, times and logs aside."""
    patterns = ("documents/*.parquet", "tokens/*.bin", "tokens/tokenizer/*", "base/*.safetensors", "chat/*.safetensors")
    paths = sorted(path for pattern in patterns for path in run.glob(pattern))
    found = {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}
    results = json.loads((run / "evaluation" / "results.json").read_text())
    found["bits_per_byte"] = json.dumps(results["bits_per_byte"])
    found["samples"] = json.dumps(results["samples"])
    return found


def kill_during(stage: str, delay: float, run: Path, arguments: list[str], cwd: Path) -> bool:
    """Start the run, wait until it enters `stage`, kill it `delay` seconds later; False if it finished before."""
    log = run / "log.jsonl"
    before = log.stat().st_size if log.exists() else 0
    process = subprocess.Popen(
        command(*arguments), cwd=cwd, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    marker = '"stage_start", "time"'
    while process.poll() is None and time.monotonic() < deadline:
        new = log.read_text()[before:] if log.exists() else ""
        if any(marker in line and f'"stage": "{stage}"' in line for line in new.splitlines()):
            time.sleep(delay)
            break
        time.sleep(0.01)
    alive = process.poll() is None
    process.kill()
    process.wait()
    return alive


def stage_seconds(run: Path, stage: str) -> float:
    return json.loads((run / stage / "receipt.json").read_text())["seconds"]


def test_killed_everywhere_ends_with_the_same_bytes(tmp_path: Path, corpus: Path, finished_run: Path) -> None:
    run = tmp_path / "run"
    arguments = ["run", str(corpus), *SETTINGS, "--run", str(run)]
    # The plan depends on nothing measured here (every size is set), so both runs share it.
    rng = random.Random(int(os.environ.get("LALIA_KILL_SEED", "0")))
    kills = []
    for stage in STAGES:
        for _ in range(KILLS_PER_STAGE):
            delay = rng.uniform(0.0, 0.9) * stage_seconds(finished_run, stage.name)
            if kill_during(stage.name, delay, run, arguments, tmp_path):
                kills.append((stage.name, round(delay, 3)))
    done = lalia(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    print(f"{len(kills)} kills: {kills}")
    assert len(kills) >= KILLS_PER_STAGE * len(STAGES) * 0.6  # short stages may finish first
    assert digests(run) == digests(finished_run)


def test_another_seed_gives_other_bytes(tmp_path: Path, corpus: Path, finished_run: Path) -> None:
    """Negative control: the digests do see a change in training."""
    run = tmp_path / "run"
    done = lalia("pretrain", str(corpus), *SETTINGS, "pretrain.seed=5", "--run", str(run), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ours = (run / "base" / "model.safetensors").read_bytes()
    assert ours != (finished_run / "base" / "model.safetensors").read_bytes()


def test_second_start_on_a_running_folder_is_refused_with_its_pid(tmp_path: Path, corpus: Path) -> None:
    run = tmp_path / "run"
    arguments = ["run", str(corpus), *SETTINGS, "pretrain.steps=100000", "--run", str(run)]
    process = subprocess.Popen(
        command(*arguments), cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while not (run / "recipe.toml").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        second = lalia(*arguments, cwd=tmp_path)
    finally:
        process.kill()
        process.wait()
    assert second.returncode == 1
    assert f"in use by a running process (pid {process.pid})" in second.stderr
    assert "Traceback" not in second.stderr


def test_a_finished_run_does_nothing_and_says_so(finished_run: Path) -> None:
    before = digests(finished_run)
    again = lalia("run", str(finished_run), cwd=finished_run.parent)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("done (finished in") == len(STAGES)
    assert digests(finished_run) == before


def test_changed_setting_redoes_what_depends_on_it_and_says_why(tmp_path: Path, corpus: Path) -> None:
    run = tmp_path / "run"
    arguments = ["pretrain", str(corpus), *SETTINGS, "--run", str(run)]
    assert lalia(*arguments, cwd=tmp_path).returncode == 0
    again = lalia(*arguments, "pretrain.seed=9", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "tokens: done" in again.stderr
    assert "plan: made anew because pretrain.seed changed" in again.stderr
    assert "base: made anew because inputs.plan changed" in again.stderr
