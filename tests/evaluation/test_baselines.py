"""Baselines: exact where a formula exists, in the order that their methods promise, and frank about limits."""

import lzma
import math

import pytest

from lalia.errors import UserError
from lalia.evaluation import baselines as module
from lalia.evaluation.baselines import baselines

WORDS = ["the", "king", "and", "queen", "shall", "ride", "to", "battle", "upon", "a", "horse", "of", "iron", "while"]
TRAIN = [" ".join(WORDS[(i * i + j * 3) % len(WORDS)] for j in range(60)) for i in range(40)]
VALIDATION = [" ".join(WORDS[(i * i + j * 3 + 1) % len(WORDS)] for j in range(50)) for i in range(3)]


class Words:
    """A tokenizer of whole words."""

    vocab_size = len(WORDS)

    def encode(self, text: str) -> list[int]:
        return [WORDS.index(word) for word in text.split()]


def by_name(rows):
    return {row["name"]: row["bits_per_byte"] for row in rows}


def test_figures_that_a_formula_gives():
    found = by_name(baselines(TRAIN, VALIDATION))
    assert found["uniform bytes"] == 8.0
    train, validation = "".join(TRAIN).encode(), "".join(VALIDATION).encode()
    bits = -sum(math.log2((train.count(byte) + 1) / (len(train) + 256)) for byte in validation)
    assert found["byte frequencies"] == pytest.approx(bits / len(validation), rel=1e-12)

    def size(content):
        return len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))

    assert found["xz -9e"] == 8 * (size(train + validation) - size(train)) / len(validation)


def test_each_row_says_what_it_is():
    rows = baselines(TRAIN, VALIDATION, Words())
    assert [row["name"] for row in rows] == [
        "uniform bytes",
        "byte frequencies",
        "xz -9e",
        "5-gram bytes",
        "8-gram bytes",
        "5-gram tokens",
    ]
    assert all(row["how"] and row["seconds"] >= 0 for row in rows)
    assert "covers all of it" in rows[2]["how"]


def test_context_beats_frequencies_and_training_text_matters():
    found = by_name(baselines(TRAIN, VALIDATION, Words()))
    assert found["5-gram tokens"] < found["5-gram bytes"] < found["byte frequencies"] < found["uniform bytes"]
    unrelated = by_name(baselines(["0123456789" * 300], VALIDATION))
    assert unrelated["5-gram bytes"] > 2 * found["5-gram bytes"]


def test_bytes_are_counted_and_not_characters():
    rows = by_name(baselines(["\u00e9" * 50], ["\u00e9" * 10]))
    assert rows["uniform bytes"] == 8.0
    assert rows["byte frequencies"] == pytest.approx(-math.log2(51 / 356))


def test_says_when_not_all_of_the_training_text_was_used():
    limited = baselines(TRAIN, VALIDATION, max_training_bytes=1000)
    total = sum(map(len, TRAIN))
    assert f"the first 1,000 of {total:,} training bytes" in limited[3]["how"]
    assert "the first" not in baselines(TRAIN, VALIDATION)[3]["how"]
    assert by_name(limited)["8-gram bytes"] > by_name(baselines(TRAIN, VALIDATION))["8-gram bytes"]


def test_says_when_the_dictionary_of_xz_is_too_small(monkeypatch):
    monkeypatch.setattr(module, "XZ_DICTIONARY_BYTES", 100)
    assert "does not cover" in baselines(TRAIN, VALIDATION)[2]["how"]


def test_cutting_keeps_whole_characters():
    assert module._first_bytes(["a\u00e9b", "c"], 2) == ["a"]
    assert module._first_bytes(["a\u00e9b", "c"], 5) == ["a\u00e9b", "c"]


def test_nothing_to_score_is_an_error():
    with pytest.raises(UserError, match="validation text is empty"):
        baselines(TRAIN, [""])
