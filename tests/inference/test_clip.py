"""CLIP's towers against transformers' CLIPModel, and the same comparisons with one thing wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import lalia
from lalia.errors import UserError
from lalia.files import read_json, write_json
from lalia.inference.clip import Clip, preprocess, read_preprocessing

WORDS = ["a", "photo", "of", "the", "cat", "dog", "sun", "moon", "at", "night", "by", "day", "red", "blue"]
TEXTS = ["a photo of the cat", "dog", "the red moon by night at day a sun", "a blue photo"]
TOLERANCE = 1e-5
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def make_folder(folder: Path, eos_token_id: int) -> Path:
    """A tiny random CLIP; its tokenizer knows WORDS and ends texts with the id 17, the vocabulary's last but one."""
    vocabulary = {word: number for number, word in enumerate([*WORDS, "<unk>", "<|startoftext|>", "<|endoftext|>"])}
    ids = (vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"])
    backend = Backend(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    backend.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    backend.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[("<|startoftext|>", ids[0]), ("<|endoftext|>", ids[1])],
    )
    torch.manual_seed(3)
    config = transformers.CLIPConfig(
        text_config={**TOWER, "vocab_size": 20, "max_position_embeddings": 16, "eos_token_id": eos_token_id},
        vision_config={**TOWER, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape) * 0.1)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    write_json(folder / "tokenizer_config.json", settings)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "clip", eos_token_id=len(WORDS) + 2)


def features(output: Any) -> torch.Tensor:
    """get_text_features gives a tensor, or in newer versions an output with one."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def their_texts(folder: Path) -> torch.Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model: Any = transformers.CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        return features(model.get_text_features(**tokenizer(TEXTS, padding=True, return_tensors="pt")))


def make_image(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack((np.sin(x / 5), np.cos(y / 7), np.sin((x + y) / 9)), -1)
    return Image.fromarray((127 + 120 * waves).astype(np.uint8))


def difference(one: Any, other: Any) -> float:
    return float(np.abs(np.asarray(one) - np.asarray(other)).max())


@pytest.mark.parametrize("eos_token_id", [len(WORDS) + 2, 2])  # named, or the old mistake: the largest id
def test_text_features(tmp_path: Path, eos_token_id: int) -> None:
    clip = lalia.load(make_folder(tmp_path / "clip", eos_token_id))
    assert isinstance(clip, Clip) and clip.dim == 24 and (clip.end_id is None) == (eos_token_id == 2)
    theirs = their_texts(tmp_path / "clip")
    ids = [encoded.ids for encoded in clip.tokenizer.encode_with_specials(TEXTS)]
    assert difference(clip.text_features(ids), theirs) < TOLERANCE
    unit = torch.nn.functional.normalize(theirs, dim=-1)
    assert difference(clip.embed_texts(TEXTS, batch_size=3), unit) < TOLERANCE
    clip.end_id = 0  # "a": another state is the text's
    assert difference(clip.embed_texts(TEXTS), unit) > 1e-3


def test_image_features_of_the_same_pixels(folder: Path) -> None:
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model: Any = transformers.CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        theirs = features(model.get_image_features(pixel_values=pixels))
    clip = lalia.load(folder)
    assert difference(clip.image_features(pixels), theirs) < TOLERANCE
    assert difference(clip.image_features(pixels.flip(-1)), theirs) > 1e-3


@pytest.mark.parametrize("size", [(50, 40), (40, 50), (32, 32), (33, 100), (20, 90)])
def test_preprocessing(folder: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    image = make_image(*size)
    image.save(tmp_path / "image.png")
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    theirs = np.asarray(processor(image, return_tensors="np")["pixel_values"][0])
    settings = read_preprocessing(folder)
    assert settings.resize == settings.crop == 32
    ours = preprocess(tmp_path / "image.png", settings)
    assert ours.shape == (3, 32, 32)
    assert difference(ours, theirs) < 1e-5
    if size != (32, 32):
        squeezed = preprocess(image.resize((32, 32)), settings)
        assert difference(squeezed, theirs) > 1e-2


def test_a_picture_and_its_texts(folder: Path, tmp_path: Path) -> None:
    clip = lalia.load(folder)
    make_image(60, 40).convert("L").save(tmp_path / "grey.png")
    vectors = clip.embed_images([tmp_path / "grey.png", make_image(60, 40)])
    assert vectors.shape == (2, 24) and difference((vectors**2).sum(1), [1, 1]) < TOLERANCE
    assert clip.embed_images([]).shape == clip.embed_texts([]).shape == (0, 24)


def test_bad_input(folder: Path, tmp_path: Path) -> None:
    clip = lalia.load(folder)
    (tmp_path / "no.png").write_text("no image", encoding="utf-8")
    with pytest.raises(UserError, match=r"no\.png is no image"):
        clip.embed_images([tmp_path / "no.png"])
    with pytest.raises(UserError, match="got int"):
        clip.embed_images([5])
    with pytest.raises(UserError, match="text 1 has 22 tokens, this model reads 16"):
        clip.embed_texts(["a", "dog " * 20])
    with pytest.raises(UserError, match="got one string"):
        clip.embed_texts("dog")
    with pytest.raises(UserError, match="use its embed_texts and embed_images"):
        lalia.embed(clip, ["dog"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_center_crop": False}, "do_center_crop = False is not implemented"),
        ({"resample": 2}, "resample = 2"),
        ({"crop_size": {"height": 32, "width": 30}}, "a square"),
        ({"crop_size": 16}, "makes images of 16 pixels, the vision tower reads 32"),
        ({"image_std": [0.2, 0.0, 0.2]}, "three colours"),
    ],
)
def test_other_preprocessing(folder: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    import shutil

    copy = Path(shutil.copytree(folder, tmp_path / "clip"))
    name = "preprocessor_config.json"
    write_json(copy / name, {**read_json(folder / name), **changes})
    assert json.loads((copy / name).read_text(encoding="utf-8"))
    with pytest.raises(UserError, match=message):
        lalia.load(copy)
