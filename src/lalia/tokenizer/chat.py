"""Conversations to token ids, with the mask of what an assistant is trained on.

The format is ChatML, as in Qwen2. What people write can never become a special token: specials enter by id.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lalia.errors import UserError
from lalia.tokenizer.template import render_template

if TYPE_CHECKING:
    from lalia.tokenizer.tokenizer import Tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Published with every tokenizer trained here; `render` builds the same ids piece by piece."""

ROLES = ("system", "user", "assistant")


def render(tokenizer: "Tokenizer", messages: Sequence[dict[str, Any]], add_generation_prompt: bool) -> list[int]:
    """Token ids of a conversation.

    Args:
        tokenizer: with the ChatML template of Lalia, or with one of its own, which then is rendered in a sandbox.
        messages: {"role": "system" | "user" | "assistant", "content": str} each, at least one. For a template
            of its own, an assistant's content may be None.
        add_generation_prompt: end with the opening of an assistant's turn.

    Raises:
        UserError: on malformed messages, on a tokenizer without a template, or if its template fails.
    """
    if tokenizer.chat_template == CHAT_TEMPLATE:
        ids, _ = _render_chatml(tokenizer, messages)
        if add_generation_prompt:
            ids += [tokenizer.turn_start_id, *tokenizer.encode("assistant\n")]
        return ids
    return _render_foreign(tokenizer, messages, add_generation_prompt)


def render_with_mask(tokenizer: "Tokenizer", messages: Sequence[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """Token ids of a conversation and, for each, 1 where the assistant is to be trained to produce it.

    That is the content of every assistant message and the <|im_end|> that closes it; the mask belongs to the token as
    a target.

    Raises:
        UserError: on malformed messages, or if the tokenizer's chat template is not the one of Lalia.
    """
    if tokenizer.chat_template != CHAT_TEMPLATE:
        raise UserError(
            "this tokenizer brings its own chat template, from which Lalia cannot tell which tokens are the "
            "assistant's; finetune a model whose tokenizer Lalia trained"
        )
    return _render_chatml(tokenizer, messages)


def _render_chatml(tokenizer: "Tokenizer", messages: Sequence[dict[str, Any]]) -> tuple[list[int], list[int]]:
    check_messages(messages)
    # One call for all texts. An assistant's content is encoded apart from its header because generation starts right
    # after the header: the ids trained on are the ids that generation meets.
    texts = ["\n"]
    for message in messages:
        header = message["role"] + "\n"
        texts += [header, message["content"]] if message["role"] == "assistant" else [header + message["content"], ""]
    newline, *encoded = tokenizer.encode_batch(texts)
    ids: list[int] = []
    mask: list[int] = []
    for before, answer, message in zip(encoded[::2], encoded[1::2], messages, strict=True):
        trained = int(message["role"] == "assistant")
        ids += [tokenizer.turn_start_id, *before, *answer, tokenizer.turn_end_id, *newline]
        mask += [0] * (1 + len(before)) + [1] * len(answer) + [trained] + [0] * len(newline)
    return ids, mask


def check_messages(messages: Any, may_be_none: bool = False) -> None:
    """Refuse what is no conversation.

    Args:
        messages: what was given as one.
        may_be_none: an assistant's content may be None, which some templates have a use for.

    Raises:
        UserError: naming the message and what is wrong with it.
    """
    if not isinstance(messages, list | tuple):
        raise UserError(f'messages must be a list of {{"role", "content"}}, got {type(messages).__name__}')
    if not messages:
        raise UserError("messages is empty; give at least one message")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            got = f"keys {sorted(map(str, message))}" if isinstance(message, dict) else type(message).__name__
            raise UserError(f'messages[{number}] must have exactly the keys "role" and "content", got {got}')
        if message["role"] not in ROLES:
            raise UserError(f"messages[{number}] has role {message['role']!r}; known roles: {', '.join(ROLES)}")
        if may_be_none and message["role"] == "assistant" and message["content"] is None:
            continue
        if not isinstance(message["content"], str):
            raise UserError(f"messages[{number}] content must be text, got {type(message['content']).__name__}")


def _render_foreign(
    tokenizer: "Tokenizer", messages: Sequence[dict[str, Any]], add_generation_prompt: bool
) -> list[int]:
    """Ids of a template that came with a model folder: its specials become ids, those that people wrote do not.

    A character from the private use area that no message holds is put inside every special's literal in the contents;
    after rendering, literals without it are the template's own.
    """
    if tokenizer.chat_template is None:
        raise UserError("this model's tokenizer has no chat template; complete a prompt, or use a chat model")
    check_messages(messages, may_be_none=True)
    contents: list[str | None] = [message["content"] for message in messages]
    private_use = map(chr, range(0xE000, 0xF900))
    mark = next((c for c in private_use if not any(c in content for content in contents if content)), None)
    if mark is None:
        raise UserError("the messages hold every private use character U+E000 to U+F8FF; remove one of them")
    specials = sorted(tokenizer.special, key=len, reverse=True)
    marked = [content and mark_specials(content, specials, mark) for content in contents]
    text = render_template(
        tokenizer.chat_template,
        [{**message, "content": content} for message, content in zip(messages, marked, strict=True)],
        add_generation_prompt,
        **{"bos_token": "", "eos_token": "", **_named_specials(tokenizer)},
    )
    ids: list[int] = []
    for number, piece in enumerate(_split_at(text, specials)):
        if piece in tokenizer.special:
            ids.append(tokenizer.special[piece])
        elif number == 0:
            ids += tokenizer.encode(piece.replace(mark, ""))
        else:
            ids += tokenizer.encode_after_special(piece.replace(mark, ""))
    return ids


def _named_specials(tokenizer: "Tokenizer") -> dict[str, str]:
    """The variables that transformers gives to templates: bos_token, eos_token, ... as far as there are any."""
    names = [f"{role}_token" for role in ("bos", "eos", "unk", "cls", "sep", "pad", "mask")]
    return {name: token for name in names if (token := getattr(tokenizer, name)) is not None}


def mark_specials(text: str, specials: Sequence[str], mark: str) -> str:
    """Put `mark` after the first character of every special's literal in `text`."""
    pieces = _split_at(text, specials)
    return "".join(piece[0] + mark + piece[1:] if piece in specials else piece for piece in pieces)


def _split_at(text: str, specials: Sequence[str]) -> list[str]:
    """Cut `text` so that every literal of `specials` (longest first) is a piece of its own."""
    pieces = [text]
    for special in specials:
        cut: list[str] = []
        for piece in pieces:
            if piece in specials:
                cut.append(piece)
                continue
            for number, part in enumerate(piece.split(special)):
                cut += [special, part] if number else [part]
        pieces = cut
    return [piece for piece in pieces if piece]
