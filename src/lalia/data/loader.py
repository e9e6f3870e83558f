"""Batches from token shards or conversations: a pure function of the settings, the seed and the step.

There is no state to save: training resumes at step n by asking for batch n.
"""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch

from lalia.data.packing import Plan, plan_epoch
from lalia.data.shards import TokenShards, check_range
from lalia.errors import UserError
from lalia.files import fingerprint

IGNORED = -100
"""Target of a token that is not trained on; what torch's cross_entropy ignores by default."""
PADDING = -1
"""Document id of padding."""


@dataclass(frozen=True)
class Batch:
    """Rows of packed pieces of documents; all tensors are (batch, sequence), on the CPU when made.

    Attributes:
        tokens: int64; padding holds an ordinary id.
        targets: int64, the next token of the same document; IGNORED at a document's end, in padding, and where a
            conversation is not trained on. The target of a row's last token may be the first of another row.
        document_ids: int32, number of the piece in its row from 0, PADDING in padding: tokens attend to each other
            only where these are equal.
        positions: int64, from 0 in each piece.
        single_document: no row holds more than one piece, so plain causal attention is exact.
        num_targets: targets that are not IGNORED.
        num_bytes: UTF-8 bytes of those targets, for bits per byte; None if no byte lengths were given.
        pieces: rows that each row of the loader was cut into.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    document_ids: torch.Tensor
    positions: torch.Tensor
    single_document: bool
    num_targets: int
    num_bytes: int | None
    pieces: int = 1

    def to(self, device: torch.device | str) -> Self:
        """The batch with its tensors on `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Self:
        """The batch in page-locked memory, from which a GPU copies without anybody waiting."""
        return self._each(lambda tensor: tensor.contiguous().pin_memory())

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        names = ("tokens", "targets", "document_ids", "positions")
        return replace(self, **{name: change(getattr(self, name)) for name in names})

    def split(self, rows: int | None) -> list[Self]:
        """The batch in parts of at most `rows` uncut rows (None: in one part); bytes are not counted per part."""
        if rows is None or rows * self.pieces >= len(self.tokens):
            return [self]
        size = rows * self.pieces
        return [self.rows(start, start + size) for start in range(0, len(self.tokens), size)]

    def rows(self, start: int, stop: int) -> Self:
        """The rows from `start` to below `stop`; bytes are not counted."""
        part = slice(start, stop)
        targets = self.targets[part]
        return replace(
            self,
            tokens=self.tokens[part],
            targets=targets,
            document_ids=self.document_ids[part],
            positions=self.positions[part],
            num_targets=int((targets != IGNORED).sum()),
            num_bytes=None,
        )

    def cut(self, pieces: int) -> Self:
        """Every row cut into `pieces` rows of equal length; a document that is cut begins anew at position 0.

        The target of a row's last token is then the first of the next row, as it may be in any batch.
        """
        if pieces == 1:
            return self
        length = self.tokens.shape[1] // pieces
        tokens, targets, ids, positions = (
            value.reshape(-1, length) for value in (self.tokens, self.targets, self.document_ids, self.positions)
        )
        begins = torch.where(ids == ids[:, :1], positions[:, :1], 0)  # only a row's first document was cut
        return replace(
            self,
            tokens=tokens,
            targets=targets,
            document_ids=ids,
            positions=positions - begins,
            num_bytes=None,
            pieces=self.pieces * pieces,
        )


@dataclass(frozen=True, eq=False)
class _Source:
    """Documents one after another, and what there is to say about them.

    `mask` is None or (num_tokens,) bool, whether a token is a target; `vocab_size` is None or the limit that ids are
    checked against; `name` is what error messages call the source.
    """

    name: str
    tokens: np.ndarray
    document_starts: np.ndarray
    mask: np.ndarray | None
    padding_id: int
    vocab_size: int | None
    fingerprint: str


class _Packed:
    """Packed batches of any source; the users' classes below only say where the tokens come from.

    Attributes:
        fingerprint: identity of the stream of batches; training resumes on an equal one only.
    """

    def __init__(
        self, source: _Source, sequence_length: int, batch_size: int, seed: int, token_bytes: np.ndarray | None
    ) -> None:
        for name, value in (("sequence_length", sequence_length), ("batch_size", batch_size)):
            if value < 1:
                raise UserError(f"{name} = {value} must be at least 1")
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.seed = seed
        self.fingerprint = fingerprint([source.fingerprint, sequence_length, batch_size, seed])
        self._source = source
        self._token_bytes = token_bytes
        self._plans: dict[int, Plan] = {}
        self._first_rows = [0]  # row number, counted over all epochs, at which each planned epoch starts
        num_rows = self._plan(0).num_rows
        if num_rows < batch_size:
            raise UserError(
                f"{source.name} has {len(source.tokens)} tokens, which fill {num_rows} rows of {sequence_length}, but "
                f"a batch takes {batch_size}; give more text, or set batch_size to {num_rows} or less, or shorten "
                "sequence_length"
            )

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0.

        Raises:
            CorruptFile: if a shard holds an id outside the vocabulary.
        """
        if step < 0:
            raise UserError(f"step = {step} must not be negative")
        return self.rows(step * self.batch_size, self.batch_size)

    def rows(self, first: int, count: int) -> Batch:
        """`count` rows from the row `first` on, counted over all epochs.

        Raises:
            CorruptFile: if a shard holds an id outside the vocabulary.
        """
        source = self._source
        starts, lengths, ends_document, counts = self._pieces(first, count)
        shape = (count, self.sequence_length)
        # Where each token goes in the flat batch: its row's begin, plus the pieces before its own, plus its position.
        ends = np.cumsum(lengths)
        row_of_piece = np.repeat(np.arange(count), counts)
        row_begin = np.concatenate(([0], ends))[np.cumsum(counts) - counts]
        positions = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
        index = positions + np.repeat(starts, lengths)
        shift = row_of_piece * self.sequence_length - row_begin[row_of_piece]
        place = np.arange(ends[-1]) + np.repeat(shift, lengths)

        has_target = np.ones(ends[-1], dtype=bool)
        has_target[ends[ends_document] - 1] = False
        following = np.minimum(index + 1, len(source.tokens) - 1)
        tokens, targets = source.tokens[index], source.tokens[following].astype(np.int64)
        if source.vocab_size is not None:
            check_range(tokens, source.vocab_size, source.name)
            check_range(targets, source.vocab_size, source.name)
        if source.mask is not None:
            has_target &= source.mask[following]
        targets[~has_target] = IGNORED

        piece_in_row = np.arange(len(lengths)) - np.repeat(np.cumsum(counts) - counts, counts)
        num_bytes = None if self._token_bytes is None else int(self._token_bytes[targets[has_target]].sum())
        return Batch(
            tokens=_scatter(tokens, place, shape, source.padding_id),
            targets=_scatter(targets, place, shape, IGNORED),
            document_ids=_scatter(np.repeat(piece_in_row, lengths), place, shape, PADDING, np.int32),
            positions=_scatter(positions, place, shape, 0),
            single_document=bool((counts <= 1).all()),
            num_targets=int(has_target.sum()),
            num_bytes=num_bytes,
        )

    def single_document(self, step: int) -> bool:
        """Whether no row of a step's batch holds more than one piece; cheaper than the batch."""
        return bool((self._pieces(step * self.batch_size, self.batch_size)[3] <= 1).all())

    def report(self) -> dict[str, Any]:
        """Figures of the first epoch; later ones differ by a few rows, because documents are cut elsewhere."""
        plan = self._plan(0)
        num_tokens = int(plan.lengths.sum())
        whole = np.isin(plan.starts, self._source.document_starts)
        return {
            "rows_per_epoch": plan.num_rows,
            "steps_per_epoch": round(plan.num_rows / self.batch_size, 3),
            "tokens_per_epoch": num_tokens,
            "documents": len(self._source.document_starts),
            "documents_cut": int(plan.ends_document.sum()) - int((plan.ends_document & whole).sum()),
            "padding_share": round(1 - num_tokens / (plan.num_rows * self.sequence_length), 6),
        }

    def _pieces(self, row: int, missing: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Starts, lengths and ends_document of the pieces of rows, and the number of pieces of each row."""
        parts: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
        while missing:
            while row >= self._first_rows[-1]:
                self._plan(len(self._first_rows) - 1)
            epoch = bisect.bisect_right(self._first_rows, row) - 1
            plan = self._plan(epoch)
            first = row - self._first_rows[epoch]
            taken = min(missing, plan.num_rows - first)
            offsets = plan.row_pieces[first : first + taken + 1]
            pieces = slice(int(offsets[0]), int(offsets[-1]))
            parts.append((plan.starts[pieces], plan.lengths[pieces], plan.ends_document[pieces], np.diff(offsets)))
            row += taken
            missing -= taken
        starts, lengths, ends_document, counts = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        return starts, lengths, ends_document, counts

    def _plan(self, epoch: int) -> Plan:
        """The plan of an epoch. The two most recent are kept; where epochs begin is known for all planned so far."""
        if epoch not in self._plans:
            while len(self._plans) > 1:
                del self._plans[next(iter(self._plans))]
            self._plans[epoch] = plan_epoch(
                self._source.document_starts, len(self._source.tokens), self.sequence_length, self.seed, epoch
            )
        if epoch == len(self._first_rows) - 1:
            self._first_rows.append(self._first_rows[-1] + self._plans[epoch].num_rows)
        return self._plans[epoch]


class PackedBatches(_Packed):
    """Packed batches of a split of token shards, epoch after epoch without end.

    Each epoch holds every token of every document once. A batch may hold the last rows of an epoch and the first of
    the next.
    """

    def __init__(
        self,
        shards: TokenShards,
        sequence_length: int,
        batch_size: int,
        seed: int,
        token_bytes: np.ndarray | None = None,
    ) -> None:
        """Plan the first epoch.

        Args:
            shards: where the tokens are.
            sequence_length: tokens of a row.
            batch_size: rows of a batch.
            seed: decides the cuts and the order, together with the epoch.
            token_bytes: `Tokenizer.token_bytes_table()`, to count the bytes of the targets.

        Raises:
            UserError: if the split has fewer rows than one batch.
        """
        source = _Source(
            name=f"the {shards.split} split",
            tokens=shards.tokens,
            document_starts=shards.document_starts,
            mask=None,
            padding_id=shards.end_of_text_id,
            vocab_size=shards.vocab_size,
            fingerprint=shards.fingerprint,
        )
        super().__init__(source, sequence_length, batch_size, seed, token_bytes)


class PackedConversations(_Packed):
    """Packed batches of conversations for finetuning: none is cut, and only masked-in tokens are targets."""

    def __init__(
        self,
        conversations: Sequence[tuple[list[int], list[int]]],
        sequence_length: int,
        batch_size: int,
        seed: int,
        token_bytes: np.ndarray | None = None,
    ) -> None:
        """Plan the first epoch.

        Args:
            conversations: token ids and, for each, 1 if it is to be predicted (`chat.render_with_mask`).
            sequence_length: tokens of a row.
            batch_size: rows of a batch.
            seed: decides the order, together with the epoch.
            token_bytes: `Tokenizer.token_bytes_table()`, to count the bytes of the targets.

        Raises:
            UserError: if a conversation is longer than a row, trains nothing or has a mask of another length, or if
                there are fewer rows than one batch.
        """
        if not conversations:
            raise UserError("there is no conversation to train on; give at least one")
        for number, (ids, mask) in enumerate(conversations):
            _check_conversation(number, ids, mask, sequence_length)
        lengths = np.array([len(ids) for ids, _ in conversations], dtype=np.int64)
        tokens = np.concatenate([np.array(ids, dtype=np.int64) for ids, _ in conversations])
        targets = np.concatenate([np.array(mask, dtype=bool) for _, mask in conversations])
        source = _Source(
            name="the set of conversations",
            tokens=tokens,
            document_starts=np.cumsum(lengths) - lengths,
            mask=targets,
            padding_id=0,
            vocab_size=None,
            fingerprint=fingerprint([tokens.tolist(), targets.tolist(), lengths.tolist()]),
        )
        super().__init__(source, sequence_length, batch_size, seed, token_bytes)


def _check_conversation(number: int, ids: list[int], mask: list[int], sequence_length: int) -> None:
    if len(ids) != len(mask):
        raise UserError(f"conversation {number} has {len(ids)} tokens but a mask of {len(mask)}; give one per token")
    if len(ids) > sequence_length:
        raise UserError(
            f"conversation {number} has {len(ids)} tokens, more than sequence_length = {sequence_length}; "
            "shorten it, drop it, or raise sequence_length"
        )
    if not any(mask[1:]):  # the first token is nobody's target
        raise UserError(f"conversation {number} has no token to train on; give it an assistant message, or drop it")


def _scatter(
    values: np.ndarray, place: np.ndarray, shape: tuple[int, int], fill: int, dtype: Any = np.int64
) -> torch.Tensor:
    flat = np.full(shape[0] * shape[1], fill, dtype=dtype)
    flat[place] = values
    return torch.from_numpy(flat.reshape(shape))
