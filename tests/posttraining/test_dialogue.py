"""What the finetune stage teaches: conversations that alternate, end with an answer and fit."""

import itertools
import random
from typing import Any

import pytest
import torch

from lalia.data.documents import Document
from lalia.data.loader import Batch, PackedConversations
from lalia.errors import UserError
from lalia.posttraining.config import FinetuneConfig
from lalia.posttraining.dialogue import (
    SOURCE_QUESTIONS,
    ConversationLimits,
    Messages,
    identity_conversations,
    passage_conversations,
    play_conversations,
    scene_turns,
)
from lalia.posttraining.finetune import Mixture, collect_conversations
from lalia.tokenizer.bpe import Tokenizer, train_tokenizer
from lalia.tokenizer.chat import render_with_mask
from lalia.tokenizer.config import TokenizerConfig

WORDS = ["the", "lamp", "by", "river", "and", "garden", "shall", "not", "sleep", "before", "winter", "comes", "lord"]


def play(scenes: list[list[tuple[str, str]]], title: str = "The Winter Garden") -> Document:
    """A play whose scenes are lists of (speaker, words)."""
    text, recorded = f"# {title}\n", []
    for number, speeches in enumerate(scenes, 1):
        text += f"\n### SCENE {number}.\n"
        places = []
        for speaker, words in speeches:
            text += f"\n**{speaker.upper()}**\n\n"
            places.append([speaker.upper(), len(text), len(text) + len(words)])
            text += words + "\n"
        recorded.append({"act": "ACT I", "scene": f"SCENE {number}.", "speeches": places})
    metadata = {"kind": "play", "title": title, "scenes": recorded}
    return Document("play", text, "test", "none", "en", metadata)


def sentences(rng: random.Random, count: int) -> str:
    return " ".join(
        " ".join(rng.choices(WORDS, k=rng.randint(3, 9))).capitalize() + rng.choice(".!?") for _ in range(count)
    )


def random_play(rng: random.Random, longest: int = 3) -> Document:
    """Scenes of 1 to 12 speeches by three people, some of them in a row, each speech unlike any other."""
    number = itertools.count()
    return play(
        [
            [
                (
                    rng.choice(["anna", "bert", "cleo"]),
                    f"Speech {next(number)}. {sentences(rng, rng.randint(0, longest))}".strip(),
                )
                for _ in range(rng.randint(1, 12))
            ]
            for _ in range(8)
        ]
    )


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    rng = random.Random(0)
    return train_tokenizer([sentences(rng, 300), " ".join(map(str, range(300)))], TokenizerConfig(vocab_size=320))


def contents(talk: Messages, role: str) -> list[str]:
    return [message["content"] for message in talk if message["role"] == role]


def without_source(talk: Messages) -> Messages:
    return talk[:-2] if talk[-2]["content"] in SOURCE_QUESTIONS else talk


