"""Tokenizers from the metadata of a GGUF file.

Keys are `tokenizer.ggml.*`. What GGUF does not hold is taken as llama.cpp takes it: a byte-level vocabulary has no
Unicode normalization (Qwen2's own tokenizer.json composes first), and words are cut as `tokenizer.ggml.pre` names.
"""

import base64
from collections.abc import Mapping
from typing import Any

from lalia.errors import CorruptFile, UserError
from lalia.tokenizer import patterns
from lalia.tokenizer.decoding import METASPACE
from lalia.tokenizer.importers.build import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Piece,
    added_token,
    around,
    sentencepiece_tokenizer,
    tokenizer_json,
    unique,
)
from lalia.tokenizer.tokenizer import Tokenizer

WHAT = "the GGUF file's vocabulary"
_ROLE_KEYS = {
    "bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "sep": "seperator_token_id",
    "pad": "padding_token_id", "cls": "cls_token_id", "mask": "mask_token_id",
}  # fmt: skip
"""Misspelled as the format has it."""
MODELS = ("gpt2", "llama", "bert", "t5")


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer that a GGUF file describes.

    Args:
        metadata: the file's keys and values; lists may be any sequence, text is `str`.

    Raises:
        UserError: if the file has no tokenizer, or one of a kind that Lalia does not know; names those it knows.
        CorruptFile: if a key is missing or of a wrong type, or the parts contradict each other.
    """
    vocabulary = _Vocabulary(metadata)
    model = vocabulary.text("model")
    if model == "gpt2":
        return _byte_level(vocabulary)
    if model in ("llama", "t5"):
        return _sentencepiece(vocabulary, unigram=model == "t5")
    if model == "bert":
        return _wordpiece(vocabulary)
    if model is None:
        raise UserError("the GGUF file has no tokenizer (no key tokenizer.ggml.model); convert the model again with it")
    raise UserError(f"the GGUF file's tokenizer is of the kind {model!r}; Lalia knows {', '.join(MODELS)}")


class _Vocabulary:
    """The keys of a tokenizer, each checked as it is read."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata
        self._tokens: list[str] | None = None

    def text(self, key: str) -> str | None:
        value = self._get(key)
        if value is not None and not isinstance(value, str):
            raise CorruptFile(f"{WHAT}: {key} is {type(value).__name__}, expected text; get the file again")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key)
        if value is None:
            return default
        if not isinstance(value, bool) and value not in (0, 1):
            raise CorruptFile(f"{WHAT}: {key} is {value!r:.40}, expected true or false; get the file again")
        return bool(value)

    def values(self, key: str, kind: type | tuple[type, ...]) -> list[Any] | None:
        value = self._get(key)
        if value is None:
            return None
        values = value.tolist() if hasattr(value, "tolist") else value
        if not isinstance(values, list | tuple | bytes) or not all(isinstance(entry, kind) for entry in values):
            raise CorruptFile(f"{WHAT}: {key} is no list of the right kind; get the file again")
        return list(values)

    @property
    def tokens(self) -> list[str]:
        if self._tokens is None:
            self._tokens = self.values("tokens", str)
            if not self._tokens or "" in self._tokens:
                raise CorruptFile(f"{WHAT} has no tokens, or an empty one; get the file again")
        return self._tokens

    def kinds(self) -> list[int]:
        kinds = self.values("token_type", int) or [NORMAL] * len(self.tokens)
        if len(kinds) != len(self.tokens) or not all(NORMAL <= kind <= BYTE for kind in kinds):
            raise CorruptFile(
                f"{WHAT} has {len(self.tokens)} tokens and {len(kinds)} token types (1 to 6); get the file again"
            )
        return kinds

    def roles(self) -> dict[str, int]:
        """What the special ids are for."""
        roles: dict[str, int] = {}
        for role, key in _ROLE_KEYS.items():
            i = self._get(key)
            if i is None or i == 0xFFFFFFFF or i == -1:  # ways to write "none"
                continue
            i = i.item() if hasattr(i, "item") else i
            if not isinstance(i, int) or not 0 <= i < len(self.tokens):
                raise CorruptFile(f"{WHAT}: {key} = {i!r:.40} is outside its {len(self.tokens)} tokens")
            roles[role] = i
        return roles

    def settings(self, roles: Mapping[str, int]) -> dict[str, Any]:
        """What tokenizer_config.json would say."""
        settings: dict[str, Any] = {f"{role}_token": None for role in _ROLE_KEYS}
        settings |= {f"{role}_token": self.tokens[i] for role, i in roles.items()}
        template = self._metadata.get("tokenizer.chat_template")
        if template is not None and not isinstance(template, str):
            raise CorruptFile(f"{WHAT}: the chat template is {type(template).__name__}, expected text")
        return {**settings, "chat_template": template}

    def role_token(self, roles: Mapping[str, int], role: str, wanted: bool) -> list[tuple[str, int]]:
        """The special to put around a text, as `around` takes it."""
        if not wanted:
            return []
        if role not in roles:
            raise CorruptFile(f"{WHAT} wants a {role} token around every text and names none; get the file again")
        return [(self.tokens[roles[role]], roles[role])]

    def _get(self, key: str) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{key}")


