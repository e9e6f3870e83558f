"""What a model folder is loaded as: a language model, an encoder, or the two towers of CLIP."""

from pathlib import Path
from typing import Any

from lalia.errors import UserError
from lalia.formats.hf_folder import CONFIG, read_config
from lalia.inference import clip, encoder, language_model
from lalia.inference.clip import Clip
from lalia.inference.encoder import Encoder
from lalia.inference.language_model import LanguageModel


def load(folder: Path, **options: Any) -> LanguageModel | Encoder | Clip:
    """Load a model folder as what it is. `options` are those of `lalia.inference.language_model.load`.

    Raises:
        UserError: if it is no complete model folder, or options are given for a model that does not generate.
        CorruptFile: if a file of it is damaged.
    """
    kind = clip if clip.is_clip(folder) else encoder
    if kind is encoder and not ((folder / CONFIG).is_file() and encoder.is_encoder(read_config(folder), folder)):
        return language_model.load(folder, **options)
    if options:
        raise UserError(f"{folder}: this model does not generate text, so it takes no {', '.join(options)}")
    return kind.load(folder)


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
