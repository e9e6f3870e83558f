"""Lalia: build a language model from nothing, see inside it, and serve it.

import lalia

lalia.run("recipes/shakespeare.toml")
model = lalia.load("runs/shakespeare/chat")
for text in model.chat("Who are you?", stream=True):
    print(text, end="", flush=True)
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lalia.inference.language_model import LanguageModel


def load(model: str | Path, **options: Any) -> "LanguageModel":
    """Load a model for generation.

    Args:
        model: a Hugging Face folder, such as runs/shakespeare/chat, or the name of a model that `lalia pull` fetched,
            such as smollm2. A path that exists is meant before a name.
        **options: see `lalia.inference.language_model.load`.

    Raises:
        UserError: if the model is missing, damaged or of an architecture Lalia does not know.
    """
    from lalia.formats.store import find_model, stored_name
    from lalia.inference.language_model import load as load_model

    path = find_model(model)
    loaded = load_model(path, **options)
    loaded.name = stored_name(path) or loaded.name
    return loaded


def run(
    recipe: str | Path = "shakespeare", *overrides: str, folder: str | Path | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Run a recipe from raw text to an evaluated model; what is already done is not done again.

    Args:
        recipe: path or name of a recipe.
        *overrides: "section.key=value" strings.
        folder: the run folder; default runs/NAME.
        quiet: print nothing.

    Returns:
        the summary of each stage by name, with "run" the folder.
    """
    from lalia.pipeline import run_recipe
    from lalia.progress import Progress
    from lalia.recipe import load_recipe

    return run_recipe(load_recipe(recipe, overrides), Path(folder) if folder else None, progress=Progress(quiet=quiet))
