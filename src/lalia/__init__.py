"""Lalia: build a language model from nothing, see inside it, and serve it.

import lalia

lalia.run("recipes/shakespeare.toml")
model = lalia.load("runs/shakespeare/chat")
for text in model.chat("Who are you?", stream=True):
    print(text, end="", flush=True)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    import numpy as np

    from lalia.inference.encoder import Encoder
    from lalia.inference.language_model import LanguageModel


def load(model: str | Path, **options: Any) -> Any:
    """Load a model.

    Args:
        model: a Hugging Face folder, such as runs/shakespeare/chat, a GGUF file, or the name of a model that
            `lalia pull` fetched, such as smollm2. A path that exists is meant before a name.
        **options: of a model that generates; see `lalia.inference.language_model.load`.

    Returns:
        a `LanguageModel`, which generates text; an `Encoder`, which makes vectors, fills in masks or classifies
        (BERT, DistilBERT, sentence-transformers); or a `Clip`, which has vectors for texts and images.

    Raises:
        UserError: if the model is missing, damaged or of an architecture Lalia does not know.
    """
    from lalia.inference.loading import load as load_any

    return load_any(model, **options)


def embed(model: "str | Path | Encoder | LanguageModel", texts: "Sequence[str]", **options: Any) -> "np.ndarray":
    """One vector for each text, (texts, dim) float32.

    Args:
        model: what `load` takes, or what it returned. Of a model that generates, a text's vector is the mean of its
            tokens' final hidden states, scaled to length one.
        texts: a list of texts.
        **options: see `lalia.inference.encoder.Encoder.embed`.
    """
    from lalia.inference.loading import as_encoder

    return as_encoder(load(model) if isinstance(model, str | Path) else model).embed(texts, **options)


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
