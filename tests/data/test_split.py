"""The split by hash: independent of order and of the other documents, never empty, never leaking."""

import random

import pytest

from lalia.data.documents import Document
from lalia.data.split import assert_no_overlap, shared_paragraphs, split_documents, split_fraction
from lalia.errors import UserError


def documents(count: int, size: int = 2000) -> list[Document]:
    return [Document(f"d{i}", f"{i} ".ljust(size, "x"), "s", "l", "en") for i in range(count)]


def ids(side: list[Document]) -> list[str]:
    return [document.id for document in side]


def test_order_does_not_matter() -> None:
    original = documents(200)
    shuffled = random.Random(1).sample(original, len(original))
    assert split_documents(original, 0.1, 1000) == split_documents(shuffled, 0.1, 1000)


def test_neighbours_do_not_matter() -> None:
    train, validation = split_documents(documents(300), 0.1, 1000)
    fewer_train, fewer_validation = split_documents(documents(150), 0.1, 1000)
    assert set(ids(fewer_train)) < set(ids(train))
    assert set(ids(fewer_validation)) < set(ids(validation))
    assert 15 <= len(validation) <= 45
    assert all(split_fraction(name) < 0.1 for name in ids(validation))


def test_neither_side_is_empty() -> None:
    all_documents = documents(40)
    low = [d for d in all_documents if split_fraction(d.id) < 0.3][:3]
    high = [d for d in all_documents if split_fraction(d.id) > 0.3][:3]
    train, validation = split_documents(low, 0.3, 1000)
    assert ids(train) == [max(low, key=lambda d: split_fraction(d.id)).id]
    train, validation = split_documents(high, 0.3, 1000)
    assert ids(validation) == [min(high, key=lambda d: split_fraction(d.id)).id]


def test_too_little_is_refused_with_the_remedy() -> None:
    with pytest.raises(UserError, match=r"data\.document_bytes=2500"):
        split_documents(documents(1, 50_000), 0.1, 100_000)
    with pytest.raises(UserError, match="300 bytes of text are left in 3 documents, at least 2000"):
        split_documents(documents(3, 100), 0.1, 1000)
    with pytest.raises(UserError, match="split has only"):
        split_documents([*documents(1, 5000), *documents(2, 500)[1:]], 0.1, 1000)


def test_a_leaked_document_fails() -> None:
    train, validation = split_documents(documents(50), 0.1, 1000)
    assert_no_overlap(train, validation)
    leaked = Document("other-id", validation[0].text + "\n", "s", "l", "en")
    with pytest.raises(AssertionError, match="other-id"):
        assert_no_overlap([*train, leaked], validation)
    with pytest.raises(AssertionError, match=validation[0].id):
        assert_no_overlap([*train, Document(validation[0].id, "another text", "s", "l", "en")], validation)


def test_shared_paragraphs_are_counted() -> None:
    paragraph = "A long paragraph. " * 20
    train = [Document("a", f"Intro\n\n{paragraph}\n\nshort", "s", "l", "en")]
    validation = [Document("b", f"{paragraph}\n\nshort\n\n{'Another one. ' * 30}", "s", "l", "en")]
    assert shared_paragraphs(train, validation) == {"held_out": 2, "also_in_training": 1}
