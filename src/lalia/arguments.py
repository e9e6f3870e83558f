"""What the verbs of the command line share: argument types, the model that a name means, input and output."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lalia.errors import UserError

Json = Annotated[bool, typer.Option("--json", help="print machine-readable results on standard output")]
Model = Annotated[str, typer.Argument(help="a model folder, a run folder, or a name in the model store")]


def model_folder(model: str, stage: str) -> Path:
    """The path of a model; of a run folder, the model of the stage, or the base model."""
    from lalia.formats.store import find_model

    folder = find_model(model)
    if not (folder / "config.json").exists():
        for name in (stage, "base"):
            if (folder / name / "config.json").exists():
                return folder / name
    return folder


def standard_input() -> str:
    """All of standard input; UserError if it is no UTF-8."""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 text ({error.reason} at byte {error.start})") from None


def print_json(content: Any) -> None:
    """Print on standard output, indented."""
    json.dump(content, sys.stdout, indent=2, ensure_ascii=False, default=str)
    sys.stdout.write("\n")
