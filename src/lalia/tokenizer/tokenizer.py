"""Tokenizers of every kind that text models use: load, save, encode, decode.

The folder on disk is the ecosystem's (tokenizer.json and tokenizer_config.json), so what is saved here loads in
transformers, vLLM and, through GGUF, llama.cpp. lalia.tokenizer.importers reads other files into the same class.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from tokenizers import Tokenizer as Backend

from lalia.errors import CorruptFile, UserError
from lalia.files import read_json, write_json, write_text
from lalia.tokenizer import specification
from lalia.tokenizer.config import SPECIAL_TOKENS
from lalia.tokenizer.decoding import clean_up, token_texts

END_OF_TEXT, TURN_START, TURN_END, PAD = SPECIAL_TOKENS[:4]
ROLES = ("bos", "eos", "unk", "cls", "sep", "pad", "mask")
"""What a special token may be for; tokenizer_config.json names it as `bos_token` and so on."""
# Where a folder names none: how published vocabularies call them.
_USUAL = {
    "cls": ("[CLS]",),
    "sep": ("[SEP]",),
    "pad": (PAD, "[PAD]", "<pad>"),
    "mask": ("[MASK]", "<mask>"),
    "unk": ("[UNK]", "<unk>"),
}


class WithSpecials(NamedTuple):
    """Ids with the model's own specials around the text, and for each the number of its text (0, or 1 in a pair)."""

    ids: list[int]
    type_ids: list[int]


