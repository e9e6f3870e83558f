"""Training BERT's tokenizer, for encoders made from nothing."""

from collections import Counter
from collections.abc import Sequence

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from lalia.errors import UserError
from lalia.tokenizer.tokenizer import Tokenizer

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ALPHABET = 1000
"""Most characters that words may have; those that are rarer become [UNK]."""


def train_wordpiece(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Learn WordPiece (Wu et al. 2016, arXiv 1609.08144) from `texts`, in lower case and without accents as in BERT.

    Specials have the first ids; every text is encoded as [CLS] text [SEP]. Equal texts give an equal tokenizer.

    Raises:
        UserError: if vocab_size leaves no room for words.
    """
    normalizer = normalizers.BertNormalizer(lowercase=True)
    counts = Counter(character for text in texts for character in normalizer.normalize_str(text) if character.strip())
    alphabet = sorted(sorted(counts, key=lambda c: (-counts[c], c))[:ALPHABET])
    smallest = len(SPECIALS) + 2 * len(alphabet)
    if vocab_size < smallest:
        raise UserError(f"vocab_size = {vocab_size}; {len(alphabet)} different characters need at least {smallest}")
    learner = Backend(models.WordPiece({}, unk_token="[UNK]"))
    learner.normalizer = normalizer  # pyright: ignore[reportAttributeAccessIssue]
    learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        # Named beforehand, the characters inside words have the same ids every time; else the order of a hash table
        # decides, and with it which of two equally frequent pairs is joined first.
        special_tokens=[*SPECIALS, *(f"##{character}" for character in alphabet)],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    backend = Backend(models.WordPiece(learner.get_vocab(), unk_token="[UNK]", max_input_chars_per_word=100))
    backend.add_special_tokens(list(SPECIALS))
    backend.normalizer = normalizer  # pyright: ignore[reportAttributeAccessIssue]
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.WordPiece()  # pyright: ignore[reportAttributeAccessIssue]
    backend.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, SPECIALS.index(name)) for name in ("[CLS]", "[SEP]")],
    )
    return Tokenizer(backend.to_str(), {f"{name.strip('[]').lower()}_token": name for name in SPECIALS})
