"""The recipe: one TOML file that says how a model is made, composed of the rooms' own settings."""

import difflib
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import Field

from lalia.data.config import DataConfig
from lalia.errors import UserError
from lalia.evaluation.config import EvaluateConfig
from lalia.model.shapes import ArchitectureConfig
from lalia.planning.config import PlanConfig
from lalia.posttraining.config import FinetuneConfig
from lalia.settings import Settings
from lalia.tokenizer.config import TokenizerConfig
from lalia.training.config import TrainingConfig


class Recipe(Settings):
    """Everything a run depends on."""

    name: str = Field(default="shakespeare", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run's folder under runs/ and of the model it makes."""
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ArchitectureConfig = ArchitectureConfig()
    plan: PlanConfig = PlanConfig()
    pretrain: TrainingConfig = TrainingConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()


def load_recipe(source: str | Path = "shakespeare", overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        source: path of a .toml file, or the name of a recipe that comes with Lalia.
        overrides: "section.key=value" strings; values are TOML, and what is not TOML is taken as text.

    Raises:
        UserError: every problem at once, unknown keys with the nearest name.
    """
    values = read_toml(find_recipe(source))
    for override in overrides:
        _apply(values, override)
    return Recipe.parse(values, str(source))


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        UserError: if it is not TOML or not UTF-8.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}; mend it, or take a recipe that comes with Lalia") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None


def find_recipe(source: str | Path) -> Path:
    """Path of a recipe given by path or by name.

    Raises:
        UserError: if there is none, with the names there are.
    """
    path = Path(source).expanduser()
    if path.suffix == ".toml" or path.is_file():
        if path.is_file():
            return path
        builtin = recipes_folder() / path.name
        if path.parent.name == "recipes" and builtin.is_file():
            return builtin
    elif (builtin := recipes_folder() / f"{source}.toml").is_file():
        return builtin
    names = sorted(p.stem for p in recipes_folder().glob("*.toml"))
    nearest = difflib.get_close_matches(path.stem, names, n=1)
    hint = f", did you mean {nearest[0]!r}?" if nearest else ""
    raise UserError(
        f"no recipe, file or folder {str(source)!r}{hint or '.'} Known recipes: {', '.join(names)}; or give the path "
        "of a .toml file, of a run folder, or of your own texts"
    )


def recipes_folder() -> Path:
    """Where the recipes that come with Lalia are: inside the wheel, or beside src/ in a checkout."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "recipes"


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise UserError(
            f"override {override!r} is not of the form section.key=value, such as pretrain.steps=100 (and there can be "
            "only one recipe, folder or file, which comes first)"
        )
    try:
        override.encode()
    except UnicodeEncodeError:
        raise UserError(f"override {override!a} is not valid Unicode; rename the file, or write it as UTF-8") from None
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    for part in parts[:-1]:
        child = values.setdefault(part, {})
        if not isinstance(child, dict):
            raise UserError(f"override {override!r}: {part!r} is a value, not a section")
        values = child
    values[parts[-1]] = value


def to_toml(values: dict[str, Any]) -> str:
    """A recipe as TOML text; settings that are None are left out, as TOML has no null."""
    lines: list[str] = []
    _write_table(lines, "", values)
    return "\n".join(lines).strip() + "\n"


def _write_table(lines: list[str], prefix: str, values: dict[str, Any]) -> None:
    tables = {k: v for k, v in values.items() if isinstance(v, dict)}
    plain = {k: v for k, v in values.items() if not isinstance(v, dict) and v is not None}
    if prefix and plain:
        lines.append(f"\n[{prefix}]")
    lines += [f"{key} = {toml_value(value)}" for key, value in plain.items()]
    for key, value in tables.items():
        _write_table(lines, f"{prefix}.{key}" if prefix else key, value)


def toml_value(value: Any) -> str:
    """A value as TOML; text of any characters becomes one basic string."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    text = "".join(
        f"\\u{ord(c):04x}" if ord(c) < 32 or ord(c) == 127 else ("\\" + c if c in '"\\' else c) for c in str(value)
    )
    return f'"{text}"'
