"""Training BERT's tokenizer, for encoders made from nothing."""

from collections.abc import Iterable

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from lalia.errors import UserError
from lalia.tokenizer.tokenizer import Tokenizer

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def train_wordpiece(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn WordPiece (Wu et al. 2016, arXiv 1609.08144) from `texts`, in lower case and without accents as in BERT.

    Specials have the first ids; every text is encoded as [CLS] text [SEP].

    Raises:
        UserError: if vocab_size leaves no room for words.
    """
    if vocab_size < 64:
        raise UserError(f"vocab_size = {vocab_size}; WordPiece needs at least 64")
    backend = Backend(models.WordPiece({}, unk_token="[UNK]", max_input_chars_per_word=100))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)  # pyright: ignore[reportAttributeAccessIssue]
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.WordPiece()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=list(SPECIALS), show_progress=False)
    backend.train_from_iterator(texts, trainer)
    ids = {token: number for number, token in enumerate(SPECIALS)}
    backend.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    return Tokenizer(
        backend.to_str(), {f"{name.strip('[]').lower()}_token": name for name in SPECIALS} | {"chat_template": None}
    )
