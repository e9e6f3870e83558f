"""Tokenizers from SentencePiece `.model` files.

The file is a protocol buffer: pieces (text, score, kind), how it was trained, how it normalizes. The few fields that
matter are read here, with every length checked against the file; the package sentencepiece is not needed.
"""

import base64
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lalia.errors import CorruptFile, UserError
from lalia.tokenizer.importers.build import BYTE, NORMAL, UNKNOWN, Piece, sentencepiece_tokenizer
from lalia.tokenizer.tokenizer import Tokenizer

UNIGRAM, BPE = 1, 2
# Numbers of the fields in the published sentencepiece_model.proto.
_PIECES, _TRAINER, _NORMALIZER, _DENORMALIZER = 1, 2, 3, 5
_MODEL_TYPE, _SPACE_AS_SUFFIX, _UNK_ID, _BOS_ID, _EOS_ID, _PAD_ID = 3, 24, 40, 41, 42, 43
_CHARSMAP, _ADD_SPACE, _REMOVE_EXTRA, _ESCAPE = 2, 3, 4, 5


def tokenizer_from_sentencepiece(path: Path | str, add_bos: bool = False, add_eos: bool = False) -> Tokenizer:
    """Read a `.model` file of the types BPE and unigram.

    Args:
        path: the file.
        add_bos, add_eos: what `encode_with_specials` puts around a text. The file does not say; Llama and Gemma begin
            with bos, T5 ends with eos.

    Raises:
        UserError: if there is no such file, or it has a type or option that Lalia does not know.
        CorruptFile: if it is cut short or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is no file; give a SentencePiece .model file")
    what = str(path)
    pieces: list[Piece] = []
    sections: dict[int, dict[int, Any]] = {_TRAINER: {}, _NORMALIZER: {}, _DENORMALIZER: {}}
    for number, value in _fields(path.read_bytes(), what):
        if number == _PIECES:
            pieces.append(_piece(_message(value, what), what, len(pieces)))
        elif number in sections:
            sections[number] |= dict(_fields(_message(value, what), what))
    trainer, normalizer = sections[_TRAINER], sections[_NORMALIZER]
    if not pieces:
        raise CorruptFile(f"{what} has no pieces; it is no SentencePiece model, or cut short: get it again")
    if not trainer or not normalizer:  # cut between two fields, which by themselves are whole
        raise CorruptFile(f"{what} is cut short: how it was trained or how it normalizes is missing; get it again")
    kind = trainer.get(_MODEL_TYPE, UNIGRAM)
    if kind not in (UNIGRAM, BPE):
        raise UserError(f"{what} has the SentencePiece type {kind!r}; Lalia knows unigram (1) and BPE (2)")
    if trainer.get(_SPACE_AS_SUFFIX) or normalizer.get(_ESCAPE, 1) == 0 or sections[_DENORMALIZER].get(_CHARSMAP):
        raise UserError(f"{what} puts spaces behind words, or does not escape them, or denormalizes; Lalia does not")
    charsmap = normalizer.get(_CHARSMAP) or None
    if charsmap is not None:
        check_charsmap(_message(charsmap, what), what)
    unk = next((i for i, piece in enumerate(pieces) if piece.kind == UNKNOWN), None)
    ids = {name: _id(trainer.get(field, default), len(pieces), what) for name, field, default in (
        ("bos", _BOS_ID, 1), ("eos", _EOS_ID, 2), ("pad", _PAD_ID, -1))}  # fmt: skip
    if (add_bos and ids["bos"] is None) or (add_eos and ids["eos"] is None):
        raise UserError(f"{what} has no bos or eos token to add; leave add_bos and add_eos away")
    roles = {**ids, "unk": unk}
    return sentencepiece_tokenizer(
        pieces,
        kind == UNIGRAM,
        unk,
        {f"{role}_token": None if i is None else pieces[i].text for role, i in roles.items()},
        what=what,
        add_space=bool(normalizer.get(_ADD_SPACE, 1)),
        remove_extra_spaces=bool(normalizer.get(_REMOVE_EXTRA, 1)),
        charsmap=base64.b64encode(charsmap).decode() if charsmap else None,
        bos_id=ids["bos"] if add_bos else None,
        eos_id=ids["eos"] if add_eos else None,
    )


def check_charsmap(content: bytes, what: str) -> None:
    """A precompiled normalizer is the size of its index, the index (a double array of 4-byte units), and the texts.

    Raises:
        CorruptFile: if the size does not fit, the texts do not end or are no UTF-8.
    """
    size = int.from_bytes(content[:4], "little")
    texts = content[4 + size :]
    try:
        texts.decode("utf-8")
    except UnicodeDecodeError:
        texts = b""
    if len(content) < 8 or size == 0 or size % 4 or 4 + size > len(content) or not texts.endswith(b"\0"):
        raise CorruptFile(f"{what}: its precompiled normalizer is damaged ({len(content)} bytes); get the file again")


def _piece(content: bytes, what: str, number: int) -> Piece:
    values = dict(_fields(content, what))
    try:
        text = _message(values.get(1, b""), what).decode("utf-8")
    except UnicodeDecodeError:
        text = ""
    score, kind = values.get(2, 0.0), values.get(3, NORMAL)
    if not text or not isinstance(score, float) or not math.isfinite(score) or not NORMAL <= kind <= BYTE:
        raise CorruptFile(f"{what}: piece {number} has no text, score or kind that makes sense; get the file again")
    return Piece(text, score, kind)


def _id(value: Any, num_pieces: int, what: str) -> int | None:
    if not isinstance(value, int):
        raise CorruptFile(f"{what}: an id is no number; get the file again")
    if value >= 1 << 63:  # negative numbers are written in 64 bits
        return None
    if value < 0:
        return None
    if value >= num_pieces:
        # The defaults of a file that does not say may lie outside a tiny vocabulary; so may those of a damaged one.
        raise CorruptFile(f"{what}: the id {value} is outside its {num_pieces} pieces; get the file again")
    return value


def _message(value: Any, what: str) -> bytes:
    if not isinstance(value, bytes):
        raise CorruptFile(f"{what}: a field is a number where a text or group is expected; get the file again")
    return value


def _fields(content: bytes, what: str) -> Iterator[tuple[int, Any]]:
    """Field numbers and values of a protocol buffer message: int, float or bytes."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            if place >= len(content) or shift > 63:
                raise CorruptFile(f"{what} is cut short or damaged at byte {place} of a field; get it again")
            byte = content[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while place < len(content):
        key = varint()
        number, wire = key >> 3, key & 7
        if wire == 0:
            yield number, varint()
            continue
        size = varint() if wire == 2 else {1: 8, 5: 4}.get(wire, -1)
        if size < 0 or place + size > len(content):
            raise CorruptFile(f"{what} is cut short or damaged: field {number} has {size} bytes; get it again")
        value = content[place : place + size]
        place += size
        yield number, struct.unpack("<f", value)[0] if wire == 5 else value
