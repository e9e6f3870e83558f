"""Training a classifier of texts: an encoder with a head that scores labels."""

import csv
import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lalia.data.loader import IGNORED, PADDING, Batch
from lalia.errors import UserError
from lalia.files import fingerprint, run_lock, write_json
from lalia.formats.hf_folder import save_model
from lalia.formats.loading import load_folder
from lalia.formats.store import find_model
from lalia.inference.encoder import Encoder
from lalia.model.config import ModelConfig
from lalia.model.families import registry
from lalia.model.transformer import Transformer
from lalia.progress import Progress
from lalia.settings import Seed, Settings
from lalia.tokenizer.tokenizer import Tokenizer
from lalia.tokenizer.wordpiece import train_wordpiece
from lalia.training.config import LoopConfig, OptimizerConfig
from lalia.training.objectives import Metrics
from lalia.training.schedule import evenly_spaced
from lalia.training.trainer import Trainer, initialize

RESULTS = "classification.json"
VOCAB_SIZE = 8192
"""Largest vocabulary of a classifier made from nothing."""


class ClassifierOptimizerConfig(OptimizerConfig):
    """Low learning rates where a published encoder is trained on; the new head may move faster."""

    matrix_learning_rate: float = Field(default=0.002, gt=0)
    embedding_learning_rate: float = Field(default=0.0003, gt=0)
    head_learning_rate: float = Field(default=0.002, gt=0)
    scalar_learning_rate: float = Field(default=0.0005, gt=0)
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1)
    decay_fraction: float = Field(default=0.9, ge=0, le=1)


class ClassifierConfig(Settings):
    """How to train a classifier."""

    epochs: float = Field(default=3.0, gt=0)
    """Passes over the training examples."""
    batch_size: int = Field(default=16, gt=0)
    max_length: int = Field(default=128, ge=8)
    """Longest text in tokens; what is longer is cut there, and counted."""
    held_out: float = Field(default=0.1, gt=0, lt=1)
    """Share of the examples of every label that is never trained on."""
    optimizer: ClassifierOptimizerConfig = ClassifierOptimizerConfig()
    checkpoint_seconds: float = Field(default=30.0, gt=0)
    seed: Seed = 1


SCRATCH = ClassifierConfig(
    epochs=8.0,
    optimizer=ClassifierOptimizerConfig(
        matrix_learning_rate=0.01, embedding_learning_rate=0.003, head_learning_rate=0.003, scalar_learning_rate=0.003
    ),
)
"""Defaults without a base: everything has to be learned."""


@dataclass(frozen=True)
class Example:
    """A text and its label."""

    text: str
    label: str


