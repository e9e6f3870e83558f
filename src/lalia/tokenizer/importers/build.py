"""Parts of a tokenizer.json, as the importers put it together."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from lalia.errors import CorruptFile
from lalia.tokenizer.decoding import METASPACE
from lalia.tokenizer.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of pieces, numbered as in SentencePiece and in GGUF's `token_type`."""
MAX_PIECE = 1000
"""Longest piece in characters whose merges are looked for."""


class Piece(NamedTuple):
    """A token of a SentencePiece vocabulary; its id is its place."""

    text: str
    score: float
    kind: int


def tokenizer_json(model: dict[str, Any], added: Sequence[dict[str, Any]], **parts: Any) -> str:
    """The text of a tokenizer.json; `parts`: normalizer, pre_tokenizer, post_processor, decoder."""
    content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": list(added)}
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        content[name] = parts.get(name)
    return json.dumps({**content, "model": model}, ensure_ascii=False)


def added_token(token: str, token_id: int, special: bool, normalized: bool = False) -> dict[str, Any]:
    """An entry of `added_tokens`: cut out of the text before the model sees it (a special: never)."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": normalized, "special": special}
    return {"id": token_id, "content": token, **flags}


def around(first: Sequence[tuple[str, int]], last: Sequence[tuple[str, int]]) -> dict[str, Any] | None:
    """The post-processor that puts specials (token, id) around a text, and around the second of a pair."""
    if not first and not last:
        return None

    def special(token: str, type_id: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": token, "type_id": type_id}}

    def sequence(name: str, type_id: int) -> list[dict[str, Any]]:
        # BERT closes both texts of a pair but opens only the first; Llama opens both.
        opens = first if type_id == 0 or not last else []
        text = {"Sequence": {"id": name, "type_id": type_id}}
        return [*(special(t, type_id) for t, _ in opens), text, *(special(t, type_id) for t, _ in last)]

    tokens = {token: {"id": token, "ids": [i], "tokens": [token]} for token, i in [*first, *last]}
    single = sequence("A", 0)
    pair = [*single, *sequence("B", 1)]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}


def ranked_merges(ranking: Iterable[str], tokens: Mapping[str, Any] | set[str]) -> list[list[str]]:
    """Merges that join any two tokens into a token, the best of the results first.

    SentencePiece and tiktoken keep no list of merges: they join the neighbours whose result ranks best. Where two
    pairs give the same result, the longer left side comes first here; they take the leftmost pair in the text, which
    differs only if both pairs overlap in it.

    Args:
        ranking: the tokens that may result, the best first.
        tokens: those that may be joined.
    """
    merges: list[list[str]] = []
    for whole in ranking:
        if len(whole) > MAX_PIECE:
            continue
        for cut in range(len(whole) - 1, 0, -1):
            left, right = whole[:cut], whole[cut:]
            if left in tokens and right in tokens:
                merges.append([left, right])
    return merges


def unique(tokens: Sequence[str], what: str) -> dict[str, int]:
    """Ids of tokens, in their order.

    Raises:
        CorruptFile: if one occurs twice.
    """
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        double = next(token for i, token in enumerate(tokens) if ids[token] != i)
        raise CorruptFile(f"{what}: the token {double!r:.80} occurs twice; get the file again")
    return ids


def sentencepiece_tokenizer(
    pieces: Sequence[Piece],
    unigram: bool,
    unk_id: int | None,
    settings: dict[str, Any],
    *,
    what: str,
    add_space: bool = True,
    remove_extra_spaces: bool = False,
    charsmap: str | None = None,
    bos_id: int | None = None,
    eos_id: int | None = None,
) -> Tokenizer:
    """A SentencePiece vocabulary as a Tokenizer.

    Args:
        pieces: the vocabulary, in the order of ids.
        unigram: the most probable pieces (arXiv 1804.10959); otherwise BPE by scores.
        unk_id: what unknown characters become, if there are no byte tokens.
        settings: content of tokenizer_config.json.
        what: the file's name, for errors.
        add_space: put a space before the text (`add_dummy_prefix`).
        remove_extra_spaces: one space between words, none around the text.
        charsmap: base64 of the precompiled normalizer, None for none.
        bos_id, eos_id: put before and behind a text by `encode_with_specials`.
    """
    ids = unique([piece.text for piece in pieces], what)
    user_defined = [piece.text for piece in pieces if piece.kind == USER_DEFINED]
    byte_fallback = any(piece.kind == BYTE for piece in pieces)
    unknown = None if unk_id is None else pieces[unk_id].text
    if unigram:
        scores = [piece.score for piece in pieces if piece.kind == NORMAL]
        # Not to be found in a text: `<0x41>` there is six characters. SentencePiece leaves such pieces out of its
        # search; the tokenizers library has no way to, so they cost more than any text.
        never = min(scores, default=0.0) - 10_000
        vocab = [[p.text, never if p.kind in (BYTE, UNUSED) else p.score] for p in pieces]
        model = {"type": "Unigram", "unk_id": unk_id, "vocab": vocab, "byte_fallback": byte_fallback}
    else:
        normal = sorted((p for p in pieces if p.kind == NORMAL), key=lambda p: -p.score)  # stable: then by id
        merges = ranked_merges([p.text for p in normal], {p.text for p in normal})
        model = {
            "type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": byte_fallback, "ignore_merges": False,
            "vocab": ids, "merges": merges,
        }  # fmt: skip
    added = [
        added_token(p.text, i, special=p.kind != USER_DEFINED, normalized=p.kind == USER_DEFINED)
        for i, p in enumerate(pieces)
        if p.kind in (CONTROL, UNKNOWN, USER_DEFINED)
    ]
    decoder: list[dict[str, Any]] = [_replace({"String": METASPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if add_space or remove_extra_spaces:
        decoder.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    text = tokenizer_json(
        model,
        added,
        normalizer=_normalizer(user_defined, add_space, remove_extra_spaces, charsmap),
        post_processor=around(*([] if i is None else [(pieces[i].text, i)] for i in (bos_id, eos_id))),
        decoder={"type": "Sequence", "decoders": decoder},
    )
    return Tokenizer(text, settings)


def _normalizer(user_defined: list[str], add_space: bool, remove_extra: bool, charsmap: str | None) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    if charsmap:
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if remove_extra:
        steps.append(_replace({"Regex": rf"\A +|[ {METASPACE}]+\z"}, ""))
        steps.append(_replace({"Regex": " +"}, " "))
    if add_space:
        # The library also normalizes the user-defined tokens that it looks for; those must stay as they are. (So a
        # text that is one of them and nothing else gets no space.)
        literals = "|".join(re.escape(token) for token in user_defined)
        excluded = rf"?!(?:{literals})\z)(" if literals else ""
        steps.append(_replace({"Regex": rf"\A({excluded}?=[\s\S])"}, METASPACE))
    steps.append(_replace({"String": " "}, METASPACE))
    return {"type": "Sequence", "normalizers": steps}


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}
