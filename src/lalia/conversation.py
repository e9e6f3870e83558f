"""A conversation in the terminal: lines in, streamed replies out."""

import sys
from typing import Any

from lalia.errors import UserError
from lalia.inference.language_model import LanguageModel
from lalia.inference.sampling import SamplingParams


def reply_tokens(context: int) -> int:
    """Most tokens of a reply in a context of so many: an eighth of it, from 120 to 1,024, and never more than half.

    What is not the reply is left for the conversation. A small model that misses its end stops soon; a larger one can
    finish a page.
    """
    return min(max(120, context // 8), 1024, max(1, context // 2))


def converse(
    model: LanguageModel, system: str | None, sampling: dict[str, Any], quiet: bool = False
) -> list[dict[str, str]]:
    """Read turns from standard input until it ends and print the replies as they are produced.

    When the conversation outgrows the model's context the oldest exchange is left out, and that is said.

    Returns:
        the whole conversation.
    """
    SamplingParams.parse(sampling, "sampling")  # before the first line is typed
    interactive = sys.stdin.isatty() and not quiet
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    if interactive:
        print(f"Talking with {model.name}. An empty line or Ctrl-D ends the conversation.")
    while True:
        line = _read_turn(interactive)
        if not line:
            break
        if not interactive and not quiet:
            print(f"you> {line}")
        messages.append({"role": "user", "content": line})
        try:
            shown = model.fit_messages(messages, sampling["max_tokens"])
            if len(shown) < len(messages) and not quiet:
                left_out = len(messages) - len(shown)
                print(f"({left_out} earlier turns no longer fit the context of {model.max_length} tokens)")
            reply = _stream_reply(model, shown, sampling, quiet)
        except UserError as error:
            if not interactive:
                raise
            messages.pop()
            print(f"lalia: {error}", file=sys.stderr)
            continue
        messages.append({"role": "assistant", "content": reply})
    return messages


def _read_turn(interactive: bool) -> str:
    if interactive:
        try:
            return input("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return ""
    try:
        return sys.stdin.readline().strip()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 text ({error.reason} at byte {error.start})") from None


def _stream_reply(model: LanguageModel, messages: list[dict[str, str]], sampling: dict[str, Any], quiet: bool) -> str:
    pieces = []
    stream = model.chat(messages, stream=True, **sampling)
    if not quiet:
        sys.stdout.write(f"{model.name}> ")
    for piece in stream:
        pieces.append(piece)
        if not quiet:
            sys.stdout.write(piece)
            sys.stdout.flush()
    if not quiet:
        print()
    return "".join(pieces)
