"""The structure of a play written in Markdown: acts, scenes, speakers, speeches.

The lines of the edition: `## ACT I` and `### SCENE I. A street.` headings, `**NAME**` before a speech, verse lines that
end in two spaces, and stage directions between `_` or `*`, alone on their lines and sometimes over several of them.
A speech goes on after a stage direction without a new speaker line.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from lalia.data.documents import Document

_HEADING = re.compile(r"(#{1,6})\s+(.*\S)")
_SPEAKER = re.compile(r"\*\*(.+?)\*\*")
# Forms that stand in the edition without Markdown: `EPILOGUE`, `SPOKEN BY PROSPERO`, `SONG.`, `CASSIO: Good night`, and
# the first half of `BISHOP` / `**OF WINCHESTER**`.
_DEFAULT_SPEAKERS = ("Prologue", "Epilogue")
_BARE_HEADING = re.compile(r"PROLOGUE|EPILOGUE")
_SPOKEN_BY = re.compile(r"SPOKEN BY (.+)")
_LABEL = re.compile(r"(?:THE )?SONG\.?|DUMB SHOW\.?|Enter [A-Z]+\.")
_INLINE_SPEAKER = re.compile(r"([A-Z]{3,}:) +(?=\S)")
_BARE_NAME = re.compile(r"[A-Z][A-Z' -]+")
_LIST_ITEM = re.compile(r"\d+\\?\. ")
# A direction whose opening mark is missing in the edition: `[Aside]_`.
_UNOPENED_DIRECTION = re.compile(r"\\?\[[^\]]*\][_*]+")
# Words supplied by an editor inside a spoken line: `And _\[Censorinus,]_`; empty brackets mark a lacuna.
_SUPPLIED_WORDS = re.compile(r"[_*]+\\?\[([^\]]*)\][_*]+")
_EMPHASIS = re.compile(r"(?<!\w)([_*]+)(?=\S)(.+?)(?<=\S)\1(?!\w)")
_ESCAPE = re.compile(r"\\([!-/:-@\[-`{-~])")
_AND_OTHERS = re.compile(r"&\s*&\s*C\b")


class Line(NamedTuple):
    """One line of a play: text[start:end], without its newline and surrounding spaces."""

    kind: Literal["heading", "speaker", "direction", "unclosed direction", "half name", "spoken"]
    start: int
    end: int


@dataclass
class Play:
    """What `parse_play` found; `anomalies` counts the lines that do not follow the form of the edition."""

    title: str = ""
    scenes: list[dict[str, Any]] = field(default_factory=list)
    anomalies: Counter[str] = field(default_factory=Counter)

    @property
    def speeches(self) -> list[list[Any]]:
        """All [speaker, start, end] in order."""
        return [speech for scene in self.scenes for speech in scene["speeches"]]

    @property
    def speakers(self) -> list[str]:
        """Persons in order of their first speech; `A & B` speaking together are two persons."""
        return list(dict.fromkeys(name for speech in self.speeches for name in speech[0].split(" & ")))


def parse_play(text: str) -> Play:
    """Find scenes and speeches in the Markdown text of a play.

    A speech is all text under one speaker line up to the next speaker line or heading. It starts at its first
    non-blank line and ends with its last spoken line: stage directions within it are part of text[start:end], those
    after it are not. A prologue or epilogue without a speaker line is spoken by "Prologue" or "Epilogue".
    """
    play = Play()
    act, half_name = "", ""
    scene: dict[str, Any] | None = None
    speaker: str | None = None
    start = end = -1
    after_heading = False

    def close_speech() -> None:
        if speaker is None or scene is None:
            return
        if end > start >= 0:
            scene["speeches"].append([speaker, start, end])
        elif speaker not in _DEFAULT_SPEAKERS:
            play.anomalies["speaker without words"] += 1

    for line in _lines(text):
        content = text[line.start : line.end]
        if line.kind == "heading":
            close_speech()
            marks, heading = _read_heading(content)
            speaker, start, end = _default_speaker(heading), -1, -1
            if marks == 1 and not play.title and not play.scenes:
                play.title = heading
                continue
            is_act = _is_act(heading, marks)
            if marks != (2 if is_act else 3):
                play.anomalies["heading at an unusual level"] += 1
            act = heading if is_act else act
            scene = {"act": act, "scene": "" if is_act else heading, "speeches": []}
            play.scenes.append(scene)
        elif line.kind == "speaker":
            close_speech()
            speaker, start, end = f"{half_name} {speaker_name(content)}".strip(), -1, -1
            if not content.startswith("**") or half_name:
                play.anomalies["speaker line in an unusual form"] += 1
            if scene is None:
                scene = {"act": act, "scene": "", "speeches": []}
                play.scenes.append(scene)
        elif line.kind in ("spoken", "unclosed direction"):
            if line.kind != "spoken":
                play.anomalies["stage direction that is not closed"] += 1
            if speaker is None and after_heading and scene is not None:
                # The rest of a long heading, which the edition sets apart by a blank line.
                scene["scene"] = f"{scene['scene']} {content}".strip()
                continue
            if speaker is None:
                play.anomalies["spoken line without a speaker"] += 1
            else:
                start = line.start if start < 0 else start
                end = line.end
        elif line.kind == "direction" and start < 0:
            start = line.start
        half_name = content if line.kind == "half name" else ""
        after_heading = line.kind == "heading"
    close_speech()
    if not play.title:
        play.anomalies["title missing"] += 1
    play.scenes = [scene for scene in play.scenes if scene["speeches"]]
    return play


def _read_heading(content: str) -> tuple[int, str]:
    """Level and words of a heading; 2 for one without marks."""
    words = " ".join(content.split())
    heading = words.lstrip("#")
    return len(words) - len(heading) or 2, heading.strip()


def _default_speaker(heading: str) -> str | None:
    first_word = heading.split(".")[0].split(" ")[0].capitalize()
    return first_word if first_word in _DEFAULT_SPEAKERS else None


def speaker_name(line: str) -> str:
    """The name in a `**NAME**` line; people who speak together are joined by ' & '.

    Repairs the edition's `**ROSENCRANTZ: & GUILDENSTERN:**` and `**SHALLOW & PAGE & & C**`.
    """
    spoken_by = _SPOKEN_BY.fullmatch(line)
    names = _AND_OTHERS.sub("", spoken_by[1] if spoken_by else line.strip().strip("*")).split("&")
    return " & ".join(name for name in (unescape(part).strip(" :") for part in names) if name)


def speech_text(document: Document, start: int, end: int) -> str:
    """The spoken words of document.text[start:end]: no stage directions, hard-break spaces or Markdown escapes.

    Line breaks of the verse are kept; blank lines and headings or speaker lines that the range may span are not.
    """
    text = document.text[start:end]
    spoken = (_spoken_words(text[line.start : line.end]) for line in _lines(text) if line.kind in _SPOKEN_KINDS)
    return "\n".join(line for line in spoken if line)


def unescape(text: str) -> str:
    r"""Remove Markdown's backslash escapes: `\--Empty` becomes `--Empty`."""
    return _ESCAPE.sub(r"\1", text)


