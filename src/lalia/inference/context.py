"""What the layers of one decoding pass share: positions, rotary tables, masks; and their attention over the cache.

Two kinds of pass: one token of each of several sequences, whose cost is starting operations and reading the cache; and
a piece of one sequence, whose cost is arithmetic and whose memory must not grow with the keys before it.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from lalia.model.attention import attend as attend_plainly
from lalia.model.attention import attend_behind
from lalia.model.cache import KVCache
from lalia.model.config import RopeScaling

if TYPE_CHECKING:
    from lalia.inference.decoder import Decoder

Rope = tuple[float, RopeScaling | None]

PADDED_BATCH_TOKENS = 192
"""Up to this many cached tokens in the longest sequence, a batch attends in one padded operation; beyond, sequence by
sequence, which reads no padding but starts an operation for each."""

BLOCK_ROWS, BLOCK_SCORES = 128, 1 << 22
"""Tokens of a piece that attend together where a mask is needed: so many, and with a soft-cap, where all scores are in
memory at once, no more than make so many scores."""

ROTARY_TABLE_POSITIONS = 8192
"""Positions whose cos and sin are kept once they were needed. Those of later ones are computed in every pass: a table
of 131,072 positions takes as much memory as a layer of a small model's cache."""


class Context:
    """What the layers of one forward pass share: positions, rotary tables, masks, and the cache they write."""

    def __init__(self, decoder: "Decoder", cache: KVCache, batch: int, seq: int) -> None:
        self.decoder, self.cache, self.batch, self.seq = decoder, cache, batch, seq
        self.first = cache.first
        self.starts = cache.lengths[self.first : self.first + batch]
        self.end = max(self.starts) + seq
        cache.reserve(self.first + batch, self.end)
        self.padded = batch > 1 and self.end <= PADDED_BATCH_TOKENS
        if batch > 1:
            self.slots = torch.arange(self.first, self.first + batch, device=decoder.device)
            self.positions = torch.tensor(self.starts, device=decoder.device)  # (batch,)
        self._rotary: dict[Rope, tuple[Tensor, Tensor]] = {}
        self._masks: dict[tuple[int, int], Tensor] = {}
        self._ring_rows: dict[int, Tensor] = {}
        self._views: dict[int | None, tuple[tuple[tuple[int, ...], tuple[int, ...], int], ...]] = {}

    def rows_positions(self) -> Tensor | slice:
        """Position of each row."""
        return self.positions if self.batch > 1 else slice(self.starts[0], self.end)

    def rotary(self, rope: Rope, layer: int) -> tuple[Tensor, Tensor]:
        """cos and signed sin, (rows, 1, rotary_size) each."""
        if rope not in self._rotary:
            if self.end > ROTARY_TABLE_POSITIONS:
                one = torch.arange(self.starts[0], self.end, device=self.decoder.device)
                cos, sin = self.decoder.rotary_of(self.positions if self.batch > 1 else one, layer)
            else:
                rows = self.rows_positions()
                cos, sin = (table[rows] for table in self.decoder.rotary(rope, layer, self.end))
            self._rotary[rope] = (cos.unsqueeze(1), sin.unsqueeze(1))
        return self._rotary[rope]

    def write(self, layer: int, kv: Tensor, window: int | None) -> Tensor:
        """Put the keys and values (rows, 2 * key_value_heads, head_dim) of new tokens into the cache.

        Returns:
            What to attend to, (batch, 2 * key_value_heads, tokens, head_dim). For a piece those that
            `KVCache.append_piece` says; for one token of each sequence all rows of the slots, longer than what is
            filled and, in a windowed layer, in the order of the ring, which attention does not mind.
        """
        block, first = self.cache.layers[layer], self.first
        if self.seq > 1:
            return self.cache.append_piece(layer, kv.transpose(0, 1)).unsqueeze(0)
        if self.batch > 1:
            block[self.slots, :, self._rows(window)] = kv
        else:
            row = self.starts[0] if window is None else self.starts[0] % window
            block.select(0, first).narrow(1, row, 1).copy_(kv.transpose(0, 1))
        return block.narrow(0, first, self.batch)

    def _rows(self, window: int | None) -> Tensor:
        """Row of the cache that the new token of each sequence goes to, (batch,)."""
        if window is None:
            return self.positions
        if window not in self._ring_rows:
            self._ring_rows[window] = self.positions % window
        return self._ring_rows[window]

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, window: int | None, scale: float) -> Tensor:
        """softmax(query keys^T * scale) values over the cached tokens that each row may see.

        Args:
            query: (rows, heads, head_dim)
            keys, values: (batch, key_value_heads, tokens, head_dim) from `write`.

        Returns:
            (rows, heads * head_dim)
        """
        rows, heads, head_dim = query.shape
        kv_heads = keys.shape[1]
        if self.seq > 1:
            query = query.transpose(0, 1).unsqueeze(0)  # (1, heads, seq, head_dim)
            out = self._attend_piece(query, keys, values, window, scale)
            return out[0].transpose(0, 1).reshape(rows, heads * head_dim)
        if self.decoder.config.attention_softcap:
            return self._attend_softcapped(query, keys, values, window, scale)
        # The queries that share a key-value head stand where a sequence would: no mask among them, and no copies.
        grouped = query.view(rows, kv_heads, heads // kv_heads, head_dim)
        if self.padded:
            filled = self._filled(self.end, window)
            keys, values = keys.narrow(2, 0, filled), values.narrow(2, 0, filled)
            mask = self._padding_mask(filled)
            out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
            return out.reshape(rows, heads * head_dim)
        pieces = []
        for i, (q, start) in enumerate(zip(grouped.split(1), self.starts, strict=True)):
            k, v = (t.narrow(0, i, 1).narrow(2, 0, self._filled(start + 1, window)) for t in (keys, values))
            pieces.append(F.scaled_dot_product_attention(q, k, v, scale=scale))
        out = pieces[0] if rows == 1 else torch.cat(pieces)
        return out.view(rows, heads * head_dim)

    def attend_one(self, layer: int, qkv: Tensor, window: int | None, scale: float) -> Tensor:
        """`write` and `attend` for one token of one sequence and no soft-cap, in the fewest operations and views: in a
        small model they take a fifth of a step, and starting the fused kernel takes longer than two products.

        Args:
            qkv: (1, heads + 2 * key_value_heads, head_dim), contiguous; the queries are scaled in place.

        Returns:
            (1, heads * head_dim)
        """
        block = self.cache.layers[layer]
        if window not in self._views:
            self._views[window] = self._views_of(block, qkv, window)
        query, kv, target, keys, values = self._views[window]
        new, old = qkv.storage_offset(), block.storage_offset()
        target = block.as_strided(target[0], target[1], old + target[2])
        target.copy_(qkv.as_strided(kv[0], kv[1], new + kv[2]))
        q = qkv.as_strided(query[0], query[1], new).mul_(scale)
        scores = torch.bmm(q, block.as_strided(keys[0], keys[1], old + keys[2]))  # (key_value_heads, group, tokens)
        out = torch.bmm(torch.softmax(scores, -1), block.as_strided(values[0], values[1], old + values[2]))
        return out.view(1, -1)

    def _views_of(
        self, block: Tensor, qkv: Tensor, window: int | None
    ) -> tuple[tuple[tuple[int, ...], tuple[int, ...], int], ...]:
        """Sizes, strides and offsets of the views of `attend_one`, the same in all layers with this window."""
        assert qkv.is_contiguous()
        slot, head, token, one = block.stride()
        kv_heads, head_dim = block.shape[1] // 2, block.shape[3]
        heads, offset = qkv.shape[1] - 2 * kv_heads, self.first * slot
        row = self.starts[0] if window is None else self.starts[0] % window
        group, filled = heads // kv_heads, self._filled(self.end, window)
        return (
            ((kv_heads, group, head_dim), (group * head_dim, head_dim, 1), 0),
            ((2 * kv_heads, head_dim), (head_dim, 1), heads * head_dim),
            ((2 * kv_heads, head_dim), (head, one), offset + row * token),
            ((kv_heads, head_dim, filled), (head, one, token), offset),
            ((kv_heads, filled, head_dim), (head, token, one), offset + kv_heads * head),
        )

    def _attend_softcapped(
        self, query: Tensor, keys: Tensor, values: Tensor, window: int | None, scale: float
    ) -> Tensor:
        """`attend` for one token of each sequence without fused kernels, which know no soft-cap."""
        filled = self._filled(self.end, window)
        keys, values = keys.narrow(2, 0, filled), values.narrow(2, 0, filled)
        allowed = self._padding_mask(filled) == 0 if self.batch > 1 else None
        softcap = self.decoder.config.attention_softcap
        out = attend_plainly(query.unsqueeze(2), keys, values, scale, allowed, True, softcap)
        return out.transpose(1, 2).reshape(query.shape[0], -1)

    def _filled(self, length: int, window: int | None) -> int:
        """Rows of the cache that a sequence of `length` tokens fills. In a windowed layer the last token may see all
        of them."""
        return length if window is None else min(length, window)

    def _padding_mask(self, filled: int) -> Tensor:
        """For one token of each sequence: additive mask (batch, 1, 1, filled) over the rows of the cache."""
        key = (0, filled)
        if key not in self._masks:
            hidden = torch.arange(filled, device=self.decoder.device) > self.positions[:, None]
            self._masks[key] = _additive(hidden, self.decoder.dtype)[:, None, None]
        return self._masks[key]

    def _attend_piece(
        self, query: Tensor, keys: Tensor, values: Tensor, window: int | None, scale: float
    ) -> Tensor:  # query (1, heads, seq, head_dim)
        heads, kv_heads, num_keys = query.shape[1], keys.shape[1], keys.shape[2]
        softcap = self.decoder.config.attention_softcap
        if not softcap and (window is None or self.end <= window):
            if num_keys == self.seq:
                grouped = heads != kv_heads
                return F.scaled_dot_product_attention(
                    query, keys, values, is_causal=True, scale=scale, enable_gqa=grouped
                )
            if query.device.type == "cpu":
                return attend_behind(query, keys, values, scale)
        size = max(1, min(BLOCK_ROWS, BLOCK_SCORES // (heads * num_keys))) if softcap else BLOCK_ROWS
        before, blocks = num_keys - self.seq, []  # before: keys of earlier pieces
        for q in query.split(size, 2):
            rows, end = q.shape[2], before + q.shape[2]
            begin = 0 if window is None else max(0, before + 1 - window)
            k, v = keys[:, :, begin:end], values[:, :, begin:end]
            # The queries that share a key-value head stand one behind the other.
            mask = self._piece_mask(rows, end - begin, heads // kv_heads, window)
            out = attend_plainly(q.reshape(1, kv_heads, -1, q.shape[3]), k, v, scale, mask, True, softcap)
            blocks.append(out.view(q.shape))
            before = end
        return torch.cat(blocks, 2)

    def _piece_mask(self, rows: int, num_keys: int, repeats: int, window: int | None) -> Tensor:
        """For `rows` successive tokens, whose own keys are the last, several times: mask (repeats * rows, keys).

        Additive, which fused attention wants, or where there is a soft-cap boolean.
        """
        key = (rows, num_keys)
        if window is not None and key in self._masks:
            return self._masks[key]
        positions = torch.arange(num_keys, device=self.decoder.device)
        query = positions[num_keys - rows :, None]
        allowed = positions <= query
        if window is not None:
            allowed &= positions > query - window
        softcap = self.decoder.config.attention_softcap
        mask = (allowed if softcap else _additive(~allowed, self.decoder.dtype)).repeat(repeats, 1)
        if window is not None:  # those over everything are as large as they are many
            self._masks[key] = mask
        return mask


def _additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
