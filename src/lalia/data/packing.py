"""Which pieces of which documents share a row, in which order: planned per epoch, a pure function of a key.

Nothing is dropped: a document longer than a row is cut, and what is left over is packed best-fit-decreasing (for
language models arXiv 2404.10830).
"""

from dataclasses import dataclass

import numpy as np

# Purposes, mixed into the keys so that the three draws of an epoch are independent.
_PHASE, _TIES, _ORDER = 1, 2, 3


@dataclass(frozen=True, eq=False)
class Plan:
    """The rows of one epoch.

    Attributes:
        starts: first token of each piece in the flat token array, (num_pieces,) int64, rows one after another.
        lengths: tokens of each piece, (num_pieces,) int64.
        ends_document: whether the piece's last token is its document's last, (num_pieces,) bool.
        row_pieces: pieces of row r are row_pieces[r] to row_pieces[r + 1], (num_rows + 1,) int64.
    """

    starts: np.ndarray
    lengths: np.ndarray
    ends_document: np.ndarray
    row_pieces: np.ndarray

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.row_pieces) - 1


def keyed_hash(values: np.ndarray, *key: int) -> np.ndarray:
    """A 64-bit hash of each value under a key, the same on every machine and numpy version.

    The mixing function is splitmix64's (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
    """
    state = np.zeros(1, dtype=np.uint64)
    for part in key:
        state = _mix(state + np.uint64(part & 0xFFFF_FFFF_FFFF_FFFF))
    return _mix(values.astype(np.uint64) + state)


def _mix(values: np.ndarray) -> np.ndarray:
    values = values + np.uint64(0x9E3779B97F4A7C15)  # arrays wrap around silently, which is what the hash wants
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def keyed_permutation(size: int, *key: int) -> np.ndarray:
    """A permutation of range(size), int64, that depends on the key only."""
    return np.argsort(keyed_hash(np.arange(size), *key), kind="stable")


def cut_documents(
    document_starts: np.ndarray, num_tokens: int, sequence_length: int, phases: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut documents longer than a row into a first piece of `phases` tokens, whole rows, and a rest.

    Args:
        document_starts: (num_documents,) int64.
        num_tokens: end of the last document.
        sequence_length: tokens of a row.
        phases: length of the first piece of each long document, 1 to sequence_length, (num_documents,).

    Returns:
        starts, lengths and ends_document of the pieces, in document order.
    """
    lengths = np.diff(document_starts, append=num_tokens)
    first = np.where(lengths > sequence_length, phases, lengths)
    counts = 1 + -(-(lengths - first) // sequence_length)
    document = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)  # of the piece in its document
    begin = np.where(number == 0, 0, first[document] + (number - 1) * sequence_length)
    end = np.minimum(first[document] + number * sequence_length, lengths[document])
    return document_starts[document] + begin, end - begin, end == lengths[document]


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Assign pieces to rows: longest first, each to the row with the least room that still holds it.

    Pieces of one length are placed together, so the time grows with the number of different lengths, not of pieces.

    Args:
        lengths: (num_pieces,) integers, 1 to capacity; among equal lengths, earlier ones are placed first.
        capacity: tokens of a row.

    Returns:
        row of each piece, (num_pieces,) int64, and the number of rows.
    """
    rows = np.empty(len(lengths), dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    values, begins = np.unique(-lengths[order], return_index=True)
    ends = np.append(begins[1:], len(lengths))
    room: dict[int, list[np.ndarray]] = {}  # free tokens -> rows that have that many, in chunks
    spare = 0  # bit c is set when room has rows with c free tokens
    num_rows = 0
    for length, begin, end in zip((-values).tolist(), begins.tolist(), ends.tolist(), strict=True):
        while begin < end:
            fitting = spare >> length << length
            if fitting:
                free = (fitting & -fitting).bit_length() - 1
                chunk = room[free].pop()
                if not room[free]:
                    spare &= ~(1 << free)
            else:
                free = capacity
                chunk = np.arange(num_rows, num_rows + -(-(end - begin) // (capacity // length)))
                num_rows += len(chunk)
            # A row that received one piece has less room than its peers, so it receives the next as well.
            per_row = free // length
            full = min(len(chunk), (end - begin) // per_row)
            rows[order[begin : begin + full * per_row]] = np.repeat(chunk[:full], per_row)
            begin += full * per_row
            spare = _put(room, spare, free - per_row * length, chunk[:full])
            rest = chunk[full:]
            if begin < end and len(rest):
                rows[order[begin:end]] = rest[0]
                spare = _put(room, spare, free - (end - begin) * length, rest[:1])
                begin, rest = end, rest[1:]
            spare = _put(room, spare, free, rest)
    return rows, num_rows


def _put(room: dict[int, list[np.ndarray]], spare: int, free: int, rows: np.ndarray) -> int:
    if free == 0 or not len(rows):
        return spare
    room.setdefault(free, []).append(rows)
    return spare | 1 << free


def plan_epoch(document_starts: np.ndarray, num_tokens: int, sequence_length: int, seed: int, epoch: int) -> Plan:
    """The rows of one epoch: every token of every document exactly once, in an order drawn from (seed, epoch).

    Where long documents are cut, which leftovers share a row, and the order of rows change with the epoch.
    """
    documents = np.arange(len(document_starts))
    phases = (keyed_hash(documents, seed, epoch, _PHASE) % np.uint64(sequence_length)).astype(np.int64) + 1
    starts, lengths, ends_document = cut_documents(document_starts, num_tokens, sequence_length, phases)
    ties = keyed_permutation(len(starts), seed, epoch, _TIES)
    starts, lengths, ends_document = starts[ties], lengths[ties], ends_document[ties]
    rows, num_rows = best_fit_decreasing(lengths, sequence_length)
    position_of_row = keyed_permutation(num_rows, seed, epoch, _ORDER)
    by_row = np.argsort(position_of_row[rows], kind="stable")
    row_pieces = np.zeros(num_rows + 1, dtype=np.int64)
    np.cumsum(np.bincount(position_of_row[rows], minlength=num_rows), out=row_pieces[1:])
    return Plan(starts[by_row], lengths[by_row], ends_document[by_row], row_pieces)
