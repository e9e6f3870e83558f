"""The parity table: every family against its reference, and every switch against a wrong value of it.

    python benchmarks/family_parity.py

The references are tiny models with random weights: transformers' own, and for Grok-1, which transformers does not
have, one written from its published equations (tests/formats/references.py). The figures are largest absolute
differences of logits (or of hidden, pooled or projected states) in float32. They go into docs/families.md, between its
two marks, and into benchmarks/results/family_parity.json. Takes about a minute on one core.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lalia.files import write_json
from lalia.formats.hf_folder import load_model
from machine import REPOSITORY, RESULTS, describe

BEGIN, END = "<!-- family_parity begins -->", "<!-- family_parity ends -->"
PAGE = REPOSITORY / "docs" / "families.md"
RESULT = RESULTS / "family_parity.json"


def measure(names: Sequence[str] | None = None) -> dict[str, Any]:
    """{"parity": {model: {check: difference}}, "controls": {model: {what is wrong: difference}}}

    Args:
        names: of `references.MODELS`; None means all.
    """
    sys.path.insert(0, str(REPOSITORY))
    from tests.formats.parity import CHECKS, checks_of, control, spelled
    from tests.formats.references import MODELS, SWITCHES, make_reference

    parity: dict[str, dict[str, float]] = {}
    controls: dict[str, dict[str, float]] = {}
    for name in MODELS if names is None else names:
        with tempfile.TemporaryDirectory() as folder:
            theirs = make_reference(name)
            (Path(folder) / "theirs").mkdir()
            theirs.save_pretrained(Path(folder) / "theirs")
            ours = load_model(Path(folder) / "theirs")
            parity[name] = {
                check: CHECKS[check](name, theirs, ours, Path(folder) / check.replace(" ", "-"))
                for check in checks_of(name)
            }
            controls[name] = {
                spelled(changes): control(name, theirs, ours, changes) for changes in SWITCHES.get(name, [])
            }
    return {"parity": parity, "controls": {name: found for name, found in controls.items() if found}}


def as_markdown(result: Mapping[str, Any]) -> str:
    """Two tables: model x check, and the controls of each model."""
    checks = list(dict.fromkeys(check for found in result["parity"].values() for check in found))
    lines = [
        "Largest absolute difference from the reference, float32:",
        "",
        f"| model | {' | '.join(checks)} |",
        f"|---|{'---|' * len(checks)}",
    ]
    for name, found in result["parity"].items():
        cells = [f"{found[check]:.1e}" if check in found else "" for check in checks]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        "The same first comparison with one thing wrong:",
        "",
        "| model | wrong, and the difference |",
        "|---|---|",
    ]
    for name, found in result["controls"].items():
        lines.append(f"| {name} | {'; '.join(f'{what}: {value:.1e}' for what, value in found.items())} |")
    return "\n".join(lines) + "\n"


def put_into(page: Path, table: str) -> None:
    """Replace what stands between the two marks."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n{table}{END}{after}", encoding="utf-8")


def main() -> None:
    """Measure, print, and write both files."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    result = {**measure(), "machine": describe(threads=1)}
    table = as_markdown(result)
    print(table)
    put_into(PAGE, table)
    write_json(RESULT, result)


if __name__ == "__main__":
    main()
