"""Byte-level BPE: train, save, load, encode, decode.

The folder on disk is the ecosystem's (tokenizer.json and tokenizer_config.json), so the tokenizer loads in
transformers, vLLM and, through GGUF, llama.cpp; any other byte-level tokenizer.json loads here.
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from lalia.errors import CorruptFile, UserError
from lalia.files import read_json, write_json, write_text
from lalia.tokenizer.chat import CHAT_TEMPLATE
from lalia.tokenizer.config import SMALLEST_VOCAB_SIZE, SPECIAL_TOKENS, VOCAB_MULTIPLE, TokenizerConfig

END_OF_TEXT, TURN_START, TURN_END, PAD = SPECIAL_TOKENS[:4]

SPLIT_PATTERNS = {
    # Published with Qwen2; llama.cpp knows it as the pre-tokenizer "qwen2".
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}


class Tokenizer:
    """A trained byte-level BPE tokenizer.

    Attributes:
        special: special tokens and their ids.
        vocab_size: number of ids, specials included.
        chat_template: Jinja source of the chat template, None if the folder brought none.
        bos_token, eos_token: as tokenizer_config.json names them, None where it does not.
        sha256: hex digest of tokenizer.json, the identity that token shards record.
    """

    def __init__(self, tokenizer_json: str, settings: dict[str, Any]) -> None:
        """Build from the text of tokenizer.json and the content of tokenizer_config.json; users call `load`.

        Raises:
            UserError: if tokenizer.json is no byte-level BPE.
        """
        self._json = tokenizer_json
        self._backend = Backend.from_str(tokenizer_json)
        if not isinstance(self._backend.decoder, decoders.ByteLevel):
            raise UserError(
                f"the tokenizer's decoder is {type(self._backend.decoder).__name__}, expected ByteLevel; Lalia reads "
                "byte-level BPE tokenizers (GPT-2, Llama 3, Qwen), not SentencePiece ones"
            )
        self._backend.no_truncation()
        self._backend.no_padding()
        # From here on the literals of special tokens in a text are text; specials enter by id only.
        self._backend.encode_special_tokens = True
        added = self._backend.get_added_tokens_decoder()
        self.special: dict[str, int] = {token.content: i for i, token in sorted(added.items()) if token.special}
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values()) + 1
        self._bytes = [b""] * self.vocab_size
        for text, i in vocabulary.items():
            if i in added:
                self._bytes[i] = b"" if added[i].special else text.encode("utf-8")
            else:
                self._bytes[i] = bytes(_byte_of_character()[character] for character in text)
        self.chat_template: str | None = settings.get("chat_template")
        self.bos_token = _token_text(settings.get("bos_token"))
        self.eos_token = _token_text(settings.get("eos_token"))
        self.sha256 = hashlib.sha256(tokenizer_json.encode("utf-8")).hexdigest()

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Load tokenizer.json, tokenizer_config.json and, where transformers 5 wrote one, chat_template.jinja.

        Raises:
            UserError: if there is no tokenizer.json, or it is no byte-level BPE.
            CorruptFile: if a file does not parse.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{folder} has no tokenizer.json; give the folder of a tokenizer or of a model")
        try:
            text = path.read_text(encoding="utf-8")
            json.loads(text)
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
            raise CorruptFile(f"{path} is not valid JSON ({error}); fetch it or run tokenize again") from None
        settings_path, template_path = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        settings = read_json(settings_path) if settings_path.is_file() else {}
        if not isinstance(settings, dict):
            raise CorruptFile(f"{settings_path} is no JSON object; fetch it or run tokenize again")
        template = settings.get("chat_template")
        if template_path.is_file():
            template = template_path.read_text(encoding="utf-8")
        elif isinstance(template, list):  # several named templates, as transformers allows
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default")
        try:
            return cls(text, {**settings, "chat_template": template})
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except Exception as error:  # the tokenizers library raises bare Exception for a file it cannot use
            if type(error) is not Exception:
                raise
            raise CorruptFile(f"{path} is no usable tokenizer ({error}); fetch it or run tokenize again") from None

    def save(self, folder: Path | str, max_length: int | None = None, chat: bool = False) -> None:
        """Write the folder that `load` and transformers' AutoTokenizer read.

        Args:
            folder: created if missing; model files beside the tokenizer stay.
            max_length: the model's longest sequence in tokens (`model_max_length`).
            chat: the model ends its answers with <|im_end|>, so that is its eos token (as Qwen2 does); a base model's
                is <|endoftext|>.
        """
        folder = Path(folder)
        eos = TURN_END if chat and TURN_END in self.special else self.eos_token
        named: dict[str, Any] = {"bos_token": self.bos_token, "eos_token": eos}
        if PAD in self.special:
            named["pad_token"] = PAD
        named = {name: token for name, token in named.items() if token is not None}
        settings: dict[str, Any] = {
            # The one class that both transformers 4 and 5 read as "use tokenizer.json as it stands".
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **({} if max_length is None else {"model_max_length": max_length}),
            **named,
            "unk_token": None,
        }
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
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except (UnicodeEncodeError, TypeError):
            _refuse_surrogates(texts)
            raise
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; specials are left out, bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; b"" for a special.

        Raises:
            UserError: if there is no such id.
        """
        if not 0 <= token_id < self.vocab_size:
            raise UserError(f"token id {token_id} is outside the vocabulary of {self.vocab_size}")
        return self._bytes[token_id]

    def token_bytes_table(self) -> np.ndarray:
        """Length in bytes of every token, int32 (vocab_size,); 0 for specials. What bits per byte divides by."""
        return np.array([len(content) for content in self._bytes], dtype=np.int32)

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


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Learn byte-level BPE merges (arXiv 1508.07909, on bytes as in GPT-2) from `texts`.

    Ids: 256 bytes, the merges in the order learned, then the specials. Specials come last, as in GPT-2 and Qwen2, so
    that merge ranks and ids agree and a tokenizer without specials is a prefix of this one.

    Raises:
        UserError: if the texts hold too few different words for so many merges; names the largest possible size.
    """
    backend = Backend(models.BPE())
    # No normalizer: what is decoded must be what was read, byte for byte, or bits per byte would count other bytes
    # than the text's. Qwen2 itself applies NFC, so its ids differ from ours on text that is not in NFC.
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERNS[config.pattern]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    num_ordinary = config.vocab_size - len(SPECIAL_TOKENS)
    trainer = trainers.BpeTrainer(
        vocab_size=num_ordinary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=[],
    )
    backend.train_from_iterator(texts, trainer)
    found = backend.get_vocab_size() + len(SPECIAL_TOKENS)
    if found < config.vocab_size:
        possible = max(found // VOCAB_MULTIPLE * VOCAB_MULTIPLE, SMALLEST_VOCAB_SIZE)
        remedy = f"set tokenizer.vocab_size to {possible} or less, or give more text"
        if found < SMALLEST_VOCAB_SIZE:
            remedy = "give more text"
        raise UserError(
            f"tokenizer.vocab_size = {config.vocab_size} is more than this text supports: every pair of tokens was "
            f"merged after {found} tokens; {remedy}"
        )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    settings = {"chat_template": CHAT_TEMPLATE, "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    return Tokenizer(backend.to_str(pretty=True), settings)


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """The printable stand-ins of byte-level vocabularies (GPT-2): visible Latin-1 stays, others move past U+0100."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


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
