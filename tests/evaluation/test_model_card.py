"""The model card: front matter that a YAML parser reads, facts as given, nothing where a fact is missing."""

import pytest
import yaml

from lalia.evaluation.model_card import model_card

FACTS = {
    "name": "shakespeare",
    "license": "mit",
    "language": "en",
    "architecture": "LlamaForCausalLM",
    "parameters": 12_345_600,
    "context_length": 256,
    "vocab_size": 4096,
    "data": "The 38 works of Shakespeare.",
    "data_license": "public domain",
    "held_out": ["Hamlet", "Henry V"],
    "train_bytes": 4_743_940,
    "validation_bytes": 574_918,
    "bits_per_byte": 1.943,
    "chat_bits_per_byte": 2.113,
    "baselines": [
        {"name": "xz -9e", "bits_per_byte": 2.303, "how": "compressed"},
        {"name": "8-gram bytes", "bits_per_byte": 2.035, "how": "counted"},
    ],
    "steps": 800,
    "tokens": 13_107_200,
    "seconds": 552.3,
    "hardware": "2 cores",
    "is_chat": True,
    "is_shakespeare": True,
    "reproduce": "lalia run shakespeare",
}


def front_matter(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_front_matter_is_what_the_hub_expects():
    found = front_matter(model_card(FACTS))
    assert found["license"] == "mit" and found["language"] == "en"
    assert found["library_name"] == "transformers" and found["pipeline_tag"] == "text-generation"
    assert "lalia" in found["tags"] and "conversational" in found["tags"]


def test_front_matter_survives_any_value():
    nasty = 'a: b\n---\n# "quoted" # no'
    assert front_matter(model_card({"license": nasty, "language": "no"})) | {"tags": 0} == {
        "license": nasty,
        "language": "no",  # unquoted, YAML would read false
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": 0,
    }


def test_says_what_is_known():
    card = model_card(FACTS)
    for words in (
        "12.3 million",
        "Hamlet, Henry V",
        "4.74 MB",
        "9 min 12 s",
        "2 cores",
        "lalia run shakespeare",
        "lalia chat .",
    ):
        assert words in card
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0].strip("| *") for row in rows[2:]] == [
        "base model",
        "8-gram bytes",
        "assistant",
        "xz -9e",
    ]
    assert "The assistant does NOT beat 8-gram bytes." in card
    assert "The base model does NOT beat" not in card
    assert "The assistant does NOT beat 8-gram bytes." in model_card({**FACTS, "chat_bits_per_byte": 2.035})
    assert "four centuries old" in card and "makes things up" in card


def test_what_is_not_known_is_not_said():
    card = model_card({"name": "x", "parameters": None})
    for words in ("None", "## Data", "## Results", "## Training", "## Reproduce", "license", "centuries", "lalia chat"):
        assert words not in card
    assert "makes things up" in card


def test_text_cannot_break_the_page():
    card = model_card({**FACTS, "data": "<script>alert(1)</script>\n# Heading", "hardware": "a | b"})
    assert "<script>" not in card and "\n# Heading" not in card


def test_a_misspelt_fact_is_noticed():
    with pytest.raises(AssertionError, match="parameter"):
        model_card({"parameter": 1})