def _byte_level(vocabulary: _Vocabulary) -> Tokenizer:
    pre = vocabulary.text("pre") or "default"
    split = patterns.split_name(pre, patterns.GGUF_NAMES, "the GGUF file's pre-tokenizer")
    tokens, kinds, roles = vocabulary.tokens, vocabulary.kinds(), vocabulary.roles()
    written = vocabulary.values("merges", str)
    if written is None:
        raise CorruptFile(f"{WHAT} has no merges; get the file again")
    merges = []
    for number, merge in enumerate(written):
        left, space, right = merge[:1], merge[1:].partition(" "), ""  # a token may itself begin with a space
        left, right = left + space[0], space[2]
        if not left or not right:
            raise CorruptFile(f"{WHAT}: merge {number} is {merge!r:.80}, expected two tokens; get the file again")
        merges.append([left, right])
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
        "ignore_merges": pre in patterns.WHOLE_WORDS_FIRST, "vocab": unique(tokens, WHAT), "merges": merges,
    }  # fmt: skip
    bos = vocabulary.role_token(roles, "bos", vocabulary.flag("add_bos_token", pre in patterns.BEGINS_WITH_BOS))
    eos = vocabulary.role_token(roles, "eos", vocabulary.flag("add_eos_token", False))
    text = tokenizer_json(
        model,
        _added(tokens, kinds),
        pre_tokenizer=patterns.pre_tokenizer(split),
        post_processor=around(bos, eos),
        decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    )
    return Tokenizer(text, vocabulary.settings(roles))


def _sentencepiece(vocabulary: _Vocabulary, unigram: bool) -> Tokenizer:
    tokens, kinds, roles = vocabulary.tokens, vocabulary.kinds(), vocabulary.roles()
    scores = vocabulary.values("scores", (int, float))
    if scores is None or len(scores) != len(tokens):
        raise CorruptFile(f"{WHAT} has {len(tokens)} tokens and {len(scores or [])} scores; get the file again")
    charsmap = vocabulary.values("precompiled_charsmap", int)
    unknown = roles.get("unk", next((i for i, kind in enumerate(kinds) if kind == UNKNOWN), None))
    bos = roles.get("bos") if vocabulary.flag("add_bos_token", not unigram) else None
    return sentencepiece_tokenizer(
        [Piece(*entry) for entry in zip(tokens, scores, kinds, strict=True)],
        unigram,
        unknown,
        vocabulary.settings(roles),
        what=WHAT,
        add_space=vocabulary.flag("add_space_prefix", True),
        remove_extra_spaces=vocabulary.flag("remove_extra_whitespaces", False),
        charsmap=base64.b64encode(bytes(byte & 0xFF for byte in charsmap)).decode() if charsmap else None,
        bos_id=bos,
        eos_id=roles.get("eos") if vocabulary.flag("add_eos_token", unigram) else None,
    )


def _wordpiece(vocabulary: _Vocabulary) -> Tokenizer:
    """GGUF writes a WordPiece that begins a word with U+2581 in front and others bare; specials stay as they are."""
    written, kinds, roles = vocabulary.tokens, vocabulary.kinds(), vocabulary.roles()
    tokens: list[str] = []
    for token, kind in zip(written, kinds, strict=True):
        if token.startswith(METASPACE) and len(token) > 1:
            tokens.append(token[1:])
        elif kind in (CONTROL, UNKNOWN) or (token.startswith("[") and token.endswith("]")):
            tokens.append(token)
        else:
            tokens.append("##" + token)
    ids = unique(tokens, WHAT)
    # Some files name [CLS] and [SEP] as bos and eos only.
    usual = {"cls": "[CLS]", "sep": "[SEP]", "unk": "[UNK]", "pad": "[PAD]", "mask": "[MASK]"}
    roles = {role: ids[token] for role, token in usual.items() if token in ids} | roles
    unknown = roles.get("unk")
    if unknown is None:
        raise CorruptFile(f"{WHAT} names no unknown token; get the file again")
    lowercase = vocabulary.flag("normalizer.lowercase", not any(token != token.lower() for token in _words(tokens)))
    model = {
        "type": "WordPiece", "unk_token": tokens[unknown], "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100, "vocab": ids,
    }  # fmt: skip
    names = {role: tokens[i] for role, i in roles.items()}
    special = {*roles.values(), *(i for i, kind in enumerate(kinds) if kind in (CONTROL, UNKNOWN))}
    added = [added_token(tokens[i], i, special=True) for i in sorted(special)]
    cls = [(names["cls"], roles["cls"])] if "cls" in roles else []
    sep = [(names["sep"], roles["sep"])] if "sep" in roles else []
    text = tokenizer_json(
        model,
        added,
        normalizer={
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": vocabulary.flag("normalizer.strip_accents", lowercase),
            "lowercase": lowercase,
        },
        pre_tokenizer={"type": "BertPreTokenizer"},
        post_processor=around(cls, sep),
        decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
    )
    return Tokenizer(text, {f"{role}_token": token for role, token in names.items()})


def _words(tokens: list[str]) -> list[str]:
    """Tokens that are words: the specials in brackets are in capitals in every vocabulary."""
    return [token for token in tokens if not token.startswith(("[", "<"))]


def _added(tokens: list[str], kinds: list[int]) -> list[dict[str, Any]]:
    return [
        added_token(tokens[i], i, special=kind != USER_DEFINED)
        for i, kind in enumerate(kinds)
        if kind in (CONTROL, UNKNOWN, USER_DEFINED)
    ]
