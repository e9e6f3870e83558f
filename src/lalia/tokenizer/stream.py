"""Text from tokens, one at a time, never half a character."""

import codecs

from lalia.tokenizer.bpe import Tokenizer


class TextStream:
    """Turns token ids into text as they come.

    A token may end inside a character; its bytes are held back until the rest arrives. U+FFFD is emitted only for
    bytes that no continuation could make valid, so the pieces joined equal `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; often "" inside an emoji or a CJK character. Specials give ""."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """What is held back at the end of a generation: "" or one U+FFFD. The stream then starts afresh."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text
