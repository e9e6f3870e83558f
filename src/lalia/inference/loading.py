"""What a path is loaded as: a language model, an encoder, or the two towers of CLIP."""

from pathlib import Path
from typing import Any

from lalia.errors import UserError
from lalia.formats.gguf.file import GGUFFile
from lalia.formats.hf_folder import read_config
from lalia.formats.loading import gguf_path
from lalia.formats.sentence_transformers import MODULES
from lalia.formats.store import find_model, stored_name
from lalia.inference import clip, encoder, language_model
from lalia.inference.clip import Clip
from lalia.inference.encoder import Encoder
from lalia.inference.language_model import LanguageModel
from lalia.model.config import ModelConfig
from lalia.model.families import registry


def load(model: Path | str, **options: Any) -> LanguageModel | Encoder | Clip:
    """Load a model as what it is: what generates no text, or says how to make vectors of texts, is an encoder.

    Args:
        model: a Hugging Face folder, a GGUF file, or a name in the model store.
        options: those of `lalia.inference.language_model.load`.

    Raises:
        UserError: if it is no complete model, or options are given for a model that does not generate.
        CorruptFile: if a file of it is damaged.
    """
    path = find_model(model)
    kind = clip if clip.is_clip(path) else encoder
    if kind is encoder:
        config = _config(path)
        if config.causal and config.head == "language_model" and not (path / MODULES).is_file():
            return language_model.load(path, **options)
    if options := {name: value for name, value in options.items() if value is not None}:
        raise UserError(f"{path}: this model does not generate text, so it takes no {', '.join(options)}")
    loaded = kind.load(path)
    loaded.name = stored_name(path) or loaded.name
    return loaded


def as_encoder(model: Any) -> Encoder:
    """The encoder in what `load` returned.

    Raises:
        UserError: for the towers of CLIP, which have their own methods, or anything else.
    """
    if isinstance(model, LanguageModel):
        return Encoder.of(model)
    if not isinstance(model, Encoder):
        remedy = "use its embed_texts and embed_images" if isinstance(model, Clip) else "load a model folder"
        raise UserError(f"{type(model).__name__} is no encoder of texts; {remedy}")
    return model


def _config(path: Path) -> ModelConfig:
    gguf = gguf_path(path)
    if gguf is None:
        return read_config(path)
    try:
        return registry.from_hf(GGUFFile(gguf).config_values())
    except UserError as error:
        raise UserError(f"{gguf}: {error}") from None