_SPOKEN_KINDS = ("spoken", "unclosed direction")


def _spoken_words(line: str) -> str:
    line = _SUPPLIED_WORDS.sub(lambda match: match[1].strip(), line)
    line = _EMPHASIS.sub(r"\2", line)
    return unescape(line).strip(" _*")


def _is_act(heading: str, level: int) -> bool:
    """Whether a heading opens an act. Words decide before levels: the edition has '#### ACT II' and '## SCENE I.'."""
    if heading.upper().startswith("ACT "):
        return True
    return level <= 2 and not heading.upper().startswith("SCENE")


def _lines(text: str) -> Iterator[Line]:
    """Classify the non-blank lines of a play."""
    paragraphs = list(_paragraphs(text))
    for number, paragraph in enumerate(paragraphs):
        following = paragraphs[number + 1] if number + 1 < len(paragraphs) else []
        yield from _classify(text, paragraph, text[slice(*following[0])] if following else "")


def _paragraphs(text: str) -> Iterator[list[tuple[int, int]]]:
    """The (start, end) of the lines between blank lines, without surrounding spaces."""
    paragraph: list[tuple[int, int]] = []
    offset = 0
    for line in text.split("\n"):
        content = line.strip()
        if content:
            start = offset + (line.index(content) if line[0].isspace() else 0)
            paragraph.append((start, start + len(content)))
        elif paragraph:
            yield paragraph
            paragraph = []
        offset += len(line) + 1
    if paragraph:
        yield paragraph


def _classify(text: str, paragraph: list[tuple[int, int]], following: str) -> Iterator[Line]:
    """Classify the lines of one paragraph; `following` is the first line of the next."""
    index = 0
    last = len(paragraph) - 1
    while index <= last:
        start, end = paragraph[index]
        content = text[start:end]
        first = content[0]
        length = 1
        if first == "#" and _HEADING.fullmatch(content):
            # A long heading goes on in the next line.
            yield Line("heading", start, paragraph[last][1])
            return
        if first == "*" and _SPEAKER.fullmatch(content):
            yield Line("speaker", start, end)
        elif first in "_*":
            length = _direction_length(text, paragraph[index:])
            kind = "direction" if length else "unclosed direction"
            length = max(length, 1)
            for span in paragraph[index : index + length]:
                yield Line(kind, *span)
        elif first in "[\\" and _UNOPENED_DIRECTION.fullmatch(content):
            yield Line("direction", start, end)
        elif index == 0 and _LIST_ITEM.match(content):
            # The order of a procession, as a numbered list.
            length = len(paragraph)
            for span in paragraph:
                yield Line("direction", *span)
        elif not content.isupper() and not _LABEL.fullmatch(content):
            speaker = _INLINE_SPEAKER.match(content) if first.isupper() else None
            if speaker:
                yield Line("speaker", start, start + speaker.end(1))
            yield Line("spoken", start + (speaker.end() if speaker else 0), end)
        elif index == 0 and _BARE_HEADING.fullmatch(content):
            yield Line("heading", start, end)
        elif _SPOKEN_BY.fullmatch(content):
            yield Line("speaker", start, end)
        elif _LABEL.fullmatch(content):
            yield Line("direction", start, end)
        elif index == last and _BARE_NAME.fullmatch(content) and following.startswith(("**", "#")):
            # Half of a speaker's name, or the title of the play repeated before a heading.
            is_name = following.startswith("**") and not content.startswith("OF ")
            yield Line("half name" if is_name else "direction", start, end)
        else:
            yield Line("spoken", start, end)
        index += length


def _direction_length(text: str, lines: list[tuple[int, int]]) -> int:
    """Number of lines of the stage direction that opens on the first line; 0 if nothing closes it."""
    mark = text[lines[0][0]]
    for number, (start, end) in enumerate(lines):
        if text[end - 1] == mark and (number > 0 or end - start > 1):
            return number + 1
    return 0
