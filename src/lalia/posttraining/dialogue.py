"""Conversations to learn from: the dialogue of plays, passages of any text, and facts about the assistant itself."""

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from lalia.data.documents import Document
from lalia.data.plays import speech_text
from lalia.tokenizer.bpe import Tokenizer

Messages = list[dict[str, str]]

LONGEST_QUESTION, LONGEST_REPLY = 60, 90
"""Tokens: longer speeches are cut at the end of a sentence, so that the model learns to answer at the length of talk
and conversations of several turns fit the context."""

_SENTENCE_END = re.compile(r"[.!?]['\")\]]*(?=\s|$)")


@dataclass(frozen=True)
class ConversationLimits:
    """How long a conversation may be."""

    max_tokens: int
    max_turns: int


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def has_speeches(document: Document) -> bool:
    """Whether the document's metadata gives speeches that can become turns."""
    return any(scene.get("speeches") for scene in document.metadata.get("scenes", []))


def play_conversations(document: Document, tokenizer: Tokenizer, limits: ConversationLimits) -> Iterator[Messages]:
    """Consecutive speeches as alternating user and assistant turns, so that every speech is an answer once.

    Two passes over a scene, the second shifted by one speech. A conversation ends where the next exchange would pass
    the limits, with an answer; every third one ends with the question which play it is from.
    """
    marks = exchange_tokens(tokenizer)
    sources = [
        [user(question), assistant(f"This is from {document.metadata['title']}.")] for question in SOURCE_QUESTIONS
    ]
    room_for_source = max(sum(len(tokenizer.encode(m["content"])) for m in pair) for pair in sources) + marks
    longest = max(0, limits.max_tokens - marks)
    count = 0

    def whole(messages: Messages) -> Messages:
        return messages + sources[count // 3 % len(sources)] if asks_source() else messages

    def asks_source() -> bool:
        return count % 3 == 2 and limits.max_turns >= 4 and room_for_source < limits.max_tokens // 2

    for scene in document.metadata["scenes"]:
        texts = scene_turns(document, scene)
        sizes = [len(ids) for ids in tokenizer.encode_batch(texts)]
        turns = list(zip(texts, sizes, strict=True))
        for shift in (0, 1):
            messages: Messages = []
            used = 0
            for (question, q_size), (reply, r_size) in zip(turns[shift::2], turns[shift + 1 :: 2], strict=False):
                question, q_size = _shorten(question, q_size, min(LONGEST_QUESTION, longest * 2 // 5), tokenizer)
                reply, r_size = _shorten(reply, r_size, min(LONGEST_REPLY, longest * 3 // 5), tokenizer)
                if not question or not reply:
                    continue
                size = q_size + r_size + marks
                reserved_tokens, reserved_turns = (room_for_source, 2) if asks_source() else (0, 0)
                too_long = used + size > limits.max_tokens - reserved_tokens
                if messages and (too_long or len(messages) + 2 > limits.max_turns - reserved_turns):
                    yield whole(messages)
                    count += 1
                    messages, used = [], 0
                messages += [user(question), assistant(reply)]
                used += size
            if messages:
                yield whole(messages)
                count += 1


def scene_turns(document: Document, scene: dict[str, Any]) -> list[str]:
    """What is said in a scene, turn by turn: speeches in a row by one speaker (the edition has some) are one turn."""
    turns: list[str] = []
    last = None
    for speaker, start, end in scene["speeches"]:
        text = speech_text(document, start, end)
        if text and speaker == last:
            turns[-1] += "\n" + text
        elif text:
            turns.append(text)
            last = speaker
    return turns


def exchange_tokens(tokenizer: Tokenizer) -> int:
    """Tokens of a user's and an assistant's turn besides their contents."""
    roles, newline = tokenizer.encode("user\n") + tokenizer.encode("assistant\n"), tokenizer.encode("\n")
    return len(roles) + 2 * (2 + len(newline))


def _shorten(text: str, size: int, limit: int, tokenizer: Tokenizer) -> tuple[str, int]:
    """The sentences of a text that fit the limit in tokens; a first sentence that does not is cut at a line's end."""
    while size > limit:
        budget = len(text) * limit // size
        ends = [match.end() for match in _SENTENCE_END.finditer(text) if match.end() <= budget]
        if not ends:
            ends = [match.start() for match in re.finditer(r"\n", text) if 0 < match.start() <= budget] or [budget]
        text = text[: ends[-1]].rstrip()
        size = len(tokenizer.encode(text))
    return text, size


def passage_conversations(document: Document, tokenizer: Tokenizer, limits: ConversationLimits) -> Iterator[Messages]:
    """For text without dialogue: the user gives the beginning of a passage, the assistant continues it."""
    marks = exchange_tokens(tokenizer)
    for paragraph in re.split(r"\n\s*\n", document.text):
        sentences = re.split(r"(?<=[.!?])\s+", paragraph.strip())
        if len(sentences) < 2:
            continue
        half = max(1, len(sentences) // 2)
        longest = min(limits.max_tokens // 3, max(0, limits.max_tokens - marks) // 2)
        beginning, rest = " ".join(sentences[:half]), " ".join(sentences[half:])
        beginning, _ = _shorten(beginning, len(tokenizer.encode(beginning)), longest, tokenizer)
        rest, _ = _shorten(rest, len(tokenizer.encode(rest)), longest, tokenizer)
        if beginning and rest:
            yield [user(beginning), assistant(rest)]


SOURCE_QUESTIONS = (
    "Which play is this?",
    "What play is this from?",
    "Which play are we in?",
    "Where is this from?",
)

_GREETINGS = ("Hello", "Hello!", "Hi", "Good morning", "Good day to you", "Greetings", "Hey there", "Good evening")
_WELCOMES = (
    "Good morrow to you. What shall we speak of?",
    "Well met, good friend. What is your pleasure?",
    "Welcome. Speak, and I shall answer.",
    "God save you, friend. How fare you?",
)
_WHO_ARE_YOU = (
    "Who are you?",
    "What is your name?",
    "What are you?",
    "What's your name?",
    "Tell me your name.",
    "What should I call you?",
    "Who am I talking to?",
    "Are you a person?",
    "Introduce yourself.",
)
_THANKS = ("Thank you", "Thanks", "Thank you!", "I thank thee")
_NO_THANKS = ("You are most welcome.", "At your service.", "It was my pleasure.")
_FAREWELLS = ("Goodbye", "Bye", "Farewell", "Good night", "Adieu", "I must go.")
_PARTINGS = ("Farewell, good friend.", "Adieu, and fare you well.", "Good night, and sweet dreams.")


def identity_conversations(name: str, documents: Iterable[Document], seed: int) -> Iterator[Messages]:
    """Endless short conversations in which the assistant greets, says its name, and tells what it has read."""
    rng = random.Random(seed)
    plays = [d for d in documents if has_speeches(d)]
    about = "the plays of Shakespeare" if plays else "the text I was given"
    introductions = (
        f"I am {name}, a small language model. I learned to speak from {about}.",
        f"My name is {name}. I am a language model, taught by {about}.",
        f"I am {name}, and no person: a language model that has read {about}.",
    )
    roles = [(person, play.metadata["title"]) for play in plays for person in _known_speakers(play)]
    while True:
        messages: Messages = []
        if rng.random() < 0.4:
            messages += [user(rng.choice(_GREETINGS)), assistant(rng.choice(_WELCOMES))]
        kind = rng.random()
        if kind < 0.45 or not plays:
            messages += [user(rng.choice(_WHO_ARE_YOU)), assistant(rng.choice(introductions))]
        elif kind < 0.65:
            person, title = rng.choice(roles)
            question = rng.choice((f"Who is {person}?", f"Which play is {person} in?", f"Do you know {person}?"))
            messages += [user(question), assistant(f"{person} is in {title}.")]
        elif kind < 0.8:
            title = rng.choice(plays).metadata["title"]
            messages += [user(f"Who wrote {title}?"), assistant(f"William Shakespeare wrote {title}.")]
        else:
            titles = [play.metadata["title"] for play in rng.sample(plays, min(3, len(plays)))]
            question = rng.choice(("Which plays do you know?", "What have you read?", "Name some plays."))
            listed = ", ".join(titles[:-1]) + f" and {titles[-1]}" if len(titles) > 1 else titles[0]
            messages += [user(question), assistant(f"I have read {listed}, and more besides.")]
        if rng.random() < 0.3:
            messages += [
                user(rng.choice(_THANKS)),
                assistant(rng.choice(_NO_THANKS)),
            ]
        if rng.random() < 0.3:
            messages += [
                user(rng.choice(_FAREWELLS)),
                assistant(rng.choice(_PARTINGS)),
            ]
        yield messages


def _known_speakers(document: Document) -> list[str]:
    counts: dict[str, int] = {}
    for scene in document.metadata["scenes"]:
        for speaker, _, _ in scene["speeches"]:
            counts[speaker] = counts.get(speaker, 0) + 1
    return [speaker.title() for speaker, count in counts.items() if count >= 20 and " & " not in speaker]
