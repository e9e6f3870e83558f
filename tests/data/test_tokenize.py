"""The tokenize stage: shards hold the documents' own bytes, and the tokenizer has seen the training split only."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from lalia.data.documents import Document, write_documents
from lalia.data.shards import TokenShards
from lalia.data.tokenize import sample, tokenize
from lalia.errors import UserError
from lalia.progress import Progress
from lalia.tokenizer.bpe import Tokenizer
from lalia.tokenizer.config import TokenizerConfig


def make_documents(count: int, seed: int, letters: str = "aeiounstrl") -> list[Document]:
    words = random.Random(99)
    known = ["".join(words.choice(letters) for _ in range(words.randrange(2, 8))) for _ in range(150)]
    draw = random.Random(seed)
    texts = [" ".join(draw.choice(known) for _ in range(300)) + "\n\u00e9\U0001f600<|im_end|>\n" for _ in range(count)]
    return [Document(f"{seed}-{i}", text, "made here", "CC0-1.0", "en") for i, text in enumerate(texts)]


def run(folder: Path, train: list[Document], validation: list[Document], vocab_size: int = 384) -> tuple[Path, dict]:
    write_documents(folder / "documents", "train", train)
    write_documents(folder / "documents", "validation", validation)
    out = folder / "tokens"
    return out, tokenize(TokenizerConfig(vocab_size=vocab_size), folder / "documents", out, Progress(quiet=True))


def test_the_shards_hold_the_documents(tmp_path: Path) -> None:
    splits = {"train": make_documents(12, 0), "validation": make_documents(3, 1)}
    out, summary = run(tmp_path, splits["train"], splits["validation"])
    tokenizer = Tokenizer.load(out / "tokenizer")
    specials = np.array(list(tokenizer.special.values()))
    for split, documents in splits.items():
        shards = TokenShards.open(out, split, verify=True)
        assert shards.tokenizer_sha256 == tokenizer.sha256 == summary["tokenizer_sha256"]
        assert shards.num_documents == len(documents)
        for number, document in enumerate(documents):
            ids = shards.document(number)
            assert ids[0] == tokenizer.end_of_text_id and not np.isin(ids[1:], specials).any()
            assert tokenizer.decode(ids.tolist()) == document.text
        num_bytes = sum(len(document.text.encode()) for document in documents)
        assert shards.num_bytes == summary[split]["num_bytes"] == num_bytes
        assert tokenizer.token_bytes_table()[shards.tokens].sum() == num_bytes
        ordinary = shards.num_tokens - shards.num_documents
        assert summary[split]["bytes_per_token"] == pytest.approx(num_bytes / ordinary, abs=1e-4)
    used = np.unique(TokenShards.open(out, "train").tokens)
    assert summary["unused_tokens"] == 384 - 16 - (len(used) - 1)
    assert summary["comparison"]["ours"]["available"]
    json.dumps(summary)  # the pipeline writes it as the receipt


def test_validation_text_does_not_shape_the_vocabulary(tmp_path: Path) -> None:
    train = make_documents(12, 0)
    first, _ = run(tmp_path / "a", train, make_documents(3, 1))
    second, _ = run(tmp_path / "b", train, make_documents(3, 1, letters="qwzxjkv"))
    third, _ = run(tmp_path / "c", make_documents(12, 0, letters="qwzxjkv"), make_documents(3, 1))  # the control
    hashes = [Tokenizer.load(out / "tokenizer").sha256 for out in (first, second, third)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the validation split has no documents"):
        run(tmp_path, make_documents(3, 0), [])
    with pytest.raises(UserError, match="vocab_size = 8192 is more than this text supports"):
        run(tmp_path, make_documents(3, 0), make_documents(1, 1), vocab_size=8192)


def test_sample_takes_the_beginnings_of_documents_evenly() -> None:
    documents = [Document(str(i), chr(0x4E00 + i) * 10_000, "", "", "") for i in range(100)]
    texts = sample(documents, 100_000)
    assert sum(len(text.encode()) for text in texts) <= 100_000
    assert len(texts) == 24 and all(len(text.encode()) > 4000 for text in texts)
    assert len({text[0] for text in texts}) == 24
    assert sample(documents[:1], 10**9) == [documents[0].text]
