"""The committed parity table: whole, within its tolerances, and what the benchmark computes."""

import importlib
import json
from typing import Any

import pytest

from tests.formats.parity import TOLERANCE, VISIBLE, checks_of, spelled
from tests.formats.references import MODELS, SWITCHES


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend("benchmarks")
    return importlib.import_module("family_parity")


def test_the_committed_table_is_whole_and_true(benchmark: Any) -> None:
    result = json.loads(benchmark.RESULT.read_text())
    assert list(result["parity"]) == list(MODELS)
    assert {name: list(found) for name, found in result["parity"].items()} == {name: checks_of(name) for name in MODELS}
    assert all(value <= TOLERANCE for found in result["parity"].values() for value in found.values())
    wrong = {name: [spelled(changes) for changes in controls] for name, controls in SWITCHES.items()}
    assert {name: list(found) for name, found in result["controls"].items()} == wrong
    assert all(value > VISIBLE for found in result["controls"].values() for value in found.values())
    page = benchmark.PAGE.read_text()
    between = page.split(benchmark.BEGIN)[1].split(benchmark.END)[0]
    assert between.strip() == benchmark.as_markdown(result).strip()


def test_the_benchmark_in_miniature(benchmark: Any, tmp_path: Any) -> None:
    result = benchmark.measure(["llama 3.1", "clip vision"])
    assert list(result["parity"]["clip vision"]) == ["one pass", "written", "sharded"]
    assert all(value <= TOLERANCE for found in result["parity"].values() for value in found.values())
    assert result["controls"]["llama 3.1"]["rope_scaling = None"] > VISIBLE
    page = tmp_path / "page.md"
    page.write_text(f"before {benchmark.BEGIN} old {benchmark.END} after")
    for _ in range(2):
        benchmark.put_into(page, benchmark.as_markdown(result))
    text = page.read_text()
    assert text.startswith("before ") and text.endswith(" after") and "old" not in text
    assert "| clip vision |" in text and "rope_scaling = None: 2.8e+00" in text