def train_classifier(
    base: str | Path | None,
    examples: str | Path | Sequence[Example],
    out: str | Path,
    config: ClassifierConfig | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train a classifier, measure it on examples held out, and write its model folder.

    The same call continues a training that was interrupted.

    Args:
        base: an encoder (BERT, DistilBERT, sentence-transformers), or a classifier to train on with the labels it has;
            None makes a small BERT from nothing, tokenizer included.
        examples: a .jsonl file of objects with "text" and "label", a .csv file with such columns, or examples.
        out: receives the folder that `lalia.load` and transformers read, metrics.jsonl and classification.json; while
            training also checkpoints.
        config: how to train; the defaults are gentle with a base and quick without one.
        progress: where to report.

    Returns:
        what is in classification.json: accuracy and macro-F1 on the examples held out, the accuracy of always giving
        the most frequent label, the same per label, the counts of labels, and what happened in training.

    Raises:
        UserError: if the examples are no such file, have fewer than two labels, an empty text, or a label with a
            single text or one that the base does not have; or if the base is no encoder.
    """
    out = Path(out)
    config = config or (SCRATCH if base is None else ClassifierConfig())
    progress = progress or Progress()
    if not isinstance(examples, Sequence) or isinstance(examples, str):
        examples = read_examples(Path(examples))
    labels = _labels(examples)
    train, held_out = split(examples, config.held_out, config.seed)
    progress = Progress(out / "metrics.jsonl", progress.quiet)
    with run_lock(out):
        model, tokenizer, limit = _prepare(base, labels, train, out, config)
        return _train(model, tokenizer, min(limit, config.max_length), train, held_out, out, config, progress)


def _train(
    model: Transformer,
    tokenizer: Tokenizer,
    max_length: int,
    train: list[Example],
    held_out: list[Example],
    out: Path,
    config: ClassifierConfig,
    progress: Progress,
) -> dict[str, Any]:
    names = model.config.labels
    number = {label: i for i, label in enumerate(names)}
    counts = Counter(example.label for example in train)
    largest, smallest = max(counts.values()), min(counts.values())
    progress.say(
        f"{len(train):,} examples to train on, {len(held_out):,} held out; "
        + ", ".join(f"{label} {count:,}" for label, count in counts.most_common(8))
    )
    if largest > 10 * smallest:
        progress.say(
            f"note: the most frequent label has {largest / smallest:.0f} times the examples of the rarest; look at the "
            "figures of each label, not at the accuracy alone"
        )
    encoded = {part: _encode(tokenizer, rows, max_length) for part, rows in (("train", train), ("held", held_out))}
    cut = sum(long for _, long in encoded.values())
    if cut:
        progress.say(f"note: {cut:,} texts have more than {max_length} tokens and were cut there")
    batches = Examples(encoded["train"][0], [number[e.label] for e in train], config.batch_size, config.seed)
    steps = max(1, round(config.epochs * len(train) / config.batch_size))
    encoder = Encoder(model, tokenizer)
    truth = [number[example.label] for example in held_out]

    def evaluate(_: int) -> dict[str, Any]:
        predicted = encoder.scores(encoded["held"][0]).argmax(-1).tolist()
        figures = measure(truth, predicted, names)
        return {"accuracy": figures["accuracy"], "macro_f1": figures["macro_f1"]}

    identity = fingerprint(
        {
            "config": config.model_dump(mode="json"),
            "model": model.config.model_dump(mode="json"),
            "tokenizer": tokenizer.sha256,
            "examples": [[e.text, e.label] for e in (*train, *held_out)],
            "weights": _digest(model),
        }
    )
    trainer = Trainer(
        model,
        batches,
        classification,
        steps,
        config.optimizer,
        out,
        identity,
        progress,
        # Once most texts are learnt, those that are not would look like spikes.
        LoopConfig(checkpoint_seconds=config.checkpoint_seconds, spike_deviations=0.0),
        evaluate=evaluate,
        evaluation_steps=evenly_spaced(steps, 2),
        unit="example",
    )
    happened = trainer.train()
    happened = {key.replace("tokens", "examples"): value for key, value in happened.items()}
    model.eval()
    predicted = encoder.scores(encoded["held"][0]).argmax(-1).tolist()
    majority = counts.most_common(1)[0][0]
    results = {
        **measure(truth, predicted, names),
        "majority_accuracy": round(sum(e.label == majority for e in held_out) / len(held_out), 4),
        "majority_label": majority,
        "examples": {"train": len(train), "held_out": len(held_out), "cut": cut},
        "label_counts": dict(counts.most_common()),
        "imbalance": round(largest / smallest, 2),
        "training": happened,
    }
    tokenizer.save(out, max_length=max_length)
    write_json(out / RESULTS, results)
    ids = {name: i for name in ("pad_token_id",) if (i := getattr(tokenizer, name)) is not None}
    save_model(model, out, ids)
    for checkpoint in out.glob("step-*"):
        shutil.rmtree(checkpoint)
    return results


class Examples:
    """Batches of encoded examples, each epoch in another order; a function of the seed and the step.

    The label of a text is the target of its first token; the other tokens have none.
    """

    def __init__(self, ids: Sequence[list[int]], labels: Sequence[int], batch_size: int, seed: int) -> None:
        self._ids, self._labels, self._seed = ids, labels, seed
        self.batch_size = min(batch_size, len(ids))

    def batch(self, step: int) -> Batch:
        """The batch of a step; the last of an epoch is filled up from the next."""
        numbers = range(step * self.batch_size, (step + 1) * self.batch_size)
        rows = [int(self._order(number // len(self._ids))[number % len(self._ids)]) for number in numbers]
        longest = max(len(self._ids[row]) for row in rows)
        tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
        document_ids = torch.full((len(rows), longest), PADDING, dtype=torch.int32)
        targets = torch.full((len(rows), longest), IGNORED, dtype=torch.int64)
        for place, row in enumerate(rows):
            length = len(self._ids[row])
            tokens[place, :length] = torch.tensor(self._ids[row])
            document_ids[place, :length] = 0
            targets[place, 0] = self._labels[row]
        positions = torch.arange(longest).expand(len(rows), -1)
        return Batch(tokens, targets, document_ids, positions, False, len(rows), None)

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._ids))


def classification(model: Transformer, batch: Batch) -> tuple[Tensor, Tensor, Metrics]:
    """Sum of the cross-entropies of the labels in nats and the number of texts."""
    hidden = model(batch.tokens, document_ids=batch.document_ids)
    loss = F.cross_entropy(model.classify(hidden).float(), batch.targets[:, 0], reduction="sum")
    return loss, torch.tensor(len(batch.tokens), device=loss.device), {}


def measure(truth: Sequence[int], predicted: Sequence[int], labels: Sequence[str]) -> dict[str, Any]:
    """Accuracy, macro-F1 (the mean of the labels' F1, each counting the same), and the figures of each label.

    A label that is neither held out nor predicted has no F1 and does not enter the mean.
    """
    per_label: dict[str, dict[str, Any]] = {}
    for number, label in enumerate(labels):
        right = sum(t == p == number for t, p in zip(truth, predicted, strict=True))
        wanted, given = sum(t == number for t in truth), sum(p == number for p in predicted)
        per_label[label] = {
            "precision": round(right / given, 4) if given else None,
            "recall": round(right / wanted, 4) if wanted else None,
            "f1": round(2 * right / (wanted + given), 4) if wanted + given else None,
            "held_out": wanted,
        }
    scores = [figures["f1"] for figures in per_label.values() if figures["f1"] is not None]
    accuracy = sum(t == p for t, p in zip(truth, predicted, strict=True)) / len(truth)
    return {
        "accuracy": round(accuracy, 4),
        "macro_f1": round(sum(scores) / len(scores), 4),
        "per_label": per_label,
    }


def read_examples(path: Path) -> list[Example]:
    """Examples of a .jsonl file (objects with "text" and "label") or a .csv file (with such columns).

    Raises:
        UserError: if it is no such file, or a row lacks one of the two or has an empty text.
    """
    if path.suffix not in (".jsonl", ".csv"):
        raise UserError(f"{path}: examples are read from .jsonl or .csv files; give one of those")
    if not path.is_file():
        raise UserError(f"there is no file {path}; give a .jsonl or .csv file with text and label")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(_json_rows(path, file) if path.suffix == ".jsonl" else _csv_rows(path, file))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); convert it") from None
    except csv.Error as error:
        raise UserError(f"{path} is no CSV file ({error})") from None
    examples = []
    for line, values in rows:
        missing = [name for name in ("text", "label") if values.get(name) is None]
        if missing:
            have = ", ".join(str(key) for key in values)[:200]
            raise UserError(f"{path}:{line} has no {' and no '.join(missing)} (it has: {have}); rename or add it")
        text, label = values["text"], values["label"]
        if isinstance(label, bool) or not isinstance(label, str | int) or not isinstance(text, str):
            raise UserError(f"{path}:{line}: text and label must be strings, got {text!r:.40} and {label!r:.40}")
        if not text.strip() or not str(label).strip():
            raise UserError(f"{path}:{line} has an empty {'label' if text.strip() else 'text'}; remove the row")
        examples.append(Example(text, str(label).strip()))
    return examples


def _json_rows(path: Path, file: Any) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for line, content in enumerate(file, start=1):
        if not content.strip():
            continue
        try:
            values = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{line} is not JSON ({error})") from None
        if not isinstance(values, dict):
            raise UserError(f"{path}:{line} is {type(values).__name__}, expected an object with text and label")
        yield line, values


def _csv_rows(path: Path, file: Any) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(file, strict=True)
    columns = reader.fieldnames or []
    missing = [name for name in ("text", "label") if name not in columns]
    if missing:
        have = ", ".join(columns)[:200] or "none"
        raise UserError(f"{path} has no column {' and no column '.join(missing)} (it has: {have}); rename or add it")
    for values in reader:
        yield reader.line_num, values


def _labels(examples: Sequence[Example]) -> tuple[str, ...]:
    """All labels in order of name.

    Raises:
        UserError: if there are fewer than two, a text is empty, or a label has a single text: then nothing could be
            held out, or nothing trained on.
    """
    empty = next((number for number, example in enumerate(examples) if not example.text.strip()), None)
    if empty is not None:
        raise UserError(f"example {empty} has an empty text; remove it")
    texts: dict[str, set[str]] = {}
    for example in examples:
        texts.setdefault(example.label, set()).add(example.text)
    if len(texts) < 2:
        raise UserError(f"the examples have {len(texts)} label{'s' * (len(texts) != 1)}; a classifier needs at least 2")
    single = [label for label, of_label in texts.items() if len(of_label) < 2]
    if single:
        raise UserError(f"one text only with the label {', '.join(map(repr, single[:8]))}; give more, or leave it out")
    return tuple(sorted(texts))


def split(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Examples to train on and examples held out, the same share of every label, at least one.

    Equal texts stay on one side, so that nothing held out has been seen.
    """
    first_label: dict[str, str] = {}
    for example in examples:
        first_label.setdefault(example.text, example.label)
    held: set[str] = set()
    for label in sorted(set(first_label.values())):
        texts = sorted(text for text, of_text in first_label.items() if of_text == label)
        random.Random(f"{seed} {label}").shuffle(texts)
        held.update(texts[: min(max(1, round(len(texts) * share)), len(texts) - 1)])
    train = [example for example in examples if example.text not in held]
    held_out = [example for example in examples if example.text in held]
    if not held_out or len({e.label for e in train}) < len({e.label for e in examples}):
        raise UserError("too few different texts to hold some of every label out; give more examples")
    return train, held_out


def _prepare(
    base: str | Path | None, labels: tuple[str, ...], train: list[Example], out: Path, config: ClassifierConfig
) -> tuple[Transformer, Tokenizer, int]:
    """A trainable classifier, its tokenizer and the longest text it reads."""
    if base is None:
        tokenizer = train_wordpiece([example.text for example in train], VOCAB_SIZE)
        model = Transformer(small_bert(tokenizer, labels, config.max_length))
        initialize(model, config.seed)
        return model, tokenizer, config.max_length
    path = find_model(base)
    if path.resolve() == out.resolve():
        raise UserError(f"{out} is the base itself; write the classifier to another folder")
    encoder, tokenizer = load_folder(path, trainable=True)
    kind = encoder.config
    if kind.causal or kind.family not in ("bert", "distilbert"):
        raise UserError(f"{path} is a model of family {kind.family!r}; a classifier is made of a BERT or DistilBERT")
    if kind.head == "classifier":
        unknown = sorted(set(labels) - set(kind.labels))
        if unknown:
            raise UserError(
                f"the labels {', '.join(map(repr, unknown[:8]))} are not among those of {path}: "
                f"{', '.join(kind.labels[:20])}; change them, or begin with an encoder without a classifier"
            )
        return encoder, tokenizer, kind.max_position_embeddings
    changes = {
        "head": "classifier",
        "labels": labels,
        "head_bias": False,
        "head_transform": False,
        "pooler": "tanh" if kind.family == "bert" else "relu",
    }
    model = Transformer(ModelConfig.parse({**kind.model_dump(), **changes}, "model"))
    registry.to_hf(model.config)  # what cannot be saved is not trained
    initialize(model, config.seed)
    weights = model.state_dict()
    known = {name: weight for name, weight in encoder.state_dict().items() if name in weights}
    model.load_state_dict({**weights, **known})
    return model, tokenizer, kind.max_position_embeddings


def small_bert(tokenizer: Tokenizer, labels: tuple[str, ...], max_length: int) -> ModelConfig:
    """Two layers of width 128: what trains in seconds, and is enough for texts that differ by their words."""
    return ModelConfig.parse(
        {
            **registry.from_hf(
                {
                    "model_type": "bert",
                    "architectures": ["BertForSequenceClassification"],
                    "vocab_size": tokenizer.vocab_size,
                    "hidden_size": 128,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "intermediate_size": 512,
                    "max_position_embeddings": max_length,
                }
            ).model_dump(),
            "labels": labels,
        },
        "model",
    )


def _encode(tokenizer: Tokenizer, examples: Sequence[Example], max_length: int) -> tuple[list[list[int]], int]:
    """Ids of the texts, and how many were cut."""
    texts = [example.text for example in examples]
    long = sum(len(encoded.ids) > max_length for encoded in tokenizer.encode_with_specials(texts))
    return [encoded.ids for encoded in tokenizer.encode_with_specials(texts, max_tokens=max_length)], long


def _digest(model: Transformer) -> str:
    """Identity of the initial weights, by their sums: enough to tell bases apart."""
    return fingerprint([float(weight.detach().double().sum()) for weight in model.parameters()])
