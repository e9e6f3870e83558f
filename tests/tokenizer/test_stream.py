"""Streamed text: whole characters only, and joined it is what decode gives."""

import random
from collections.abc import Callable

from lalia.tokenizer.bpe import Tokenizer
from lalia.tokenizer.stream import TextStream

REPLACEMENT = "\ufffd"


def byte_ids(tokenizer: Tokenizer, content: bytes) -> list[int]:
    """One single-byte token per byte: the finest split there is."""
    id_of = {tokenizer.token_bytes(i): i for i in range(256)}
    return [id_of[bytes([byte])] for byte in content]


def test_every_split_of_a_character_is_held_back(tokenizer: Tokenizer) -> None:
    text = "a\U0001f469\u200d\U0001f4bb\u4f60\u597d\u00e9 \U0001f1e9\U0001f1ea!"
    stream = TextStream(tokenizer)
    pieces = [stream.push(i) for i in byte_ids(tokenizer, text.encode("utf-8"))]
    assert REPLACEMENT not in "".join(pieces)
    assert [piece for piece in pieces if piece] == list(text)
    assert stream.flush() == ""
    # The control: decoding each token by itself, as a naive stream does, breaks the characters.
    naive = "".join(tokenizer.decode([i]) for i in byte_ids(tokenizer, text.encode("utf-8")))
    assert REPLACEMENT in naive


def test_joined_pieces_equal_decode(tokenizer: Tokenizer, random_texts: Callable[..., list[str]]) -> None:
    draw = random.Random(0)
    sequences = [tokenizer.encode(text) for text in random_texts(100, seed=5)]
    sequences += [[draw.randrange(tokenizer.vocab_size) for _ in range(60)] for _ in range(100)]  # invalid UTF-8 too
    for ids in sequences:
        stream = TextStream(tokenizer)
        assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)


def test_invalid_bytes_and_the_end(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    first, second, letter = byte_ids(tokenizer, b"\xf0\x9fa")
    assert [stream.push(first), stream.push(second)] == ["", ""]
    assert stream.push(tokenizer.turn_end_id) == ""  # a special says nothing
    assert stream.push(letter) == REPLACEMENT + "a"  # no continuation can save these bytes
    assert stream.push(first) == ""
    assert stream.flush() == REPLACEMENT
    assert stream.push(letter) + stream.flush() == "a"