class Tokenizer:
    """A tokenizer: byte-level BPE, SentencePiece's BPE and Unigram, WordPiece, or CLIP's BPE.

    Attributes:
        special: special tokens and their ids. Their literals in a text are text.
        kind: "BPE", "Unigram", "WordPiece" or "WordLevel".
        vocab_size: number of ids, specials included; one more than the largest, should ids be missing between.
        lossy: None if the text of a text's ids is that text; otherwise why it may not be.
        chat_template: Jinja source of the chat template, None if the folder brought none.
        bos_token, eos_token, unk_token, cls_token, sep_token, pad_token, mask_token: as tokenizer_config.json names
            them, None where it does not and the vocabulary has none of the usual name.
        sha256: hex digest of tokenizer.json, the identity that token shards record.
    """

    bos_token: str | None
    eos_token: str | None
    unk_token: str | None
    cls_token: str | None
    sep_token: str | None
    pad_token: str | None
    mask_token: str | None

    def __init__(self, tokenizer_json: str, settings: dict[str, Any]) -> None:
        """Build from the text of tokenizer.json and the content of tokenizer_config.json; users call `load`.

        Raises:
            CorruptFile: if tokenizer.json is damaged or contradicts itself.
            UserError: if its decoder is none of a text model.
        """
        self._json = tokenizer_json
        self.sha256 = hashlib.sha256(tokenizer_json.encode("utf-8")).hexdigest()
        content = specification.parse(tokenizer_json)
        model, added = content["model"], content["added_tokens"]
        self.kind = specification.model_type(model)
        self._ids = {**specification.vocabulary_of(model), **{entry["content"]: entry["id"] for entry in added}}
        special = {entry["content"]: entry["id"] for entry in added if entry.get("special")}
        for role in ROLES:
            token = _token_text(settings.get(f"{role}_token"))
            if token in self._ids and f"{role}_token" in settings:
                special[token] = self._ids[token]
            elif token is None and f"{role}_token" not in settings:
                token = next((name for name in _USUAL.get(role, ()) if name in special), None)
            setattr(self, f"{role}_token", token)
        self.special: dict[str, int] = dict(sorted(special.items(), key=lambda item: item[1]))
        self.vocab_size: int = max(self._ids.values()) + 1
        # The library checks the types of everything below first.
        self._backend = _backend(specification.working_copy(content, self.special) or tokenizer_json)
        self._check_backend(added)
        suffix = model.get("end_of_word_suffix")
        special_ids = set(self.special.values())
        self._texts = token_texts(content.get("decoder"), suffix, self._ids, special_ids, self.vocab_size)
        self._check_ids(special_ids)
        self.lossy = specification.why_lossy(content, self._ids)
        # As transformers does, except for BPE, which that would damage.
        self._cleans_up = settings.get("clean_up_tokenization_spaces") is True and self.kind != "BPE"
        self.chat_template: str | None = settings.get("chat_template")
        self._continuing: Backend | None = None
        if any(step["type"] == "Metaspace" and step.get("prepend_scheme") == "first" for step in _pre_steps(content)):
            for step in _pre_steps(content):
                if step["type"] == "Metaspace":
                    step["prepend_scheme"] = "never"
            self._continuing = _backend(specification.working_copy(content, self.special) or json.dumps(content))

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Load tokenizer.json, tokenizer_config.json and, where they are, special_tokens_map.json and
        chat_template.jinja.

        Raises:
            UserError: if there is no tokenizer.json, or it is none of a text model.
            CorruptFile: if a file does not parse.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{folder} has no tokenizer.json; give the folder of a tokenizer or of a model")
        try:
            text = path.read_text(encoding="utf-8")
        except ValueError as error:
            raise CorruptFile(f"{path} is not valid JSON ({error}); fetch it or run tokenize again") from None
        settings: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            more = read_json(folder / name) if (folder / name).is_file() else {}
            if not isinstance(more, dict):
                raise CorruptFile(f"{folder / name} is no JSON object; fetch it or run tokenize again")
            settings |= more
        template, template_path = settings.get("chat_template"), folder / "chat_template.jinja"
        if template_path.is_file():
            template = template_path.read_text(encoding="utf-8")
        elif isinstance(template, list):  # several named templates, as transformers allows
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default")
        if not isinstance(template, str | None):
            raise CorruptFile(
                f"{folder}: the chat template is {type(template).__name__}, expected text; fetch it again"
            )
        try:
            return cls(text, {**settings, "chat_template": template})
        except CorruptFile as error:
            raise CorruptFile(f"{path} is damaged: {error}; fetch it or run tokenize again") from None
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def save(self, folder: Path | str, max_length: int | None = None, chat: bool = False) -> None:
        """Write the folder that `load` and transformers' AutoTokenizer read.

        Args:
            folder: created if missing; model files beside the tokenizer stay.
            max_length: the model's longest sequence in tokens (`model_max_length`).
            chat: the model ends its answers with <|im_end|>, so that is its eos token (as Qwen2 does); a base model's
                is <|endoftext|>.
        """
        folder = Path(folder)
        names = {f"{role}_token": getattr(self, f"{role}_token") for role in ROLES}
        if chat and TURN_END in self.special:
            names["eos_token"] = TURN_END
        named: dict[str, Any] = {name: token for name, token in names.items() if token is not None}
        settings: dict[str, Any] = {
            # The one class that both transformers 4 and 5 read as "use tokenizer.json as it stands".
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": self._cleans_up,
            **({} if max_length is None else {"model_max_length": max_length}),
            **named,
        }
        settings.setdefault("unk_token", None)
        if self.chat_template is not None:
            settings["chat_template"] = self.chat_template
        write_text(folder / "tokenizer.json", self._json)
        write_json(folder / "tokenizer_config.json", settings)
        write_json(folder / "special_tokens_map.json", named)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without any special: a literal "<|im_end|>" is eight-odd ordinary tokens.

        Raises:
            UserError: if the text holds half of a surrogate pair, which has no UTF-8.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        return [encoding.ids for encoding in self._encodings(texts)]

    def encode_after_special(self, text: str) -> list[int]:
        """`encode` of a piece of text that follows a special token, as in a rendered chat template.

        It differs for tokenizers that put a space before the whole text only (Metaspace with prepend_scheme "first").
        """
        if self._continuing is None:
            return self.encode(text)
        return self._encodings([text], self._continuing)[0].ids

    def encode_with_specials(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, max_tokens: int | None = None
    ) -> list[WithSpecials]:
        """Ids with the specials that the model expects around a text: [CLS] text [SEP], or <bos> text.

        Args:
            texts: what to encode.
            pairs: a second text for each, for models that read two ([CLS] text [SEP] second [SEP]).
            max_tokens: longest result, specials included; the end of the text (of the longer one in a pair) is cut.

        Raises:
            UserError: if the lists differ in length, or max_tokens leaves no room for text.
        """
        if pairs is not None and len(pairs) != len(texts):
            raise UserError(f"{len(texts)} texts and {len(pairs)} second texts; give one second text for each")
        room = None
        if max_tokens is not None:
            room = max_tokens - self._backend.num_special_tokens_to_add(pairs is not None)
            if room < 1:
                raise UserError(f"max_tokens = {max_tokens} leaves no room for text beside the specials; take more")
        firsts = self._encodings(texts)
        seconds = [None] * len(texts) if pairs is None else self._encodings(pairs)
        results = []
        for first, second in zip(firsts, seconds, strict=True):
            if room is not None:
                sizes = _shares(len(first.ids), len(second.ids) if second else 0, room)
                for encoding, size in zip((first, second), sizes, strict=True):
                    if encoding is not None:
                        encoding.truncate(size)
            whole = self._backend.post_process(first, second, True)
            results.append(WithSpecials(whole.ids, whole.type_ids))
        return results

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; specials are left out, bytes that are no UTF-8 become U+FFFD.

        The space that SentencePiece puts before a text is taken away again. Equal to transformers' decode with
        skip_special_tokens, except that of byte tokens that are no UTF-8 only the wrong bytes are lost.
        """
        pieces: list[bytes] = []
        for i in ids:
            piece = self.token_bytes(i) if pieces else self.first_token_bytes(i)
            if piece or pieces or i in self._texts.first:
                pieces.append(piece)
        content = b"".join(pieces)
        if self._texts.drops_last_space:
            content = content.removesuffix(b" ")
        text = content.decode("utf-8", errors="replace")
        return clean_up(text) if self._cleans_up else text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds to a text; b"" for a special.

        Joined, the tokens' bytes are the text for byte-level BPE; for SentencePiece they are the text behind the one
        space that it puts in front of every text. A WordPiece token that begins a word brings the space before it, so
        joined they are the words with one space between (and one in front), not the text as it was. `decode` takes
        the first space away.

        Raises:
            UserError: if there is no such id.
        """
        if not 0 <= token_id < self.vocab_size:
            raise UserError(f"token id {token_id} is outside the vocabulary of {self.vocab_size}")
        return self._texts.inner[token_id]

    @cached_property
    def _names(self) -> dict[int, str]:
        return {i: token for token, i in self._ids.items()}

    def token(self, token_id: int) -> str:
        """A token as the vocabulary spells it: "##ing" of WordPiece, "\u2581the" of SentencePiece.

        Raises:
            UserError: if there is no such id.
        """
        token = self._names.get(token_id)
        if token is None:
            raise UserError(f"there is no token with the id {token_id} in the vocabulary of {self.vocab_size}")
        return token

    def first_token_bytes(self, token_id: int) -> bytes:
        """As `token_bytes`, of a token that begins a text."""
        return self._texts.first.get(token_id, self.token_bytes(token_id))

    @property
    def holds_back_spaces(self) -> bool:
        """Whether a space at the end of a token is text only if another token follows (CLIP)."""
        return self._texts.drops_last_space

    def token_bytes_table(self) -> np.ndarray:
        """Length in bytes of every token, int32 (vocab_size,); 0 for specials. What bits per byte divides by.

        Of a lossy tokenizer these are not the bytes of the text; see `check_lossless`.
        """
        return np.array([len(content) for content in self._texts.inner], dtype=np.int32)

    def check_lossless(self, purpose: str, texts: Sequence[str], encoded: Sequence[Sequence[int]]) -> None:
        """Refuse texts that this tokenizer does not keep whole where that matters, as for bits per byte.

        Raises:
            UserError: naming the first text whose ids do not decode to it, and why this tokenizer is lossy.
        """
        if self.lossy is None:
            return
        for number, (text, ids) in enumerate(zip(texts, encoded, strict=True)):
            if self.decode(ids) != text:
                raise UserError(
                    f"{purpose} needs every byte of a text, but the tokens of text {number} are not the whole of it: "
                    f"{self.lossy}; take a model whose tokenizer keeps the text"
                )

    @property
    def bos_token_id(self) -> int | None:
        return self._role_id("bos")

    @property
    def eos_token_id(self) -> int | None:
        return self._role_id("eos")

    @property
    def unk_token_id(self) -> int | None:
        return self._role_id("unk")

    @property
    def cls_token_id(self) -> int | None:
        return self._role_id("cls")

    @property
    def sep_token_id(self) -> int | None:
        return self._role_id("sep")

    @property
    def pad_token_id(self) -> int | None:
        return self._role_id("pad")

    @property
    def mask_token_id(self) -> int | None:
        return self._role_id("mask")

    @property
    def end_of_text_id(self) -> int:
        """Id of <|endoftext|>, which stands before every document."""
        return self.special_id(END_OF_TEXT)

    @property
    def turn_start_id(self) -> int:
        """Id of <|im_start|>."""
        return self.special_id(TURN_START)

    @property
    def turn_end_id(self) -> int:
        """Id of <|im_end|>."""
        return self.special_id(TURN_END)

    def special_id(self, token: str) -> int:
        """Id of a special token by its text.

        Raises:
            UserError: if this tokenizer has no such special.
        """
        if token not in self.special:
            raise UserError(f"this tokenizer has no special token {token}; it has {', '.join(self.special) or 'none'}")
        return self.special[token]

    def _role_id(self, role: str) -> int | None:
        token = getattr(self, f"{role}_token")
        return None if token is None else self._ids.get(token)

    def _encodings(self, texts: Sequence[str], backend: Backend | None = None) -> list[Any]:
        try:
            return (backend or self._backend).encode_batch_fast(list(texts), add_special_tokens=False)
        except (UnicodeEncodeError, TypeError):
            _refuse_surrogates(texts)
            raise
        except Exception as error:  # the library raises bare Exception, as for what Unigram cannot spell
            if type(error) is not Exception:
                raise
            raise UserError(f"this tokenizer cannot encode the text ({error}); fetch its files again") from None

    def _check_ids(self, special_ids: set[int]) -> None:
        """Two tokens may share an id (Gemma: tab and the byte of tab) if they say the same."""
        if len(set(self._ids.values())) == len(self._ids):
            return
        owner: dict[int, str] = {}
        for token, i in self._ids.items():
            if i in owner and (i in special_ids or {token, owner[i]} != {"\t", "<0x09>"}):
                raise CorruptFile(f"the tokens {owner[i]!r:.80} and {token!r:.80} have the same id {i}")
            owner.setdefault(i, token)

    def _check_backend(self, added: list[dict[str, Any]]) -> None:
        """What the library made of the file must be what the file says; a file that fails on any text is damaged."""
        for entry in added:
            i = self._backend.token_to_id(entry["content"])
            if i is not None and i != entry["id"]:
                raise CorruptFile(f"added token {entry['content']!r} has id {entry['id']}, which would become {i}")
        try:
            probe = [*self._backend.encode("a 1\n").ids, *self._backend.encode("a 1\n", "b").ids]
        except BaseException as error:
            if not _of_the_library(error):
                raise
            raise CorruptFile(f"no usable tokenizer ({str(error)[:200]})") from None
        wrong = next((i for i in probe if not 0 <= i < self.vocab_size), None)
        if wrong is not None:
            raise CorruptFile(f"it puts the id {wrong} around a text, but the vocabulary has {self.vocab_size} ids")


