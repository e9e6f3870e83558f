"""Stop strings in streamed text."""

from collections.abc import Sequence


class StopStrings:
    """Passes text on until a stop string completes, and holds back what could be the beginning of one.

    Text may come in pieces of any size: what passes, and where it ends, is the same as for one character at a time.
    Of several stop strings the one completed first wins; of those completed at the same character, the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Take more text.

        Returns:
            The text that can be given out, and whether a stop string ended it there. Nothing follows after that.
        """
        if not self._stops:
            return text, False
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        keep = max(_beginning(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _beginning(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` at the end of `text`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
