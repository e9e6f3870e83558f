"""Token shards: what is written is read, and damage is named with its remedy."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from lalia.data.shards import TokenShards, token_dtype, write_manifest, write_split
from lalia.errors import CorruptFile, UserError

DOCUMENTS = [[5, 6, 7], [], [8], list(range(10, 40))]
END = 99


def write(folder: Path, documents: list[list[int]] = DOCUMENTS, vocab_size: int = 100) -> Path:
    folder.mkdir(exist_ok=True)
    entries = {
        split: write_split(folder, split, iter(documents), vocab_size, END, num_bytes=77)
        for split in ("train", "validation")
    }
    write_manifest(folder, entries, vocab_size, END, tokenizer_sha256="ab" * 32)
    return folder


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(100, 2), (65_536, 2), (65_537, 4)])
def test_round_trip(tmp_path: Path, vocab_size: int, itemsize: int) -> None:
    documents = [*DOCUMENTS, [vocab_size - 1]]
    write(tmp_path, documents, vocab_size)
    shards = TokenShards.open(tmp_path, "train", verify=True)
    assert token_dtype(vocab_size).itemsize == itemsize
    assert (tmp_path / "train-00000.bin").stat().st_size == itemsize * shards.num_tokens
    assert [shards.document(i).tolist() for i in range(shards.num_documents)] == [[END, *ids] for ids in documents]
    assert shards.num_tokens == sum(len(ids) + 1 for ids in documents)
    assert (shards.num_bytes, shards.vocab_size, shards.end_of_text_id) == (77, vocab_size, END)
    assert isinstance(shards.tokens, np.memmap)


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    same = [TokenShards.open(write(tmp_path / name), "train").fingerprint for name in "ab"]
    other = TokenShards.open(write(tmp_path / "c", [[1]]), "train").fingerprint
    assert same[0] == same[1] != other


def test_little_endian_on_disk(tmp_path: Path) -> None:
    write(tmp_path, [[0x0102]], vocab_size=1000)
    assert (tmp_path / "train-00000.bin").read_bytes() == bytes([END, 0, 2, 1])


def test_missing_pieces(tmp_path: Path) -> None:
    with pytest.raises(CorruptFile, match=r"manifest\.json is missing"):
        TokenShards.open(tmp_path, "train")
    write(tmp_path)
    with pytest.raises(UserError, match="no split 'test'; it has train, validation"):
        TokenShards.open(tmp_path, "test")
    with pytest.raises(UserError, match="the train split has no document"):
        write_split(tmp_path, "train", [], 100, END, 0)


def damage_bin(folder: Path, content: bytes) -> None:
    (folder / "train-00000.bin").write_bytes(content)


def edit_manifest(folder: Path, *path: str, value: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    target = manifest
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))


def index(folder: Path, values: list[int], dtype: str = "<u8") -> None:
    np.save(folder / "train-00000.idx.npy", np.array(values, dtype=dtype))


DAMAGES = {
    "bin missing": (lambda f: (f / "train-00000.bin").unlink(), "bin is missing"),
    "bin cut off": (lambda f: os.truncate(f / "train-00000.bin", 10), r"has 10 bytes, expected 76 \(38 uint16\)"),
    "bin grown": (lambda f: damage_bin(f, bytes(78)), "has 78 bytes"),
    "bin as u32": (lambda f: damage_bin(f, bytes(152)), "has 152 bytes, expected 76"),
    "index missing": (lambda f: (f / "train-00000.idx.npy").unlink(), "idx.npy is missing"),
    "index cut off": (lambda f: os.truncate(f / "train-00000.idx.npy", 140), r"is no \.npy file"),
    "index empty": (lambda f: os.truncate(f / "train-00000.idx.npy", 0), r"is no \.npy file"),
    "index i8": (lambda f: index(f, [0, 4, 5, 7], "<i8"), "holds int64"),
    "index short": (lambda f: index(f, [0, 4]), r"holds uint64 \(2,\), expected uint64 \(4,\)"),
    "index backwards": (lambda f: index(f, [0, 5, 4, 7]), "increasing"),
    "index far": (lambda f: index(f, [0, 4, 5, 38]), "increasing positions from 0 to below 38"),
    "index huge": (lambda f: index(f, [0, 4, 5, 2**64 - 1]), "increasing"),
    "index late": (lambda f: index(f, [1, 4, 5, 7]), "increasing"),
    "manifest no JSON": (lambda f: os.truncate(f / "manifest.json", 50), "not valid JSON"),
    "manifest other format": (lambda f: edit_manifest(f, "format", value="x"), "is not of format"),
    "manifest dtype": (lambda f: edit_manifest(f, "dtype", value="uint32"), "says uint32"),
    "manifest count": (lambda f: edit_manifest(f, "splits", "train", "num_tokens", value=37), "expected 74"),
    "manifest type": (lambda f: edit_manifest(f, "splits", "train", "num_tokens", value="37"), "another type"),
    "manifest list": (lambda f: (f / "manifest.json").write_text("[]"), "is not of format"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_at_open(tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    write(tmp_path)
    TokenShards.open(tmp_path, "train")
    damage(tmp_path)
    with pytest.raises(CorruptFile, match=message) as refused:
        TokenShards.open(tmp_path, "train")
    assert "again" in str(refused.value)  # the remedy


def test_verify_finds_what_the_sizes_hide(tmp_path: Path) -> None:
    write(tmp_path)
    content = bytearray((tmp_path / "train-00000.bin").read_bytes())
    content[2] ^= 1
    damage_bin(tmp_path, bytes(content))
    TokenShards.open(tmp_path, "train")
    with pytest.raises(CorruptFile, match="another SHA-256"):
        TokenShards.open(tmp_path, "train", verify=True)
    write(tmp_path)
    index(tmp_path, [0, 3, 5, 7])
    with pytest.raises(CorruptFile, match="another SHA-256"):
        TokenShards.open(tmp_path, "train", verify=True)


def test_verify_checks_the_ids(tmp_path: Path) -> None:
    write(tmp_path, [[5, 100]], vocab_size=100)
    with pytest.raises(CorruptFile, match="token id 100 is outside the vocabulary of 100"):
        TokenShards.open(tmp_path, "train", verify=True)
    write(tmp_path, [[5]])
    edit_manifest(tmp_path, "end_of_text_id", value=98)
    with pytest.raises(CorruptFile, match="does not start with token 98"):
        TokenShards.open(tmp_path, "train", verify=True)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    shards = TokenShards.open(write(tmp_path), "train")
    shards.check_tokenizer("ab" * 32)
    with pytest.raises(CorruptFile, match="the one beside it has cdcdcd"):
        shards.check_tokenizer("cd" * 32)
