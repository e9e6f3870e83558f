"""Settings of the tokenizer."""

from typing import Literal

from pydantic import Field, field_validator

from lalia.settings import Settings

NUM_BYTE_TOKENS = 256
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|pad|>",
    *(f"<|reserved_{i}|>" for i in range(12)),
)
"""Specials in the order of their ids. The reserved ones let a later stage name a new special without resizing the
embedding."""
VOCAB_MULTIPLE = 64
"""Embedding rows come in multiples of this: matrix products of other sizes are slower on GPUs, and quantized formats
refuse them."""
SMALLEST_VOCAB_SIZE = -(-(NUM_BYTE_TOKENS + len(SPECIAL_TOKENS)) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class TokenizerConfig(Settings):
    """What the tokenizer is trained to be.

    Attributes:
        vocab_size: number of token ids in all, specials included; exactly the embedding's rows. A multiple of 64.
        pattern: which regular expression cuts text into the words that merges may not cross.
    """

    vocab_size: int = Field(default=4096, ge=SMALLEST_VOCAB_SIZE, le=1_048_576)
    pattern: Literal["qwen2"] = "qwen2"

    @field_validator("vocab_size")
    @classmethod
    def _multiple(cls, value: int) -> int:
        if value % VOCAB_MULTIPLE:
            below = max(value // VOCAB_MULTIPLE * VOCAB_MULTIPLE, SMALLEST_VOCAB_SIZE)
            raise ValueError(f"must be a multiple of {VOCAB_MULTIPLE}; take {below} or {below + VOCAB_MULTIPLE}")
        return value
