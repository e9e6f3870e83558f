"""The sizes of model that the planner chooses among."""

from lalia.errors import UserError
from lalia.model.config import ModelConfig
from lalia.model.shapes import ArchitectureConfig
from lalia.planning.rules import depth_of

WIDTHS = (64, 96, 128, 192, 256, 320, 384, 448, 512, 640, 768, 1024)
LARGE_WIDTHS = (1280, 1536, 2048, 2560, 3072, 4096, 5120, 6144, 8192)
"""Widths the planner chooses among; the depth follows from the width."""


def candidates(asked: ArchitectureConfig, vocab_size: int, length: int) -> list[ModelConfig]:
    """The sizes the planner chooses among, small to large, as far as the recipe leaves them open.

    Raises:
        UserError: if no width suits what the recipe fixes.
    """
    widths = [asked.hidden_size] if asked.hidden_size else [*WIDTHS, *LARGE_WIDTHS]
    shapes, refused = [], ""
    for width in widths:
        try:
            shapes.append(asked.build(vocab_size, length, width, asked.num_hidden_layers or depth_of(width)))
        except UserError as error:  # such as heads that do not divide; another width may do
            refused = str(error)
    if not shapes:
        raise UserError(f"no width among {', '.join(map(str, widths))} suits the recipe: {refused}")
    return shapes
