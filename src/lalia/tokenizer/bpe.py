"""Training byte-level BPE. The tokenizer itself, of any kind, is lalia.tokenizer.tokenizer.Tokenizer."""

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from lalia.errors import UserError
from lalia.tokenizer.chat import CHAT_TEMPLATE
from lalia.tokenizer.config import SMALLEST_VOCAB_SIZE, SPECIAL_TOKENS, VOCAB_MULTIPLE, TokenizerConfig
from lalia.tokenizer.patterns import QWEN2
from lalia.tokenizer.tokenizer import END_OF_TEXT, Tokenizer

__all__ = ["SPLIT_PATTERNS", "Tokenizer", "train_tokenizer"]

SPLIT_PATTERNS = {"qwen2": QWEN2}


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
