"""Keys and values of the tokens already computed."""

import torch
from torch import Tensor

from lalia.model.config import ModelConfig

INITIAL_LENGTH = 64
"""Tokens per slot that the first allocation has room for; room doubles when it runs out."""


class KVCache:
    """Key-value cache of up to `num_slots` sequences of up to `max_length` tokens, one tensor per layer:

        layers[i]   (slots, 2 * key_value_heads, tokens, head_dim), the heads of the keys first, then the values'

    Memory grows by doubling with the slots and tokens in use, so a large limit costs nothing until it is needed.
    Slots are numbered from 0; the user of the cache keeps the occupied ones contiguous (see `move`).

    Attributes:
        lengths: computed tokens of each slot. A forward pass writes behind them; the caller advances them afterwards.
        first: first slot of the next forward pass, which works on the slots first .. first + batch.
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
        self.lengths = [0] * num_slots
        self.first = 0
        shape = (1, 2 * config.num_key_value_heads, min(INITIAL_LENGTH, max_length), config.head_dim)
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]

    def reserve(self, num_slots: int, length: int) -> None:
        """Make room for `num_slots` sequences of `length` tokens."""
        slots, heads, tokens, head_dim = self.layers[0].shape
        if num_slots <= slots and length <= tokens:
            return
        assert num_slots <= self.num_slots and length <= self.max_length
        shape = (
            _doubled(slots, num_slots, self.num_slots),
            heads,
            _doubled(tokens, length, self.max_length),
            head_dim,
        )
        for i, old in enumerate(self.layers):
            # Zeros, not arbitrary memory: attention over a padded batch multiplies unused values by 0, and 0 * NaN
            # is NaN.
            self.layers[i] = old.new_zeros(shape)
            self.layers[i][:slots, :, :tokens] = old

    def positions(self, batch: int, seq: int) -> Tensor:
        """Positions of the tokens about to be computed, (batch, seq)."""
        lengths = self.lengths[self.first : self.first + batch]
        self.reserve(self.first + batch, max(lengths) + seq)
        device = self.layers[0].device
        return torch.tensor(lengths, device=device)[:, None] + torch.arange(seq, device=device)

    def append(self, layer: int, key: Tensor, value: Tensor, positions: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """Write keys and values of new tokens and return all up to `end`.

        Args:
            key, value: (batch, key_value_heads, seq, head_dim)
            positions: (batch, seq) from `positions`.
            end: one past the largest position.

        Returns:
            keys, values: (batch, key_value_heads, end, head_dim) views.
        """
        batch = key.shape[0]
        block = self.layers[layer][self.first : self.first + batch]
        rows = torch.arange(batch, device=key.device)[:, None]
        block[rows, :, positions] = torch.cat((key, value), 1).transpose(1, 2)
        return block[:, : self.num_key_value_heads, :end], block[:, self.num_key_value_heads :, :end]

    def move(self, source: int, target: int) -> None:
        """Copy one slot over another."""
        length = self.lengths[source]
        for block in self.layers:
            block[target, :, :length] = block[source, :, :length]
        self.lengths[target] = length


def _doubled(size: int, needed: int, limit: int) -> int:
    while size < needed:
        size *= 2
    return min(size, limit)
