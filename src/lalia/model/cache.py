"""Keys and values of the tokens already computed."""

import math

import numpy as np
import torch
from torch import Tensor

from lalia.model.config import ModelConfig

INITIAL_LENGTH = 64
"""Tokens per slot that the first allocation has room for."""


class KVCache:
    """Key-value cache of up to `num_slots` sequences of up to `max_length` tokens, one tensor per layer:

        layers[i]   (slots, 2 * key_value_heads, rows, head_dim), the heads of the keys first, then the values'

    In a layer that attends to everything, row p holds position p. A layer with a sliding window w needs w - 1 tokens
    and the present one, whatever the length, so it has at most w rows, used as a ring: row p % w holds position p
    until position p + w takes its place.

        position      5   6   2   3   4         w = 5, 7 tokens computed; the next goes to row 7 % 5 = 2, over
        row           0   1   2   3   4         position 2, which no token from 7 on attends to

    So `lengths` may be set back to repeat the last token (as after a failed step), but in a windowed layer not further,
    once the ring is full.

    Room grows by doubling with the slots and tokens in use, or by `reserve` to exactly what is known to come. On a CPU
    memory is taken from the system only where something was written, so that neither room that is not used yet nor
    slots shorter than the longest cost any: the cache occupies the sum of `ModelConfig.cache_bytes` over its sequences.
    Slots are numbered from 0; the user of the cache keeps the occupied ones contiguous (see `move`).

    Attributes:
        lengths: computed tokens of each slot. A forward pass writes behind them; the caller advances them afterwards.
        first: first slot of the next forward pass, which works on the slots first .. first + batch.
        windows: sliding window of each layer, or None.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_slots: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_slots, self.max_length = num_slots, max_length
        self.num_key_value_heads = config.num_key_value_heads
        self.windows = [config.window_of_layer(layer) for layer in range(config.num_hidden_layers)]
        self.lengths = [0] * num_slots
        self.first = 0
        self._slots, self._tokens = 1, min(INITIAL_LENGTH, max_length)
        shape = (2 * config.num_key_value_heads, config.head_dim)
        device = torch.device(device)
        self.layers = [
            _zeros((1, shape[0], _rows(self._tokens, window), shape[1]), dtype, device) for window in self.windows
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of the room there is, used or not."""
        return sum(block.nbytes for block in self.layers)

    def reserve(self, num_slots: int, length: int, exact: bool = False) -> None:
        """Make room for `num_slots` sequences of `length` tokens.

        Args:
            exact: for this length and no more, where it is known how long the sequence will become; otherwise the
                room is doubled, so that a sequence that grows by one token at a time is rarely copied.
        """
        if num_slots <= self._slots and length <= self._tokens:
            return
        assert num_slots <= self.num_slots and length <= self.max_length
        slots = _doubled(self._slots, num_slots, self.num_slots)
        tokens = max(self._tokens, length) if exact else _doubled(self._tokens, length, self.max_length)
        for i, (old, window) in enumerate(zip(self.layers, self.windows, strict=True)):
            _, heads, rows, head_dim = old.shape
            new = _zeros((slots, heads, _rows(tokens, window), head_dim), old.dtype, old.device)
            for slot, length in enumerate(self.lengths[: self._slots]):
                used = min(length, rows)  # the rest stays untouched memory
                new[slot, :, :used] = old[slot, :, :used]
            self.layers[i] = new
        self._slots, self._tokens = slots, tokens

    def positions(self, batch: int, seq: int) -> Tensor:
        """Positions of the tokens about to be computed, (batch, seq)."""
        lengths = self.lengths[self.first : self.first + batch]
        self.reserve(self.first + batch, max(lengths) + seq)
        device = self.layers[0].device
        return torch.tensor(lengths, device=device)[:, None] + torch.arange(seq, device=device)

    def key_positions(self, positions: Tensor, window: int | None) -> Tensor:
        """Positions of the keys that `append` returns for new tokens at `positions` (batch, seq): (batch, keys).

        Negative ones belong to nothing, and in a layer without a window those beyond a sequence's end do neither.
        """
        device = positions.device
        if window is None:
            return torch.arange(int(positions.max()) + 1, device=device).expand(positions.shape[0], -1)
        kept = min(int(positions[:, 0].max()), window - 1)
        return torch.cat((positions[:, :1] + torch.arange(-kept, 0, device=device), positions), 1)

    def append(self, layer: int, key: Tensor, value: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values of new tokens and return all that these may attend to.

        Args:
            key, value: (batch, key_value_heads, seq, head_dim)
            positions: (batch, seq) from `positions`.

        Returns:
            keys, values: (batch, key_value_heads, keys, head_dim), of the positions that `key_positions` says.
        """
        batch, kv_heads = key.shape[:2]
        new, window = torch.cat((key, value), 1), self.windows[layer]
        rows = torch.arange(batch, device=key.device)[:, None]
        block = self.layers[layer][self.first : self.first + batch]
        if window is None:
            block[rows, :, positions] = new.transpose(1, 2)
            found = block[:, :, : int(positions.max()) + 1]
        else:
            # Read before writing: the first of the new tokens need what the last of them overwrite.
            kept = self.key_positions(positions, window)[:, : -positions.shape[1]]
            old = block[rows, :, kept % block.shape[2]]  # where negative, any row that exists
            found = torch.cat((old.transpose(1, 2), new), 2)
            block[rows, :, positions[:, -window:] % window] = new[:, :, -window:].transpose(1, 2)
        return found[:, :kv_heads], found[:, kv_heads:]

    def append_piece(self, layer: int, new: Tensor) -> Tensor:
        """`append` for a piece of the one sequence in slot `first`, with few operations.

        Args:
            new: (2 * key_value_heads, seq, head_dim) keys and values.

        Returns:
            (2 * key_value_heads, keys, head_dim): all positions, or in a windowed layer the window - 1 before the
            piece (as many as there are) and the piece.
        """
        start, seq, window = self.lengths[self.first], new.shape[1], self.windows[layer]
        block = self.layers[layer].select(0, self.first)
        if window is None or start + seq <= window:
            block.narrow(1, start, seq).copy_(new)
            return block.narrow(1, 0, start + seq)
        found = new
        if kept := min(start, window - 1):
            old = torch.arange(start - kept, start, device=new.device) % window
            found = torch.cat((block.index_select(1, old), new), 1)
        last = torch.arange(max(start, start + seq - window), start + seq, device=new.device) % window
        block.index_copy_(1, last, new[:, -last.shape[0] :])
        return found

    def move(self, source: int, target: int) -> None:
        """Copy one slot over another."""
        length = self.lengths[source]
        for block in self.layers:
            rows = min(length, block.shape[2])
            block[target, :, :rows] = block[source, :, :rows]
        self.lengths[target] = length


def _rows(tokens: int, window: int | None) -> int:
    return tokens if window is None else min(tokens, window)


def _doubled(size: int, needed: int, limit: int) -> int:
    while size < needed:
        size *= 2
    return min(size, limit)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, not arbitrary memory: attention over a padded batch multiplies unused values by 0, and 0 * NaN is NaN."""
    with torch.inference_mode(False):  # so that passes with and without inference mode may write
        if device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=device)
        # torch.zeros writes its zeros. NumPy asks the system for zeroed pages, which occupy memory once written to.
        size, alignment = math.prod(shape) * dtype.itemsize, 64
        memory = torch.from_numpy(np.zeros(size + alignment, np.uint8))
        begin = -memory.data_ptr() % alignment
        return memory[begin : begin + size].view(dtype).view(shape)
