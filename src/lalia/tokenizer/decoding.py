"""What each token says: the bytes it adds to a text, from the decoder part of a tokenizer.json.

A decoder is a list of steps over the tokens of a text. Lalia needs the text of one token at a time, to stream it, so
the steps are applied to every token of the vocabulary once. Two things depend on the place: a token that begins a
text may say something else (SentencePiece drops the space it put in front; WordPiece has no space to put), and an
end-of-word suffix (CLIP) is a space that the end of the text drops.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lalia.errors import UserError

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""How SentencePiece vocabularies write a token that is one byte."""
METASPACE = "\u2581"
"""SentencePiece's stand-in for a space."""
# What WordPiece's decoder, and transformers' `clean_up_tokenization_spaces`, take back: each a blank too many.
CLEANED = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
           (" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))  # fmt: skip
_CLEANED_BY_TRANSFORMERS = tuple(pair for pair in CLEANED if pair[0] != " do not")


@dataclass
class TokenTexts:
    """Bytes of every token.

    Attributes:
        inner: by id, what the token says after other text; b"" for specials and for ids without a token.
        first: by id, what it says at the beginning of a text, where that is something else.
        drops_last_space: the last token's final space is no part of the text (end-of-word suffixes).
    """

    inner: list[bytes]
    first: dict[int, bytes] = field(default_factory=dict)
    drops_last_space: bool = False


@functools.cache
def byte_of_character() -> dict[str, int]:
    """The printable stand-ins of byte-level vocabularies (GPT-2): visible Latin-1 stays, others move past U+0100."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


@functools.cache
def character_of_byte() -> dict[int, str]:
    """`byte_of_character` the other way."""
    return {byte: character for character, byte in byte_of_character().items()}


def clean_up(text: str) -> str:
    """transformers' `clean_up_tokenization_spaces`: no blank before punctuation and English contractions."""
    for before, after in _CLEANED_BY_TRANSFORMERS:
        text = text.replace(before, after)
    return text


def decoder_steps(decoder: Any) -> list[dict[str, Any]]:
    """The steps of a decoder, sequences opened; [] for none."""
    if decoder is None:
        return []
    if decoder.get("type") == "Sequence":
        return [step for part in decoder["decoders"] for step in decoder_steps(part)]
    return [decoder]


def token_texts(
    decoder: Any, suffix: str | None, vocabulary: Mapping[str, int], specials: set[int], vocab_size: int
) -> TokenTexts:
    """Apply a decoder to every token.

    Args:
        decoder: the `decoder` of a tokenizer.json, None if it has none (tokens are then words between spaces).
        suffix: the end-of-word suffix of the model (CLIP's "</w>"), None or "" if it has none.
        vocabulary: tokens and their ids, added ones included.
        specials: ids that say nothing.
        vocab_size: one more than the largest id.

    Raises:
        UserError: for a decoder that is none of a text model.
    """
    steps = decoder_steps(decoder)
    kinds = [str(step.get("type")) for step in steps]
    texts = TokenTexts([b""] * vocab_size)
    for token, i in vocabulary.items():
        if i in specials:
            continue
        if suffix and token.endswith(suffix) and token != suffix:
            word = token.removesuffix(suffix)
            texts.inner[i] = (byte_level(word) if "ByteLevel" in kinds else word.encode("utf-8")) + b" "
            texts.drops_last_space = True
        elif kinds == ["ByteLevel"]:
            texts.inner[i] = byte_level(token)
        elif kinds in ([], ["WordPiece"]):
            inner, first = _word(token, steps[0] if steps else None)
            texts.inner[i] = inner.encode("utf-8")
            if first != inner:
                texts.first[i] = first.encode("utf-8")
        elif kinds == ["BPEDecoder"]:
            texts.inner[i] = token.encode("utf-8")
        else:
            inner, first = _sentencepiece(token, steps)
            texts.inner[i] = inner
            if first != inner:
                texts.first[i] = first
    return texts


def byte_level(token: str) -> bytes:
    """The bytes of a token of a byte-level vocabulary; one with other characters in it is its own text."""
    table = byte_of_character()
    try:
        return bytes([table[character] for character in token])
    except KeyError:
        return token.encode("utf-8")


def _word(token: str, step: dict[str, Any] | None) -> tuple[str, str]:
    """A WordPiece token inside a text (words bring their space) and at its beginning."""
    prefix = "##" if step is None else step.get("prefix", "##")
    inner = token.removeprefix(prefix) if step is not None and token.startswith(prefix) else " " + token
    first = token
    if step is not None and step.get("cleanup", True):
        for before, after in CLEANED:
            inner, first = inner.replace(before, after), first.replace(before, after)
    return inner, first


def _sentencepiece(token: str, steps: list[dict[str, Any]]) -> tuple[bytes, bytes]:
    """A token of a decoder made of Metaspace, Replace, ByteFallback, Fuse and Strip, inside a text and first in it."""
    text, content, drop_first = token, None, 0
    all_spaces_drop = fused = False
    for step in steps:
        kind = step.get("type")
        if kind == "Metaspace":
            scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
            all_spaces_drop = scheme != "never" and step.get("replacement", METASPACE) in text
            text = text.replace(step.get("replacement", METASPACE), " ")
        elif kind == "Replace" and isinstance(step.get("pattern"), dict) and "String" in step["pattern"]:
            text = text.replace(step["pattern"]["String"], step["content"])
        elif kind == "ByteFallback":
            byte = BYTE_TOKEN.fullmatch(text)
            content = bytes([int(byte[1], 16)]) if byte else None
        elif kind == "Fuse":
            fused = True
        elif kind == "Strip" and fused and step.get("content") == " " and not step.get("stop"):
            drop_first = step.get("start", 0)
        else:
            raise UserError(
                f"the tokenizer's decoder has the step {kind}, in a form that Lalia does not know; it reads byte-level "
                "BPE, SentencePiece (BPE and Unigram), WordPiece and CLIP tokenizers"
            )
    if drop_first > 1:
        raise UserError(f"the tokenizer's decoder strips {drop_first} spaces; Lalia knows none that strips more than 1")
    inner = content if content is not None else text.encode("utf-8")
    first = inner[1:] if drop_first and inner.startswith(b" ") else inner
    return inner, inner.replace(b" ", b"") if all_spaces_drop else first
