"""The events of metrics.jsonl for TensorBoard too."""

from pathlib import Path
from typing import Any

from lalia.errors import UserError


class TensorBoard:
    """Writes the numbers of a stage's events as curves over steps, and texts as texts.

    A step that is recorded again, after an interruption or after going back, replaces the first one: TensorBoard is
    told, by the first event of a process or by that of going back, which steps to forget. Needs the extra
    `tensorboard`.

    Args:
        folder: for `tensorboard --logdir`; one file per process comes there.

    Raises:
        UserError: if the package is missing.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise UserError(
                f"pretrain.tensorboard = true needs {error.name or 'tensorboard'}; install it with: "
                'pip install "lalia[tensorboard]", or leave the setting out (metrics.jsonl has the same figures)'
            ) from None
        self._open, self._writer, self.folder = SummaryWriter, None, folder

    def __call__(self, event: str, fields: dict[str, Any]) -> None:
        """One event, as `Progress.record` has it; events without a step have no place on a curve."""
        step = fields.get("step")
        if not isinstance(step, int):
            return
        first = step
        if event == "rewind" and self._writer is not None:
            self._writer.close()
            self._writer = None
            first = step + 1  # what was recorded at the step of the checkpoint itself stays
        if self._writer is None:
            self._writer = self._open(str(self.folder), purge_step=first)
        for name, value in fields.items():
            if isinstance(value, str):
                self._writer.add_text(f"{event}/{name}", value, step)
            elif isinstance(value, int | float) and not isinstance(value, bool) and name != "step":
                self._writer.add_scalar(f"{event}/{name}", value, step)
        self._writer.flush()
