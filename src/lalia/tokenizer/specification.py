"""Checks of a tokenizer.json before the `tokenizers` library reads it, and what can be told from it.

The library ends the process's thread on some damaged files and fails at the first text on others, so what it takes for
granted is checked here.
"""

import json
from collections.abc import Iterator
from typing import Any

from lalia.errors import CorruptFile
from lalia.tokenizer.decoding import BYTE_TOKEN, METASPACE, byte_of_character, decoder_steps

MAX_IDS = 1 << 22
"""Largest vocabulary; the largest published ones have a quarter of a million tokens."""
NOT_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
"""Bytes that no UTF-8 text holds."""
TEXT_START = r"\A("
"""How the expression begins that Lalia's own SentencePiece importer puts a space before a text with."""
MODELS = ("BPE", "Unigram", "WordPiece", "WordLevel")


def parse(text: str) -> dict[str, Any]:
    """The content of a tokenizer.json, checked.

    Raises:
        CorruptFile: if it is not JSON, or no tokenizer, or contradicts itself; names what is wrong.
    """
    try:
        content = json.loads(text, object_pairs_hook=_no_duplicates)
    except CorruptFile:
        raise
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"not valid JSON ({error})") from None
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise CorruptFile("no usable tokenizer (it has no model)")
    model = content["model"]
    kind = model_type(model)
    if kind not in MODELS:
        raise CorruptFile(f"no usable tokenizer (its model is {kind!r}, known: {', '.join(MODELS)})")
    vocabulary = vocabulary_of(model)
    _check_added(content, vocabulary)
    if kind == "BPE":
        _check_merges(model, vocabulary)
    for key in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        _check_component(content.get(key), key)
    unknown = model.get("unk_token")
    if kind in ("WordPiece", "WordLevel") and (not isinstance(unknown, str) or unknown not in vocabulary):
        raise CorruptFile(f"the unknown token {unknown!r} is not in the vocabulary")
    return content


def model_type(model: dict[str, Any]) -> str:
    """The kind of a model; files older than tokenizers 0.10 do not name it."""
    if "type" in model:
        return str(model["type"])
    if "merges" in model:
        return "BPE"
    if isinstance(model.get("vocab"), list):
        return "Unigram"
    return "WordPiece" if "continuing_subword_prefix" in model else "WordLevel"


def vocabulary_of(model: dict[str, Any]) -> dict[str, int]:
    """Tokens and their ids.

    Raises:
        CorruptFile: if the vocabulary has a wrong type, duplicates, or an id that is negative or far too large.
    """
    vocab = model.get("vocab")
    if model_type(model) == "Unigram":
        pairs = vocab if isinstance(vocab, list) else []
        for number, entry in enumerate(pairs):
            if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str) or not _number(entry[1]):
                raise CorruptFile(f"vocabulary entry {number} is no pair of a piece and its score")
        vocab = {entry[0]: number for number, entry in enumerate(pairs)}
        if len(vocab) != len(pairs):
            raise CorruptFile(f"{len(pairs) - len(vocab)} pieces of the vocabulary are duplicates")
        unknown = model.get("unk_id")
        if unknown is not None and not (_whole(unknown) and 0 <= unknown < len(pairs)):
            raise CorruptFile(f"unk_id {unknown!r} is outside the vocabulary of {len(pairs)}")
    if not isinstance(vocab, dict) or not vocab:
        raise CorruptFile("no usable tokenizer (its vocabulary is empty or of a wrong type)")
    for token, i in vocab.items():
        check_id(token, i)
    return vocab


def check_id(token: str, i: Any) -> int:
    """`i`, if it can be an id.

    Raises:
        CorruptFile: naming the token.
    """
    if not _whole(i) or not 0 <= i < MAX_IDS:
        raise CorruptFile(f"token {token!r} has the id {i!r}, expected a whole number from 0 to {MAX_IDS - 1}")
    return i


def _check_added(content: dict[str, Any], vocabulary: dict[str, int]) -> None:
    added = content.setdefault("added_tokens", [])
    if not isinstance(added, list):
        raise CorruptFile("added_tokens is no list")
    ids: dict[int, str] = {}
    texts: set[str] = set()
    for entry in added:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or not entry["content"]:
            raise CorruptFile(f"added token {entry!r:.80} has no content")
        token = entry["content"]
        i = check_id(token, entry.get("id"))
        flags = ("special", "single_word", "lstrip", "rstrip", "normalized")
        if any(not isinstance(entry.get(flag, False), bool) for flag in flags):
            raise CorruptFile(f"added token {token!r} has a flag that is neither true nor false")
        if i in ids or token in texts:
            raise CorruptFile(f"added token {token!r} with id {i} is a duplicate")
        if vocabulary.get(token, i) != i:
            raise CorruptFile(f"added token {token!r} has id {i}, but the vocabulary says {vocabulary[token]}")
        ids[i] = token
        texts.add(token)


def _check_merges(model: dict[str, Any], vocabulary: dict[str, int]) -> None:
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise CorruptFile("no usable tokenizer (merges is no list)")
    prefix = model.get("continuing_subword_prefix") or ""
    if not isinstance(prefix, str) or not isinstance(model.get("end_of_word_suffix") or "", str):
        raise CorruptFile("a prefix or suffix of the model is no text")
    for number, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(side, str) and side for side in pair):
            raise CorruptFile(f"merge {number} is {merge!r:.80}, expected two tokens")
        left, right = pair
        whole = left + (right.removeprefix(prefix) if prefix else right)
        for token in (left, right, whole):
            if token not in vocabulary:
                raise CorruptFile(
                    f"merge {number} ({left!r:.40}, {right!r:.40}) needs {token!r:.80}, which is no token"
                )


