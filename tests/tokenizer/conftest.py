"""A small tokenizer, trained once."""

import random
from collections.abc import Callable

import pytest

from lalia.tokenizer.bpe import Tokenizer, train_tokenizer
from lalia.tokenizer.config import TokenizerConfig

WORDS = ["the", "and", "of", "to", "in", "that", "people", "time", "first", "were", "would", "their", "other", "said"]
ALPHABETS = ["abcdefg xyz", "\u00e9\u00e8\u00fc\u00df\u0301 ", "\u4f60\u597d\u4e16\u754c", "\u0440\u0443\u0441 ",
             "\U0001f600\U0001f469\u200d\U0001f4bb\U0001f1e9\U0001f1ea", "\n\r\t  \u00a0\u3000", "0123456789",
             "{}()<|>_=.,'\"", "\x00\x7f\ufffd\ue000"]  # fmt: skip
SPECIAL_LITERALS = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|pad|>", "<|reserved_3|>", "'s", "'LL"]


def make_random_texts(count: int, seed: int = 0) -> list[str]:
    """Texts that mix words, scripts, emoji, code, white space and the literals of special tokens."""
    draw = random.Random(seed)
    texts = [""]
    for _ in range(count - 1):
        parts: list[str] = []
        for _ in range(draw.randrange(1, 30)):
            kind = draw.random()
            if kind < 0.4:
                parts.append(draw.choice(["", " ", "  ", "\n"]) + draw.choice(WORDS))
            elif kind < 0.5:
                parts.append(draw.choice(SPECIAL_LITERALS))
            else:
                alphabet = draw.choice(ALPHABETS)
                parts.append("".join(draw.choice(alphabet) for _ in range(draw.randrange(1, 8))))
        texts.append("".join(parts))
    return texts


def make_training_texts() -> list[str]:
    """Enough different words for a vocabulary of 1,000 and more, each common enough to be merged."""
    draw = random.Random(1)
    words = WORDS + ["".join(draw.choice("aeiounstrl") for _ in range(draw.randrange(3, 9))) for _ in range(200)]
    return [" ".join(draw.choice(words) for _ in range(400)) + "\n" for _ in range(20)]


@pytest.fixture(scope="session")
def random_texts() -> Callable[..., list[str]]:
    return make_random_texts


@pytest.fixture(scope="session")
def training_texts() -> list[str]:
    return make_training_texts()


@pytest.fixture(scope="session")
def tokenizer(training_texts: list[str]) -> Tokenizer:
    return train_tokenizer(training_texts, TokenizerConfig(vocab_size=448))
