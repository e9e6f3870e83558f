"""The command line on the workers of a Ray cluster that the test starts on this machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lalia.errors import UserError
from lalia.ray_train import main
from tests.end_to_end.conftest import SETTINGS, environment, write_corpus


@pytest.mark.slow
def test_two_workers_train_together(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra `cluster` is not installed")
    write_corpus(tmp_path / "texts", documents=6)
    recipe = ["texts", *SETTINGS, "pretrain.steps=8", "--run", "run"]
    done = subprocess.run(
        [sys.executable, "-m", "lalia.ray_train", "--workers", "2", "--max-failures", "0", "--", "pretrain", *recipe],
        cwd=tmp_path,
        env=environment() | {"GLOO_SOCKET_IFNAME": "lo", "RAY_TRAIN_V2_ENABLED": "1", "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    events = [json.loads(line) for line in (tmp_path / "run/base/metrics.jsonl").read_text().splitlines()]
    assert events[-1]["step"] == 8
    world = json.loads((tmp_path / "run/base/receipt.json").read_text())["summary"]["processes"]
    assert world == 2, "both workers took part"


def test_without_a_verb_there_is_nothing_to_run() -> None:
    with pytest.raises(UserError, match="give a verb"):
        main(["--workers", "2"])
