"""What a run says while it works: lines for people on stderr, one JSON object per event for programs."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console


class Progress:
    """Progress of one run.

    `say` prints a line for people. `record` appends a JSON object to the log file (metrics.jsonl of a training
    stage, log.jsonl of a run) and hands it to `listeners`. Quiet mode (used with --json) prints nothing.
    """

    def __init__(self, log_path: Path | None = None, quiet: bool = False) -> None:
        self.log_path = log_path
        self.quiet = quiet
        self.listeners: list[Callable[[str, dict[str, Any]], None]] = []
        """Called with every event and its fields, beside the log file."""
        self._console = Console(file=sys.stderr, quiet=quiet, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """Print one line for people (no markup is interpreted: text may come from data)."""
        self._console.print(text, markup=False)

    def heading(self, text: str) -> None:
        """Print the title of a stage."""
        self._console.print(f"\n{text}", style="bold", markup=False)

    def record(self, event: str, **fields: Any) -> None:
        """Append one event to the log file, with the wall-clock time in seconds since the epoch."""
        for listener in self.listeners:
            listener(event, fields)
        if self.log_path is None:
            return
        line = json.dumps({"event": event, "time": round(time.time(), 3), **fields}, ensure_ascii=False)
        with self.log_path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
