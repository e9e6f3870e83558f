"""Which documents are held out: decided by a hash of the id, so that order and neighbours do not matter."""

import hashlib

from lalia.data.documents import Document
from lalia.errors import UserError

# The salt is a choice, not an accident: of "lalia-split-0/" to "lalia-split-199/" it was picked so that the default
# validation_fraction of 0.1 holds out four works of Shakespeare, of four genres, with 9.8 % of the bytes. Only sizes
# and genres were looked at, no model's score. For any other documents it is as good as another.
SPLIT_SALT = "lalia-split-24/"

SPLIT_RULE = (
    f'a document is held out when the first 8 bytes of SHA-256("{SPLIT_SALT}" + id), as a big-endian fraction of 1, '
    "are below validation_fraction; if that leaves a side empty, the document nearest to it moves there (the salt was "
    "picked once, by size and genre, so that about a tenth of the default corpus is held out)"
)

# Below this a split cannot fill a single training row or give a meaningful figure.
MIN_SPLIT_BYTES = 1_000

SHARED_PARAGRAPH_CHARACTERS = 200


def split_fraction(document_id: str) -> float:
    """A number in [0, 1) that depends on the id alone."""
    digest = hashlib.sha256((SPLIT_SALT + document_id).encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_documents(
    documents: list[Document], validation_fraction: float, document_bytes: int
) -> tuple[list[Document], list[Document]]:
    """Return (train, validation), each sorted by id, neither empty.

    Raises:
        UserError: if there are fewer than two documents, or a side has fewer than MIN_SPLIT_BYTES bytes.
    """
    total_bytes = sum(document.num_bytes for document in documents)
    if total_bytes < 2 * MIN_SPLIT_BYTES:
        raise UserError(
            f"{total_bytes} bytes of text are left in {len(documents)} documents, at least {2 * MIN_SPLIT_BYTES} are "
            "needed; add more text, or lower data.min_document_bytes if too much was dropped"
        )
    if len(documents) < 2:
        smaller = max(MIN_SPLIT_BYTES, total_bytes // 20)
        raise UserError(
            f"only one document of {total_bytes} bytes is left, and a validation split needs a second; add more "
            f"files, or have it cut into smaller documents with data.document_bytes={smaller} (now {document_bytes})"
        )
    ranked = sorted(documents, key=lambda document: (split_fraction(document.id), document.id))
    num_below = sum(split_fraction(document.id) < validation_fraction for document in documents)
    num_validation = min(max(num_below, 1), len(documents) - 1)
    validation, train = ranked[:num_validation], ranked[num_validation:]
    for name, side in (("validation", validation), ("training", train)):
        size = sum(document.num_bytes for document in side)
        if size < MIN_SPLIT_BYTES:
            raise UserError(
                f"the {name} split has only {size} bytes in {len(side)} documents, at least {MIN_SPLIT_BYTES} are "
                f"needed; add more text, or change data.validation_fraction (now {validation_fraction})"
            )
    return _by_id(train), _by_id(validation)


def assert_no_overlap(train: list[Document], validation: list[Document]) -> None:
    """Fail if a text or an id stands in both splits; removing duplicates and splitting by id must prevent it."""
    texts = {document.text.strip(): document.id for document in train}
    ids = {document.id for document in train}
    for document in validation:
        twin = document.id if document.id in ids else texts.get(document.text.strip())
        assert twin is None, f"{document.id} is held out and also in training as {twin}"


def shared_paragraphs(train: list[Document], validation: list[Document]) -> dict[str, int]:
    """Held-out paragraphs of at least SHARED_PARAGRAPH_CHARACTERS characters, and how many also stand in training."""
    held_out = [paragraph for document in validation for paragraph in _long_paragraphs(document.text)]
    wanted = set(held_out)
    found = {paragraph for document in train for paragraph in _long_paragraphs(document.text) if paragraph in wanted}
    return {"held_out": len(held_out), "also_in_training": sum(paragraph in found for paragraph in held_out)}


def _long_paragraphs(text: str) -> list[str]:
    return [part for part in map(str.strip, text.split("\n\n")) if len(part) >= SHARED_PARAGRAPH_CHARACTERS]


def _by_id(documents: list[Document]) -> list[Document]:
    return sorted(documents, key=lambda document: document.id)
