"""The evaluate stage: bits per byte on held-out documents beside honest baselines, samples, and whether turns end."""

import time
from pathlib import Path
from typing import Any

from lalia.data.documents import Document, read_documents
from lalia.evaluation.baselines import baselines
from lalia.evaluation.config import EvaluateConfig
from lalia.files import write_json
from lalia.inference.language_model import LanguageModel, load
from lalia.progress import Progress
from lalia.training.bits_per_byte import bits_per_byte

PROMPTS = ("", "ACT I", "To be, or not to be", "The king ")
TALKS = (
    ("Hello!", "Who are you?", "What shall we do now?", "Farewell."),
    ("Good morrow, my lord. What news from the king?", "And what will you do?"),
    ("Do you love me?", "Which play is this?"),
    ("Tell me of the battle.", "I am afraid."),
)
"""What the sample conversations' user says, whatever the model answers."""


def evaluate(
    config: EvaluateConfig, documents: Path, models: dict[str, Path], out: Path, progress: Progress
) -> dict[str, Any]:
    """Measure models on the held-out documents and write results.json.

    Args:
        config: how much to measure.
        documents: folder of the collect stage.
        models: model folders by name ("base", "chat").
        out: receives results.json.
        progress: where to report.

    Returns:
        bits per byte by model and baseline, and the share of turns that ended.
    """
    held_out = _at_most(read_documents(documents, "validation"), config.max_bytes)
    results: dict[str, Any] = {
        "held_out": [document.id for document in held_out],
        "held_out_bytes": sum(document.num_bytes for document in held_out),
        "bits_per_byte": {},
    }
    loaded = {name: load(folder) for name, folder in models.items()}
    for name, model in loaded.items():
        began = time.monotonic()
        score = score_documents(model, held_out)
        results["bits_per_byte"][name] = round(score, 4)
        progress.say(f"{name}: {score:.3f} bits per byte on held-out text ({time.monotonic() - began:.0f} s)")
    if config.baselines:
        texts = [document.text for document in held_out]
        train = [document.text for document in read_documents(documents, "train")]
        results["baselines"] = baselines(train, texts, next(iter(loaded.values())).tokenizer)
        for baseline in results["baselines"]:
            progress.say(f"{baseline['name']}: {baseline['bits_per_byte']:.3f} bits per byte")
    results["samples"] = _samples(loaded["base"], config)
    if "chat" in loaded:
        results["conversations"] = converse(loaded["chat"], config.seed)
        replies = [m for talk in results["conversations"] for m in talk if m["role"] == "assistant"]
        results["turns_ended"] = {"ended": sum(m["ended"] for m in replies), "of": len(replies)}
        progress.say(f"turns ended: {results['turns_ended']['ended']} of {len(replies)}")
    write_json(out / "results.json", results)
    return {
        "bits_per_byte": results["bits_per_byte"],
        "baselines": {b["name"]: b["bits_per_byte"] for b in results.get("baselines", [])},
        "turns_ended": results.get("turns_ended"),
    }


def score_documents(model: LanguageModel, documents: list[Document]) -> float:
    """Bits per byte in float32, with windows of the whole context that advance by half of it."""
    texts = [document.text for document in documents]
    encoded = model.tokenizer.encode_batch(texts)
    model.tokenizer.check_lossless("bits per byte", texts, encoded)
    start = model.tokenizer.end_of_text_id
    pairs = [([start, *ids], document.num_bytes) for ids, document in zip(encoded, documents, strict=True)]
    window = model.max_length
    return bits_per_byte(model.model, pairs, window, stride=max(1, window // 2))


def converse(model: LanguageModel, seed: int, max_tokens: int = 80) -> list[list[dict[str, Any]]]:
    """Sample conversations with fixed user turns; each reply says whether the model ended it itself."""
    max_tokens = min(max_tokens, model.max_length // 2)
    talks = []
    for number, questions in enumerate(TALKS):
        talk: list[dict[str, Any]] = []
        for question in questions:
            talk.append({"role": "user", "content": question})
            messages = [{"role": m["role"], "content": m["content"]} for m in talk]
            messages = model.fit_messages(messages, max_tokens)
            room = model.max_length - len(model.encode_chat(messages))
            if room < 1:  # the context of a tiny model holds no such question
                talk.pop()
                break
            size = min(max_tokens, room)
            reply = model.reply(messages, max_tokens=size, temperature=0.7, top_p=0.9, seed=seed + number)
            talk.append({"role": "assistant", "content": reply.text, "ended": reply.finish_reason == "stop"})
        talks.append(talk)
    return talks


def _samples(model: LanguageModel, config: EvaluateConfig) -> list[dict[str, str]]:
    prompts = PROMPTS[: config.samples]
    size = min(config.sample_tokens, model.max_length // 2)
    texts = [model.generate(p, max_tokens=size, temperature=0.8, seed=config.seed) for p in prompts]
    return [{"prompt": p, "text": t.text} for p, t in zip(prompts, texts, strict=True)]


def _at_most(documents: list[Document], max_bytes: int | None) -> list[Document]:
    """Documents up to a number of bytes, the last one cut at a character."""
    if max_bytes is None:
        return documents
    kept: list[Document] = []
    for document in documents:
        room = max_bytes - sum(d.num_bytes for d in kept)
        if room <= 0:
            break
        if document.num_bytes > room:
            text = document.text.encode()[:room].decode("utf-8", "ignore")
            document = Document(document.id, text, document.source, document.license, document.language)
        kept.append(document)
    return kept
