"""Errors a user can act on."""

LONGEST_MESSAGE = 4000


class UserError(ValueError):
    """A problem in what the user gave us: data, recipe, files, requests.

    The message names the value received, the limit or expectation, and the remedy. The command line prints it
    without a traceback and exits with status 1; the server turns it into a 4xx response. Anything else that
    escapes is a defect of ours and keeps its traceback.

    Messages quote what files and requests hold, so control characters, which could steer a terminal, are shown as
    escapes, and the middle of an endless message is left out and counted.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(_shown(message))


class CorruptFile(UserError):
    """A file that Lalia wrote (shard, checkpoint, model folder) no longer reads as it was written."""


def _shown(message: str) -> str:
    if not message.isprintable():
        message = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in message)
    left_out = len(message) - LONGEST_MESSAGE
    if left_out <= 0:
        return message
    half = LONGEST_MESSAGE // 2
    return f"{message[:half]} ... ({left_out} characters left out) ... {message[-half:]}"
