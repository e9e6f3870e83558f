"""Texts to train tiny tokenizers on, and texts that no tokenizer is trained on."""

import random
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORDS = [
    "the", "Hello", "caf\u00e9", "na\u00efve", "WORLD", "don't", "it'S", "we'll", "x=1;", "def f(x):", "return",
    "\u4f60\u597d", "\u4e16\u754c", "\u0440\u0443\u0441\u0441\u043a\u0438\u0439", "\u0645\u0631\u062d\u0628\u0627",
    "\u05e9\u05dc\u05d5\u05dd", "\u0939\u093f\u0928\u094d\u0926\u0940", "\u0e44\u0e17\u0e22", "\ud55c\uad6d\uc5b4",
    "\u65e5\u672c\u8a9e\u30c6\u30ad\u30b9\u30c8", "1234567890", "3.14", "\u0663\u0664",
]  # fmt: skip
LITERALS = [
    "<|im_end|>", "<s>", "</s>", "<unk>", "[CLS]", "[MASK]", "[UNK]", "<0x41>", "<0x0A>", "<|endoftext|>", "<pad>",
    "<bos>", "<mask>", "<|startoftext|>", "</w>",
]  # fmt: skip
ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyz ", "ABC xyz", "\u00e9\u00e8\u00fc\u00df\u0301\u0308",
    "\U0001f600\U0001f469\u200d\U0001f4bb\U0001f1e9\U0001f1ea\ufe0f\U0001f3fd",
    "\n\r\t  \u00a0\u3000\u2028\u0085\u200b", "0123456789\u00b2\u2167\u00bd", "{}()<|>_=.,'\"!?#$%^&*+-/\\~`@[]:;",
    "\x00\x01\x07\x1b\x7f\ufffd\ue000\ufeff\u200f\u202e", "\u2047 \u017f\u212a\ufb01\uff21\u3392", " ", "\n", " \n",
    "a",
]  # fmt: skip
FIXED = ["", " ", "  ", " a", "a ", "\n", "\t\t", "a" * 300, "ab " * 50, " " * 77, "\r\n\r\n \n", "z" * 5000]


def fuzzed_texts(count: int, seed: int = 0, literals: bool = True) -> list[str]:
    """Scripts, emoji, code, white space runs, control characters and (unless told not to) literals of specials."""
    draw = random.Random(seed)
    words = WORDS + (LITERALS if literals else [])
    texts = list(FIXED)
    while len(texts) < count:
        parts: list[str] = []
        for _ in range(draw.randrange(1, 14)):
            if draw.random() < 0.45:
                parts.append(draw.choice(["", " ", " ", "  ", "\n"]) + draw.choice(words))
            else:
                alphabet = draw.choice(ALPHABETS)
                parts.append("".join(draw.choice(alphabet) for _ in range(draw.randrange(1, 9))))
        texts.append("".join(parts))
    if not literals:
        texts = [text for text in texts if not any(literal in text for literal in LITERALS)]
    return texts


def training_lines() -> list[str]:
    """The repository's own documentation and code, and a few fuzzed texts for their scripts."""
    paths = [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "src" / "lalia" / "tokenizer").rglob("*.py"))]
    lines = [line for path in paths for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return lines + [text for text in fuzzed_texts(300, seed=5, literals=False) if text.strip() and "\0" not in text]
