"""Conversations to token ids, with the mask of what an assistant is trained on.

The format is ChatML, as in Qwen2. What people write can never become a special token: specials enter by id.
"""

import datetime
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from jinja2.exceptions import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lalia.errors import UserError

if TYPE_CHECKING:
    from lalia.tokenizer.bpe import Tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Published with every tokenizer trained here; `render` builds the same ids piece by piece."""

ROLES = ("system", "user", "assistant")
MAX_RENDERED_CHARACTERS = 50_000_000
"""Limit on what an untrusted template may write or build by repetition, so that it cannot fill the memory."""


def render(tokenizer: "Tokenizer", messages: Sequence[dict[str, str]], add_generation_prompt: bool) -> list[int]:
    """Token ids of a conversation.

    Args:
        tokenizer: with the ChatML template of Lalia, or with one of its own, which then is rendered in a sandbox.
        messages: {"role": "system" | "user" | "assistant", "content": str} each, at least one.
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


def render_with_mask(tokenizer: "Tokenizer", messages: Sequence[dict[str, str]]) -> tuple[list[int], list[int]]:
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


def _render_chatml(tokenizer: "Tokenizer", messages: Sequence[dict[str, str]]) -> tuple[list[int], list[int]]:
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


def check_messages(messages: Any) -> None:
    """Refuse what is no conversation.

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
        if not isinstance(message["content"], str):
            raise UserError(f"messages[{number}] content must be text, got {type(message['content']).__name__}")


def _render_foreign(
    tokenizer: "Tokenizer", messages: Sequence[dict[str, str]], add_generation_prompt: bool
) -> list[int]:
    """Ids of a template that came with a model folder: its specials become ids, those that people wrote do not.

    A character from the private use area that no message holds is put inside every special's literal in the contents;
    after rendering, literals without it are the template's own.
    """
    if tokenizer.chat_template is None:
        raise UserError("this model's tokenizer has no chat template; complete a prompt, or use a chat model")
    check_messages(messages)
    contents = [message["content"] for message in messages]
    private_use = map(chr, range(0xE000, 0xF900))
    mark = next((c for c in private_use if not any(c in content for content in contents)), None)
    if mark is None:
        raise UserError("the messages hold every private use character U+E000 to U+F8FF; remove one of them")
    specials = sorted(tokenizer.special, key=len, reverse=True)
    marked = [mark_specials(content, specials, mark) for content in contents]
    text = render_template(
        tokenizer.chat_template,
        [{**message, "content": content} for message, content in zip(messages, marked, strict=True)],
        add_generation_prompt,
        bos_token=tokenizer.bos_token or "",
        eos_token=tokenizer.eos_token or "",
    )
    ids: list[int] = []
    for piece in _split_at(text, specials):
        if piece in tokenizer.special:
            ids.append(tokenizer.special[piece])
        else:
            ids += tokenizer.encode(piece.replace(mark, ""))
    return ids


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


class _TemplateSandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with repetition and powers bounded as well: "x" * 10**10 would fill the memory."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(side) if isinstance(side, str | bytes | list | tuple) else abs(side) for side in (left, right)]
        if operator == "**" and (sizes[0] > 1_000_000 or sizes[1] > 32):
            raise UserError("the chat template computes too large a power")
        if operator == "*" and sizes[0] * sizes[1] > MAX_RENDERED_CHARACTERS:
            raise UserError("the chat template computes too large a product")
        return super().call_binop(context, operator, left, right)


def render_template(
    template: str, messages: Sequence[dict[str, str]], add_generation_prompt: bool, **variables: Any
) -> str:
    """Render a chat template from an untrusted source, with the names that transformers offers to templates.

    The sandbox keeps it from Python's internals and bounds what it writes; it does not bound its time.

    Raises:
        UserError: whatever goes wrong in the template, its own `raise_exception` included.
    """
    sandbox = _TemplateSandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    sandbox.filters["tojson"] = _to_json
    functions: dict[str, Callable[..., Any]] = {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    pieces: list[str] = []
    size = 0
    try:
        compiled = sandbox.from_string(template, globals=functions)
        for piece in compiled.generate(messages=messages, add_generation_prompt=add_generation_prompt, **variables):
            size += len(piece)
            if size > MAX_RENDERED_CHARACTERS:
                raise UserError(f"the chat template writes more than {MAX_RENDERED_CHARACTERS} characters")
            pieces.append(piece)
    except UserError:
        raise
    except TemplateError as error:
        raise UserError(f"the chat template refuses this conversation or does not parse: {error}") from None
    except Exception as error:  # noqa: BLE001 - a program of others: any error in it is the user's to know
        raise UserError(f"the chat template fails on this conversation: {type(error).__name__}: {error}") from None
    return "".join(pieces)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    """Jinja's own filter escapes HTML, which no model has seen."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
