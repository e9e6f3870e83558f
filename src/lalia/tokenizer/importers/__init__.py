"""Tokenizers from files that are no tokenizer.json: GGUF vocabularies, tiktoken ranks, SentencePiece models.

Each importer writes the tokenizer.json that encodes as the original does and gives a `Tokenizer`, which `save` writes
as a folder that transformers reads.
"""

from lalia.tokenizer.importers.gguf import tokenizer_from_gguf
from lalia.tokenizer.importers.sentencepiece import tokenizer_from_sentencepiece
from lalia.tokenizer.importers.tiktoken import tokenizer_from_tiktoken

__all__ = ["tokenizer_from_gguf", "tokenizer_from_sentencepiece", "tokenizer_from_tiktoken"]
