"""A tokenizer of Lalia's for the tiny models."""

from pathlib import Path

import pytest

from lalia.tokenizer.bpe import Tokenizer, train_tokenizer
from lalia.tokenizer.config import TokenizerConfig
from tests.formats.gguf.models import VOCAB

TEXT = [
    "The quick brown fox jumps over the lazy dog while 12 of 345 birds sing in the early morning light.",
    "Ein Modell der Sprache, aus nichts gebaut; man sieht hinein. \u00dcber \u00c4pfel und \u00d6fen.",
    "def add(one, other):\n    return one + other\n",
] * 4


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXT, TokenizerConfig(vocab_size=VOCAB)).save(folder, chat=True)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)
