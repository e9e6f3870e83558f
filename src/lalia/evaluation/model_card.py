"""README.md of a model folder: what the model is, how good it is, and what it must not be trusted with."""

import json
from collections.abc import Callable
from typing import Any

from lalia.evaluation import wording

Facts = dict[str, Any]

KNOWN = {
    "name",
    "license",
    "language",
    "architecture",
    "parameters",
    "context_length",
    "vocab_size",
    "data",
    "data_license",
    "held_out",
    "train_bytes",
    "validation_bytes",
    "bits_per_byte",
    "chat_bits_per_byte",
    "baselines",
    "steps",
    "tokens",
    "seconds",
    "hardware",
    "precision",
    "lalia_version",
    "commit",
    "is_chat",
    "is_shakespeare",
    "reproduce",
}


def model_card(facts: Facts) -> str:
    """Markdown with YAML front matter, for the README.md of a Hugging Face folder.

    Args:
        facts: flat; any may be missing or None and is then not mentioned. name, license, language, architecture,
            parameters, context_length, vocab_size; data (a sentence), data_license, held_out (list of names),
            train_bytes, validation_bytes; bits_per_byte (the base model's), chat_bits_per_byte, baselines (list of
            name, bits_per_byte, how); steps, tokens, seconds, hardware, precision, lalia_version, commit; is_chat,
            is_shakespeare; reproduce (a command).

    Raises:
        AssertionError: if a fact is not one of these.
    """
    unknown = facts.keys() - KNOWN
    assert not unknown, f"model_card knows no facts {sorted(unknown)}"
    facts = {key: value for key, value in facts.items() if value is not None}
    sections = [_front_matter, _introduction, _data, _results, _training, _use, _limits, _reproduce]
    return "\n\n".join(text for section in sections if (text := section(facts))) + "\n"


def _front_matter(facts: Facts) -> str:
    tags = ["lalia", "small-language-model", "trained-from-scratch"]
    tags += ["conversational"] if facts.get("is_chat") else []
    lines = [f"{key}: {_quoted(facts[key])}" for key in ("license", "language") if key in facts]
    lines += ["library_name: transformers", "pipeline_tag: text-generation", "tags:", *(f"- {tag}" for tag in tags)]
    return "\n".join(["---", *lines, "---"])


def _quoted(value: Any) -> str:
    """A YAML value: JSON is YAML, so that no license or language can break the front matter."""
    return json.dumps(value, ensure_ascii=False)


def _introduction(facts: Facts) -> str:
    kind = "assistant" if facts.get("is_chat") else "language model"
    size = f" of {wording.short_count(facts['parameters'])} parameters" if "parameters" in facts else ""
    paragraph = f"A small {kind}{size}, trained from nothing with Lalia."
    details = [
        (f"architecture: {_text(facts['architecture'])}") if "architecture" in facts else "",
        (f"context: {wording.count(facts['context_length'])} tokens") if "context_length" in facts else "",
        (f"vocabulary: {wording.count(facts['vocab_size'])} tokens") if "vocab_size" in facts else "",
    ]
    known = "; ".join(detail for detail in details if detail)
    if known:
        paragraph += f" {known[0].upper()}{known[1:]}."
    return f"# {_text(facts.get('name', 'Model'))}\n\n{paragraph}"


def _data(facts: Facts) -> str:
    lines: list[str] = []
    if "data" in facts:
        lines.append(_text(facts["data"]))
    if "train_bytes" in facts:
        lines.append(f"Training text: {wording.size(facts['train_bytes'])}.")
    if facts.get("held_out"):
        lines.append(f"Held out and never trained on: {', '.join(_text(work) for work in facts['held_out'])}.")
    if "validation_bytes" in facts:
        lines.append(f"Held-out text: {wording.size(facts['validation_bytes'])}.")
    if "data_license" in facts:
        lines.append(f"License of the text: {_text(facts['data_license'])}.")
    return "## Data\n\n" + "\n".join(lines) if lines else ""


def _results(facts: Facts) -> str:
    ours = [
        (name, facts[key], "")
        for key, name in (("bits_per_byte", "**base model**"), ("chat_bits_per_byte", "**assistant**"))
        if key in facts
    ]
    if not ours:
        return ""
    theirs = [(_text(b["name"]), b["bits_per_byte"], _text(b.get("how", ""))) for b in facts.get("baselines", [])]
    rows = [
        f"| {name} | {wording.bits_per_byte(value)} | {how} |"
        for name, value, how in sorted(ours + theirs, key=lambda row: row[1])
    ]
    table = "\n".join(["| | bits per byte | how |", "| --- | ---: | --- |", *rows])
    verdicts = [
        f"The {model.strip('*')} does NOT beat {', '.join(better)}."
        for model, score, _ in ours
        if (better := [name for name, value, _ in theirs if value <= score])
    ]
    return "\n\n".join(["## Results", "Bits per byte of the held-out text, lower is better.", table, *verdicts])


def _training(facts: Facts) -> str:
    parts: list[tuple[str, str, Callable[[Any], str]]] = [
        ("steps", "Steps", wording.count),
        ("tokens", "Tokens", wording.short_count),
        ("seconds", "Time", wording.duration),
        ("hardware", "Hardware", _text),
        ("precision", "Precision", _text),
        ("lalia_version", "Lalia", _text),
        ("commit", "Commit", _text),
    ]
    lines = [f"- {label}: {word(facts[key])}" for key, label, word in parts if key in facts]
    return "## Training\n\n" + "\n".join(lines) if lines else ""


def _use(facts: Facts) -> str:
    verb = "lalia chat ." if facts.get("is_chat") else 'lalia generate . "To be, or not"'
    if facts.get("is_chat"):
        prepare = """messages = [{"role": "user", "content": "Good morrow. Who art thou?"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)"""
    else:
        prepare = 'inputs = tokenizer("To be, or not", return_tensors="pt")'
    return f"""## Use

With Lalia, in this folder:

    {verb}
    lalia serve .

With transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".")
{prepare}
output = model.generate(**inputs, max_new_tokens=100, do_sample=True)
print(tokenizer.decode(output[0]))
```"""


def _limits(facts: Facts) -> str:
    if facts.get("is_shakespeare"):
        source = (
            "It learnt from plays four centuries old, and repeats their errors, prejudices and insults as well as\n"
            "their words."
        )
    else:
        source = "It repeats the errors and biases of the text it learnt from."
    return f"""## Limits

A small model trained for a short time. It makes things up: names, events, meanings. It knows nothing of the world
beyond its text, cannot reason or calculate reliably, and has no notion of truth or safety.
{source}
Use it to learn how language models work, not to inform, advise or decide."""


def _reproduce(facts: Facts) -> str:
    return f"## Reproduce\n\n    {facts['reproduce']}" if "reproduce" in facts else ""


def _text(value: Any) -> str:
    """A value within Markdown: one line, and neither HTML nor the end of a table cell."""
    text = " ".join(wording.plain(value).split())
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
