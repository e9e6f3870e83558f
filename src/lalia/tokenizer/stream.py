"""Text from tokens, one at a time, never half a character."""

import codecs
from collections.abc import Sequence

from lalia.tokenizer.tokenizer import Tokenizer


class TextStream:
    """Turns token ids into text as they come.

    A token may end inside a character; its bytes are held back until the rest arrives. U+FFFD is emitted only for
    bytes that no continuation could make valid, so the pieces joined equal `tokenizer.decode` of all ids. (Where a
    folder asks for `clean_up_tokenization_spaces`, decode cleans up the whole text and the stream does not.)
    """

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int] = ()) -> None:
        """`after`: the ids before the first one pushed. If they say anything, the stream continues that text, so a
        leading space is text; otherwise it is the one that SentencePiece puts before every text, and is dropped."""
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._continues = any(i < tokenizer.vocab_size and tokenizer.token_bytes(i) for i in after)
        self._space = b""

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; often "" inside an emoji or a CJK character. Specials give ""."""
        if self._continues:
            content = self._tokenizer.token_bytes(token_id)
        else:
            content = self._tokenizer.first_token_bytes(token_id)
            self._continues = bool(self._tokenizer.token_bytes(token_id))
        if self._tokenizer.holds_back_spaces and content:
            content, self._space = self._space + content.removesuffix(b" "), b" " * content.endswith(b" ")
        return self._decoder.decode(content)

    def flush(self) -> str:
        """What is held back at the end of a generation: "" or one U+FFFD. The stream then continues afresh."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        self._space = b""
        return text