def _check_component(part: Any, key: str, depth: int = 0) -> None:
    if part is None:
        return
    if not isinstance(part, dict) or not isinstance(part.get("type"), str) or depth > 20:
        raise CorruptFile(f"no usable tokenizer ({key} is no object with a type)")
    for inner in ("normalizers", "pretokenizers", "processors", "decoders"):
        parts = part.get(inner, [])
        if not isinstance(parts, list):
            raise CorruptFile(f"no usable tokenizer ({key}.{inner} is no list)")
        for step in parts:
            _check_component(step, key, depth + 1)


def working_copy(content: dict[str, Any], specials: dict[str, int]) -> str | None:
    """The tokenizer.json to encode with, where it must differ from the file; None if the file will do.

    A text may hold the literal of a special token, which is text. Where the model itself would find such a token in
    its vocabulary (Unigram, whole words of WordPiece, BPE that takes known words whole), the vocabulary of the copy
    spells the token with a space at the end, which no text that is cut at spaces can contain.
    """
    model = content["model"]
    kind = model_type(model)
    changes: dict[str, Any] = {}
    if kind != "BPE" or model.get("ignore_merges"):
        unknown = model.get("unk_token")
        hidden = {token for token in specials if token != unknown}
        if isinstance(model["vocab"], list):
            found = any(entry[0] in hidden for entry in model["vocab"])
            vocab: Any = [[_hide(token, hidden), score] for token, score in model["vocab"]]
        else:
            found = any(token in hidden for token in model["vocab"])
            vocab = {_hide(token, hidden): i for token, i in model["vocab"].items()}
        if found:
            changes["model"] = {**model, "vocab": vocab}
            changes["added_tokens"] = [entry for entry in content["added_tokens"] if entry["content"] not in hidden]
    if not changes:
        return None
    return json.dumps({**content, **changes}, ensure_ascii=False)


def _hide(token: str, hidden: set[str]) -> str:
    return token + " " if token in hidden else token


def steps_of(part: Any) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, sequences opened."""
    if part is None:
        return
    if part.get("type") == "Sequence":
        for step in part.get("normalizers", part.get("pretokenizers", [])):
            yield from steps_of(step)
    else:
        yield part


def why_lossy(content: dict[str, Any], vocabulary: dict[str, int]) -> str | None:
    """Why the text of the ids may differ from the text that was encoded; None if it never does.

    A vocabulary of SentencePiece counts as lossless although it reads U+2581, its stand-in for a space, as a space.
    """
    model = content["model"]
    kind = model_type(model)
    normalizer, pre = list(steps_of(content.get("normalizer"))), list(steps_of(content.get("pre_tokenizer")))
    if kind in ("WordPiece", "WordLevel"):
        return f"{kind} forgets spaces and what it does not know, and may lower-case"
    if kind == "Unigram" and not model.get("byte_fallback"):
        return "Unigram without byte tokens forgets what it does not know"
    if model.get("end_of_word_suffix"):
        return "an end-of-word suffix forgets how words were separated"
    if any(entry.get("lstrip") or entry.get("rstrip") for entry in content["added_tokens"] if not entry.get("special")):
        return "an added token takes the spaces beside it"
    prepends = False
    for step in normalizer:
        pattern = step.get("pattern") if step["type"] == "Replace" and step.get("content") == METASPACE else None
        if step["type"] == "Prepend" and step.get("prepend") == METASPACE:
            prepends = True
            if any(not entry.get("special") for entry in content["added_tokens"]):
                return "it puts a space after every added token"
        elif isinstance(pattern, dict) and str(pattern.get("Regex", "")).startswith(TEXT_START):
            prepends = True
        elif pattern != {"String": " "}:
            return f"its normalizer ({step['type']}) changes the text"
    if prepends != any(step.get("type") == "Strip" for step in decoder_steps(content.get("decoder"))):
        return "a space at the beginning of a text comes or goes"
    for step in pre:
        if step["type"] == "Split" and step.get("behavior") == "Removed":
            return "its pre-tokenizer removes what it cuts at"
        if step["type"] not in ("Split", "ByteLevel", "Digits", "Metaspace", "Punctuation", "UnicodeScripts"):
            return f"its pre-tokenizer ({step['type']}) changes the text"
        if step["type"] == "ByteLevel" and step.get("add_prefix_space"):
            return "it puts a space before every text"
        if step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never":
            return "a space at the beginning of a text is forgotten"
    if any(step.get("type") == "ByteLevel" for step in decoder_steps(content.get("decoder"))):
        present = {byte for character, byte in byte_of_character().items() if character in vocabulary}
    elif model.get("byte_fallback"):
        present = {int(match[1], 16) for token in vocabulary if (match := BYTE_TOKEN.fullmatch(token))}
    else:
        return "it has no byte tokens, so it forgets characters that it does not know"
    missing = [byte for byte in range(256) if byte not in present and byte not in NOT_IN_UTF8]
    return f"{len(missing)} of the 256 bytes have no token, the first 0x{missing[0]:02x}" if missing else None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise CorruptFile(f"the name {double!r:.80} occurs twice in one object")
    return content


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
