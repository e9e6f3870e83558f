"""CLIP: texts and images as vectors of one space, in which a picture is near to what is said of it.

Radford et al. 2021, arXiv 2103.00020.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lalia.errors import CorruptFile, UserError
from lalia.files import read_json
from lalia.formats.hf_folder import CONFIG, load_model
from lalia.model.transformer import Transformer
from lalia.tokenizer.tokenizer import Tokenizer

PREPROCESSOR = "preprocessor_config.json"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the colours of the images that CLIP was trained on."""


@dataclass(frozen=True)
class Preprocessing:
    """From an image to pixels: the shorter side scaled to `resize` by bicubic interpolation, the middle cut out."""

    resize: int = 224
    crop: int = 224
    scale: float = 1 / 255
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD


class Clip:
    """The two towers and the tokenizer of a CLIP folder. `lalia.load(folder)` returns one.

    Attributes:
        text, vision: the towers.
        dim: length of a vector.
        end_id: the id that ends a text; its state is the text's. None means the largest id of the text, as in models
            made before config.json said which it is.
        max_length: longest text in tokens.
    """

    def __init__(
        self,
        text: Transformer,
        vision: Transformer,
        tokenizer: Tokenizer,
        preprocessing: Preprocessing,
        end_id: int | None = None,
        name: str = "clip",
    ) -> None:
        self.text, self.vision, self.tokenizer, self.name = text, vision, tokenizer, name
        self.preprocessing, self.end_id = preprocessing, end_id
        self.dim = text.config.projection_size or text.config.hidden_size
        self.max_length = text.config.max_position_embeddings

    def embed_texts(self, texts: Sequence[str], batch_size: int = 32) -> np.ndarray:
        """One vector of length one for each text, (texts, dim) float32.

        Raises:
            UserError: if a text is longer than `max_length` tokens.
        """
        if isinstance(texts, str):
            raise UserError("expected a list of texts, got one string; write [text]")
        ids = [encoded.ids for encoded in self.tokenizer.encode_with_specials(texts)]
        for number, row in enumerate(ids):
            if len(row) > self.max_length:
                raise UserError(f"text {number} has {len(row)} tokens, this model reads {self.max_length}; shorten it")
        vectors = []
        for start in range(0, len(ids), batch_size):
            vectors.append(_normalized(self.text_features(ids[start : start + batch_size])))
        return torch.cat(vectors).numpy() if vectors else np.empty((0, self.dim), dtype=np.float32)

    def embed_images(self, images: Sequence[Any], batch_size: int = 32) -> np.ndarray:
        """One vector of length one for each image, (images, dim) float32.

        Args:
            images: paths, or images of PIL.

        Raises:
            UserError: if Pillow is not installed, or a file is no image.
        """
        vectors = []
        for start in range(0, len(images), batch_size):
            pixels = torch.stack(
                [preprocess(image, self.preprocessing) for image in images[start : start + batch_size]]
            )
            vectors.append(_normalized(self.image_features(pixels)))
        return torch.cat(vectors).numpy() if vectors else np.empty((0, self.dim), dtype=np.float32)

    @torch.inference_mode()
    def text_features(self, ids: Sequence[list[int]]) -> Tensor:
        """Projected states at the end of each text, not scaled: (texts, dim) float32."""
        longest = max(map(len, ids))
        # Causal: what comes behind a text's end changes nothing before it, so padding needs no mask.
        tokens = torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in ids])
        hidden = self.text(tokens.to(self.text.device))
        if self.end_id is None:
            ends = tokens.argmax(-1)
        else:
            ends = (tokens == self.end_id).int().argmax(-1)
        pooled = hidden[torch.arange(len(ids)), ends.to(hidden.device)]
        return _projected(self.text, pooled).float().cpu()

    @torch.inference_mode()
    def image_features(self, pixels: Tensor) -> Tensor:
        """Projected states of the class token, not scaled: pixels (images, channels, side, side) -> (images, dim)."""
        vision = self.vision
        # The last norm is of each position by itself, so the first may be taken after it.
        return _projected(vision, vision(pixels.to(vision.device))[:, 0]).float().cpu()


def is_clip(folder: Path) -> bool:
    """Whether a folder holds both towers."""
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # whoever loads it says what is wrong
        return False
    return isinstance(values, dict) and values.get("model_type") == "clip"