def _pre_steps(content: dict[str, Any]) -> list[dict[str, Any]]:
    return list(specification.steps_of(content.get("pre_tokenizer")))


def _backend(tokenizer_json: str) -> Backend:
    try:
        backend = Backend.from_str(tokenizer_json)
    except BaseException as error:
        if not _of_the_library(error):
            raise
        raise CorruptFile(f"no usable tokenizer ({str(error)[:200]})") from None
    backend.no_truncation()
    backend.no_padding()
    # From here on the literals of special tokens in a text are text; specials enter by id only.
    backend.encode_special_tokens = True
    return backend


def _of_the_library(error: BaseException) -> bool:
    """Whether the tokenizers library refuses or fails: a bare Exception, or a panic, which is no Exception at all."""
    return type(error) is Exception or type(error).__name__ == "PanicException"


def _shares(first: int, second: int, room: int) -> tuple[int, int]:
    """What two texts keep of so many tokens: the longer one is cut first, as transformers' "longest_first" does."""
    if first + second <= room:
        return first, second
    shorter = min(first, second, room // 2)
    return (room - shorter, shorter) if first > second else (shorter, room - shorter)


def _token_text(token: Any) -> str | None:
    """tokenizer_config.json writes a token as a string or as an object with its flags."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _refuse_surrogates(texts: Sequence[str]) -> None:
    for number, text in enumerate(texts):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"text {number} has half of a surrogate pair (U+{ord(text[error.start]):04X}) at character "
                f"{error.start}, which no UTF-8 can hold; read the file as UTF-8, or replace that character"
            ) from None
