"""Batches: every token once, every label inside its document, and nothing but the step to remember."""

import random
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from lalia.data.loader import IGNORED, PADDING, Batch, PackedBatches, PackedConversations
from lalia.data.shards import TokenShards, write_manifest, write_split
from lalia.errors import CorruptFile, UserError

VOCAB_SIZE = 60_000
END = VOCAB_SIZE - 1


def make_shards(folder: Path, document_lengths: list[int], vocab_size: int = VOCAB_SIZE) -> TokenShards:
    """Documents in which every token but <|endoftext|> has an id of its own, so that places can be told."""
    folder.mkdir(exist_ok=True)
    ids = iter(range(sum(document_lengths)))
    documents = [[next(ids) for _ in range(length - 1)] for length in document_lengths]
    entry = write_split(folder, "train", documents, vocab_size, END, num_bytes=1)
    write_manifest(folder, {"train": entry}, vocab_size, END, "00")
    return TokenShards.open(folder, "train")


def rows_of(batch: Batch) -> list[tuple[list[int], ...]]:
    columns = (batch.tokens, batch.targets, batch.document_ids, batch.positions)
    return [tuple(column[row].tolist() for column in columns) for row in range(len(batch.tokens))]


def pieces_of(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """Tokens and targets of every piece, after checking document ids, positions and padding."""
    pieces: list[tuple[list[int], list[int]]] = []
    for tokens, targets, document_ids, positions in rows_of(batch):
        count = max(document_ids) + 1
        assert document_ids == sorted(document_ids, key=lambda i: count if i == PADDING else i)  # padding comes last
        for piece in range(count):
            places = [i for i, document in enumerate(document_ids) if document == piece]
            assert [positions[i] for i in places] == list(range(len(places)))
            pieces.append(([tokens[i] for i in places], [targets[i] for i in places]))
        assert all(target == IGNORED for target, i in zip(targets, document_ids, strict=True) if i == PADDING)
    return pieces


def epoch_of(loader: PackedBatches | PackedConversations) -> list[tuple[list[int], list[int]]]:
    rows = loader.report()["rows_per_epoch"]
    assert rows % loader.batch_size == 0
    return [piece for step in range(rows // loader.batch_size) for piece in pieces_of(loader.batch(step))]


@pytest.mark.parametrize("seed", range(12))
def test_an_epoch_is_every_token_and_every_label_once(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    lengths = [draw.choice([1, 2, 3, 7, 8, 9, 16, 17, 50, 200]) for _ in range(draw.randrange(1, 30))]
    shards = make_shards(tmp_path, lengths)
    pieces = epoch_of(PackedBatches(shards, sequence_length=draw.choice([1, 4, 8, 16]), batch_size=1, seed=seed))
    documents = [shards.document(i).tolist() for i in range(shards.num_documents)]

    inputs = sorted(token for tokens, _ in pieces for token in tokens)
    assert inputs == sorted(shards.tokens.tolist())
    labels = sorted(target for _, targets in pieces for target in targets if target != IGNORED)
    assert labels == sorted(token for document in documents for token in document[1:])

    follows = {left: right for document in documents for left, right in pairwise(document[1:])}
    first_words = {document[1] for document in documents if len(document) > 1}
    for tokens, targets in pieces:
        for token, target in zip(tokens, targets, strict=True):
            if token == END:  # only at a document's start
                assert target in first_words or target == IGNORED
            else:
                assert target == follows.get(token, IGNORED)  # within the document, or nothing at its end


def test_a_label_looks_past_the_row(tmp_path: Path) -> None:
    """The control of the property above: a loader that stops at the row's end would ignore these labels."""
    loader = PackedBatches(make_shards(tmp_path, [40]), sequence_length=8, batch_size=1, seed=0)
    last_labels = [targets[-1] for _, targets in epoch_of(loader)]
    assert sum(target == IGNORED for target in last_labels) == 1


def test_batches_depend_on_the_step_alone(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [30, 5, 100, 7, 64, 3, 3])

    def make(seed: int) -> PackedBatches:
        return PackedBatches(shards, sequence_length=16, batch_size=4, seed=seed)

    straight = make(7)
    batches = [straight.batch(step) for step in range(30)]  # about eight epochs
    resumed = make(7)
    for step in (17, 29, 0, 3, 18):  # a fresh loader, in any order
        assert rows_of(resumed.batch(step)) == rows_of(batches[step])
    other = make(8)
    assert rows_of(other.batch(0)) != rows_of(batches[0])
    assert straight.fingerprint == resumed.fingerprint != other.fingerprint


def test_epochs_follow_each_other_without_loss(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [30, 5, 100, 7, 64, 3, 3])
    loader = PackedBatches(shards, sequence_length=16, batch_size=4, seed=7)
    rows = [row for step in range(40) for row in rows_of(loader.batch(step))]
    epochs: list[list[tuple[list[int], ...]]] = []
    for first, end in pairwise(loader._first_rows):
        if end <= len(rows):
            epochs.append(rows[first:end])
    assert len(epochs) > 5
    for epoch in epochs:
        tokens = [t for row in epoch for t, document in zip(row[0], row[2], strict=True) if document != PADDING]
        assert sorted(tokens) == sorted(shards.tokens.tolist())
    assert all(left != right for left, right in pairwise(epochs))


def test_single_document_means_one_piece_in_every_row(tmp_path: Path) -> None:
    loader = PackedBatches(make_shards(tmp_path, [300, 5, 6, 400]), sequence_length=16, batch_size=2, seed=0)
    seen = set()
    for step in range(40):
        batch = loader.batch(step)
        expected = int(batch.document_ids.max()) == 0
        assert batch.single_document is loader.single_document(step) is expected
        seen.add(expected)
    assert seen == {True, False}


def test_types_counts_and_bytes(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [30, 50])
    token_bytes = np.arange(VOCAB_SIZE, dtype=np.int32) % 5
    loader = PackedBatches(shards, sequence_length=16, batch_size=3, seed=0, token_bytes=token_bytes)
    batch = loader.batch(0)
    for tensor, dtype in zip(
        (batch.tokens, batch.targets, batch.document_ids, batch.positions),
        (torch.int64, torch.int64, torch.int32, torch.int64),
        strict=True,
    ):
        assert tensor.dtype == dtype and tensor.shape == (3, 16)
    kept = batch.targets[batch.targets != IGNORED]
    assert batch.num_targets == len(kept)
    assert batch.num_bytes == int((kept % 5).sum())
    assert PackedBatches(shards, 16, 3, 0).batch(0).num_bytes is None
    assert torch.equal(batch.to("cpu").tokens, batch.tokens)
    report = loader.report()
    assert report["tokens_per_epoch"] == 80 and report["documents"] == report["documents_cut"] == 2
    assert report["padding_share"] == pytest.approx(1 - 80 / (16 * report["rows_per_epoch"]), abs=1e-6)


def test_packed_rows_compute_what_separate_documents_compute(tmp_path: Path) -> None:
    """Attention restricted by document_ids and positions gives each piece what it gets alone."""
    torch.manual_seed(0)
    loader = PackedBatches(make_shards(tmp_path, [5, 6, 4, 9]), sequence_length=16, batch_size=1, seed=0)
    batch = loader.batch(0)
    assert not batch.single_document
    embed, place = torch.randn(VOCAB_SIZE, 8), torch.randn(16, 8)

    def attend(tokens: torch.Tensor, positions: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        x = embed[tokens] + place[positions]
        causal = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
        return torch.nn.functional.scaled_dot_product_attention(
            x[None, None], x[None, None], x[None, None], attn_mask=(causal & allowed)[None, None]
        )[0, 0]

    ids = batch.document_ids[0]
    packed = attend(batch.tokens[0], batch.positions[0], ids[:, None] == ids[None, :])
    leaking = attend(batch.tokens[0], batch.positions[0], torch.ones(16, 16, dtype=torch.bool))
    for piece in range(int(ids.max()) + 1):
        own = ids == piece
        count = int(own.sum())
        alone = attend(batch.tokens[0][own], torch.arange(count), torch.ones(count, count, dtype=torch.bool))
        torch.testing.assert_close(packed[own], alone)
        assert piece == 0 or not torch.allclose(leaking[own], alone)


def test_refusals(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [30, 50])
    with pytest.raises(
        UserError, match=r"80 tokens, which fill [56] rows of 16, but a batch takes 7; .*batch_size to [56]"
    ):
        PackedBatches(shards, sequence_length=16, batch_size=7, seed=1)
    with pytest.raises(UserError, match="sequence_length = 0"):
        PackedBatches(shards, sequence_length=0, batch_size=1, seed=0)
    with pytest.raises(UserError, match="step = -1"):
        PackedBatches(shards, sequence_length=16, batch_size=1, seed=0).batch(-1)
    damaged = make_shards(tmp_path / "damaged", [30], vocab_size=END + 1)
    object.__setattr__(damaged, "vocab_size", 20)
    with pytest.raises(CorruptFile, match="outside the vocabulary of 20"):
        PackedBatches(damaged, sequence_length=30, batch_size=1, seed=0).batch(0)


def test_a_batch_takes_less_than_a_millisecond(tmp_path: Path) -> None:
    draw = random.Random(0)
    loader = PackedBatches(make_shards(tmp_path, [draw.randrange(2, 400) for _ in range(250)]), 256, 16, seed=0)
    loader.batch(0)
    times = []
    for _ in range(20):  # the same batch: planning the next epoch is not what is measured
        began = time.perf_counter()
        loader.batch(0)
        times.append(time.perf_counter() - began)
    assert min(times) < 1e-3


def conversations(count: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    draw = random.Random(seed)
    made: list[tuple[list[int], list[int]]] = []
    for number in range(count):
        length = draw.randrange(2, 16)
        mask = [draw.randrange(2) for _ in range(length)]
        mask[-1] = 1
        made.append(([100 * number + i for i in range(length)], mask))
    return made


def test_conversations_stay_whole_and_masked() -> None:
    given = conversations(50)
    loader = PackedConversations(given, sequence_length=16, batch_size=1, seed=3)
    pieces = epoch_of(loader)
    expected = sorted(
        (ids, [i if trained else IGNORED for i, trained in zip(ids[1:], mask[1:], strict=True)] + [IGNORED])
        for ids, mask in given
    )
    assert sorted(pieces) == expected
    assert loader.report()["rows_per_epoch"] < 50
    assert loader.batch(3).num_targets == int((loader.batch(3).targets != IGNORED).sum())
    again = PackedConversations(given, sequence_length=16, batch_size=1, seed=3)
    assert rows_of(again.batch(77)) == rows_of(loader.batch(77))
    assert again.fingerprint == loader.fingerprint


def test_conversations_refused() -> None:
    good = ([1, 2, 3], [0, 0, 1])
    cases = [
        ([good, (list(range(17)), [0] * 16 + [1])], "conversation 1 has 17 tokens, more than sequence_length = 16"),
        ([([1, 2], [0])], "has 2 tokens but a mask of 1"),
        ([good, ([1, 2], [1, 0])], "conversation 1 has no token to train on"),
        ([], "no conversation"),
        ([good], "fill 1 rows of 16, but a batch takes 2"),
    ]
    for given, message in cases:
        with pytest.raises(UserError, match=message):
            PackedConversations(given, sequence_length=16, batch_size=2, seed=0)