@pytest.mark.parametrize("max_turns", [2, 4, 8])
@pytest.mark.parametrize("max_tokens", [64, 128, 256, 1024])
def test_conversations_alternate_end_with_an_answer_and_fit(
    tokenizer: Tokenizer, max_tokens: int, max_turns: int
) -> None:
    rng = random.Random(max_tokens)
    document = random_play(rng, longest=40)
    limits = ConversationLimits(max_tokens, max_turns)
    talks = [
        *play_conversations(document, tokenizer, limits),
        *passage_conversations(Document("d", sentences(rng, 60), "", "", "en"), tokenizer, limits),
    ]
    assert len(talks) > 8
    for talk in talks:
        assert [message["role"] for message in talk] == ["user", "assistant"] * (len(talk) // 2)
        assert 2 <= len(talk) <= max_turns
        assert all(message["content"].strip() for message in talk)
        ids, mask = render_with_mask(tokenizer, talk)
        assert len(ids) <= max_tokens
        assert any(mask)


def test_every_speech_is_an_answer_once_and_a_question_once(tokenizer: Tokenizer) -> None:
    document = random_play(random.Random(1), longest=0)  # so short that nothing is cut
    talks = [without_source(talk) for talk in play_conversations(document, tokenizer, ConversationLimits(4096, 8))]
    for role, missing in (("assistant", 0), ("user", -1)):  # the first turn answers nothing, the last is not answered
        expected: list[str] = []
        for scene in document.metadata["scenes"]:
            turns = scene_turns(document, scene)
            del turns[missing]
            expected += turns
        assert sorted(text for talk in talks for text in contents(talk, role)) == sorted(expected)


def test_what_follows_is_what_was_answered(tokenizer: Tokenizer) -> None:
    document = play(
        [[("anna", f"Line {number}.") if number % 2 else ("bert", f"Line {number}.") for number in range(9)]]
    )
    talks = list(play_conversations(document, tokenizer, ConversationLimits(4096, 100)))
    said = [[message["content"] for message in without_source(talk)] for talk in talks]
    assert said == [[f"Line {n}." for n in range(8)], [f"Line {n}." for n in range(1, 9)]]


def test_speeches_in_a_row_by_one_speaker_are_one_turn(tokenizer: Tokenizer) -> None:
    speeches = [
        ("anna", "Who goes?"),
        ("bert", "A friend."),
        ("bert", "Let me in."),
        ("anna", "Come."),
        ("cleo", "Stay."),
    ]
    document = play([speeches])
    assert scene_turns(document, document.metadata["scenes"][0]) == [
        "Who goes?",
        "A friend.\nLet me in.",
        "Come.",
        "Stay.",
    ]
    talks = list(play_conversations(document, tokenizer, ConversationLimits(4096, 8)))
    assert contents(talks[0], "assistant") == ["A friend.\nLet me in.", "Stay."]


def test_a_speech_of_stage_directions_only_does_not_come_between(tokenizer: Tokenizer) -> None:
    speeches = [("anna", "Who goes?"), ("bert", "_He bows._"), ("anna", "Speak."), ("bert", "A friend.")]
    document = play([speeches])
    assert scene_turns(document, document.metadata["scenes"][0]) == ["Who goes?\nSpeak.", "A friend."]


def test_scenes_do_not_run_into_each_other(tokenizer: Tokenizer) -> None:
    document = play([[("anna", "One."), ("bert", "Two.")], [("bert", "Three."), ("anna", "Four.")]])
    said = [[m["content"] for m in t] for t in play_conversations(document, tokenizer, ConversationLimits(4096, 8))]
    assert said == [["One.", "Two."], ["Three.", "Four."]]


def test_every_third_conversation_asks_where_it_is_from(tokenizer: Tokenizer) -> None:
    document = random_play(random.Random(2))
    talks = list(play_conversations(document, tokenizer, ConversationLimits(256, 8)))
    asked = [number for number, talk in enumerate(talks) if talk[-2]["content"] in SOURCE_QUESTIONS]
    assert asked == list(range(2, len(talks), 3))
    assert {talks[number][-1]["content"] for number in asked} == {"This is from The Winter Garden."}
    assert {talks[number][-2]["content"] for number in asked} > {SOURCE_QUESTIONS[0], SOURCE_QUESTIONS[1]} or len(
        asked
    ) < 3
    # Where two turns are all there is room for, no title is asked.
    assert not [t for t in play_conversations(document, tokenizer, ConversationLimits(256, 2)) if len(t) > 2]


def test_long_speeches_are_cut_at_the_end_of_a_sentence(tokenizer: Tokenizer) -> None:
    document = play([[("anna", "Speak. " * 80), ("bert", sentences(random.Random(3), 50))]])
    (talk,) = play_conversations(document, tokenizer, ConversationLimits(512, 8))
    whole = scene_turns(document, document.metadata["scenes"][0])
    for message, text in zip(talk, whole, strict=True):
        assert len(message["content"]) < len(text)
        assert text.startswith(message["content"])
        assert message["content"][-1] in ".!?"


def test_passages_are_continued(tokenizer: Tokenizer) -> None:
    text = "One two. Three four.\n\nAlone here.\n\nFive. Six. Seven! Eight?"
    talks = list(passage_conversations(Document("d", text, "", "", "en"), tokenizer, ConversationLimits(256, 8)))
    assert [[m["content"] for m in talk] for talk in talks] == [
        ["One two.", "Three four."],
        ["Five. Six.", "Seven! Eight?"],
    ]


def test_the_assistant_knows_its_name_and_its_sources() -> None:
    document = play([[("anna", "Who goes?"), ("bert", "A friend.")] * 25])
    talks = list(itertools.islice(identity_conversations("Bramble", [document], seed=1), 500))
    introductions = [m["content"] for t in talks for q, m in itertools.pairwise(t) if q["content"] == "Who are you?"]
    assert len(introductions) > 10
    assert all("Bramble" in text for text in introductions)
    assert not any("Lalia" in m["content"] for t in talks for m in t)
    everything = {m["content"] for t in talks for m in t}
    assert {"Anna is in The Winter Garden.", "William Shakespeare wrote The Winter Garden."} <= everything
    assert all([m["role"] for m in talk] == ["user", "assistant"] * (len(talk) // 2) for talk in talks)
    again = list(itertools.islice(identity_conversations("Bramble", [document], seed=1), 500))
    other = list(itertools.islice(identity_conversations("Bramble", [document], seed=2), 500))
    assert again == talks != other


def test_without_plays_nothing_is_said_of_them() -> None:
    plain = Document("d", "Some text.", "", "", "en")
    talks = list(itertools.islice(identity_conversations("Bramble", [plain], seed=1), 200))
    assert not any("Shakespeare" in m["content"] or "play" in m["content"] for t in talks for m in t)


def test_collected_conversations_have_the_wanted_kinds(tokenizer: Tokenizer) -> None:
    config = FinetuneConfig(identity_share=0.2)
    documents = [random_play(random.Random(number)) for number in range(6)]
    talks, counts = collect_conversations(config, documents, tokenizer, 256, 10**6)
    assert set(counts) == {"dialogue", "identity"}
    assert len(talks) == sum(counts.values())
    assert counts["identity"] / len(talks) == pytest.approx(0.2, abs=0.02)
    plain = [Document(str(n), sentences(random.Random(n), 60), "", "", "en") for n in range(6)]
    _, counts = collect_conversations(config, plain, tokenizer, 256, 10**6)
    assert set(counts) == {"continuation", "identity"}
    encoded = [render_with_mask(tokenizer, talk) for talk in talks]
    PackedConversations(encoded, 256, 4, seed=1)  # none is too long


def test_a_context_too_short_for_any_conversation(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="found no dialogue that fits 16 tokens"):
        collect_conversations(FinetuneConfig(), [random_play(random.Random(0))], tokenizer, 16, 10**6)


class Numbered:
    """Batches that carry their own step."""

    def __init__(self, sign: int) -> None:
        self.sign = sign

    def batch(self, step: int) -> Batch:
        empty = torch.empty(0)
        return Batch(torch.tensor([self.sign * (step + 1)]), empty, empty, empty, True, 0, None)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 1 / 3, 0.5, 0.9])
def test_a_mixture_takes_its_share_and_each_source_in_order(share: float) -> None:
    first: Any = Numbered(1)
    second: Any = Numbered(-1)
    mixture = Mixture(first, second, share)
    steps = [int(mixture.batch(step).tokens) for step in range(400)]
    firsts, seconds = [n for n in steps if n > 0], [-n for n in steps if n < 0]
    assert firsts == list(range(1, len(firsts) + 1))
    assert seconds == list(range(1, len(seconds) + 1))
    for end in range(1, 401):  # at any time, not only in the end
        assert abs(sum(n < 0 for n in steps[:end]) - share * end) < 1
    assert int(mixture.batch(123).tokens) == steps[123]  # a function of the step alone