def load(folder: Path | str) -> Clip:
    """Load a CLIP folder.

    Raises:
        UserError, CorruptFile: if it is no complete model folder.
    """
    folder = Path(folder)
    text, vision = load_model(folder, part="text"), load_model(folder, part="vision")
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > text.config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens but the text tower {text.config.vocab_size}; "
            "this tokenizer belongs to another model"
        )
    inner = read_json(folder / CONFIG).get("text_config") or {}
    end_id = inner.get("eos_token_id", 49407)
    if type(end_id) is not int:
        raise CorruptFile(f"{folder / CONFIG}: eos_token_id = {end_id!r}; expected an integer")
    preprocessing = read_preprocessing(folder)
    if preprocessing.crop != vision.config.image_size:
        raise UserError(
            f"{folder / PREPROCESSOR} makes images of {preprocessing.crop} pixels, the vision tower reads "
            f"{vision.config.image_size}; take both from the same model"
        )
    # 2 was written by mistake in the first folders, whose texts end in the largest id.
    return Clip(text, vision, tokenizer, preprocessing, None if end_id == 2 else end_id, folder.resolve().name)


def read_preprocessing(folder: Path) -> Preprocessing:
    """What preprocessor_config.json says.

    Raises:
        UserError: if it asks for anything but CLIP's steps.
        CorruptFile: if it is missing or damaged.
    """
    path = folder / PREPROCESSOR
    values = read_json(path)
    if not isinstance(values, dict):
        raise CorruptFile(f"{path} is no JSON object; copy the model folder again")
    steps = {"do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True, "resample": 3}
    other = [f"{key} = {values[key]!r}" for key, usual in steps.items() if values.get(key, usual) != usual]
    if other:
        raise UserError(f"{path}: {', '.join(other)} is not implemented; Lalia resizes (bicubic), crops and normalizes")
    crop: Any = values.get("crop_size", 224)
    if isinstance(crop, dict):
        crop = crop.get("height") if crop.get("height") == crop.get("width") else None
    size: Any = values.get("size", 224)
    if isinstance(size, dict):
        size = size.get("shortest_edge")
    mean, std = values.get("image_mean", MEAN), values.get("image_std", STD)
    scale = values.get("rescale_factor", 1 / 255)
    sizes_right = all(type(side) is int and 0 < side <= 4096 for side in (crop, size))
    colours_right = all(isinstance(c, list | tuple) and len(c) == 3 and all(map(_number, c)) for c in (mean, std))
    if not (sizes_right and colours_right and _number(scale) and all(std)):
        raise UserError(
            f"{path}: size {values.get('size')!r}, crop_size {values.get('crop_size')!r}, image_mean {mean!r}, "
            f"image_std {std!r}, rescale_factor {scale!r}; expected the shortest edge, a square, and three colours"
        )
    return Preprocessing(size, crop, scale, tuple(mean), tuple(std))


def preprocess(image: Any, settings: Preprocessing) -> Tensor:
    """Pixels (3, crop, crop) float32 of an image, which is a path or an image of PIL.

    Raises:
        UserError: if Pillow is not installed, or the file is no image.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ModuleNotFoundError:
        raise UserError('reading images needs Pillow; install it with: pip install "lalia[image]"') from None
    if isinstance(image, str | Path):
        try:
            with Image.open(image) as file:
                image = file.convert("RGB")
        except (UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise UserError(f"{image} is no image that can be read ({error})") from None
    if not isinstance(image, Image.Image):
        raise UserError(f"expected the path of an image or an image of PIL, got {type(image).__name__}")
    image = image.convert("RGB")
    width, height = image.size
    shorter = min(width, height)
    width, height = width * settings.resize // shorter, height * settings.resize // shorter
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - settings.crop) // 2, (height - settings.crop) // 2
    # Where the crop is larger than the image, PIL fills up with black.
    image = image.crop((left, top, left + settings.crop, top + settings.crop))
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)) * settings.scale  # (crop, crop, 3)
    return ((pixels - torch.tensor(settings.mean)) / torch.tensor(settings.std)).permute(2, 0, 1)


def _projected(tower: Transformer, states: Tensor) -> Tensor:
    return states if tower.projection is None else tower.project(states)


def _normalized(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=-1)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
