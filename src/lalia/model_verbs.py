"""Verbs about models from elsewhere and for elsewhere, and about encoders: parse, call, print."""

import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from lalia.arguments import Json, Model, model_folder, print_json, standard_input
from lalia.errors import UserError

app = typer.Typer()


@app.command()
def pull(
    model: Annotated[str, typer.Argument(help="smollm2, minilm, or hf:ORG/NAME[@REVISION]")],
    force: Annotated[bool, typer.Option("--force", help="fetch it again although it is there")] = False,
    as_json: Json = False,
) -> None:
    """Fetch a published model into the model store, to be used by its name."""
    from lalia.formats.pull import pull as pull_model
    from lalia.formats.store import read_source
    from lalia.progress import Progress

    folder = pull_model(model, force, Progress(quiet=as_json))
    if as_json:
        print_json({"path": str(folder), **read_source(folder)})


@app.command()
def models(as_json: Json = False) -> None:
    """List the models in the model store."""
    from lalia.formats.store import store_folder, stored_models

    found = stored_models()
    if as_json:
        print_json(found)
        return
    for entry in found:
        print(f"{entry['name']:<24} {entry['bytes'] / 1e6:>8,.0f} MB   {entry['license'] or 'license unknown'}")
    print(f"{store_folder()}{'' if found else ' is empty; lalia pull smollm2 fetches a small model'}", file=sys.stderr)


@app.command()
def convert(
    model: Model,
    to: Annotated[str, typer.Option("--to", help="onnx, onnx-int8, gguf-f16, gguf-q8_0, gguf-q4_0 or hf")],
    out: Annotated[Path | None, typer.Option(help="the new folder (default: beside the model, or here)")] = None,
    text: Annotated[Path | None, typer.Option(help="a text to compare an ONNX model with its source on")] = None,
    as_json: Json = False,
) -> None:
    """Write a model in another format, and say how far it is from the original.

    A checkpoint of a training (runs/NAME/.base.partial/step-...) becomes a model folder with --to hf.
    """
    from lalia.formats.convert import convert as convert_model
    from lalia.formats.convert import report

    if (Path(model) / "checkpoint.json").is_file():
        _convert_checkpoint(Path(model), to, out, as_json)
        return
    facts = convert_model(model_folder(model, "chat"), to, out, text)
    if as_json:
        print_json(facts)
        return
    for line in (f"{facts['path']}: {', '.join(facts['files'])}, {facts['bytes'] / 1e6:,.1f} MB", *report(facts)):
        print(line)


def _convert_checkpoint(checkpoint: Path, to: str, out: Path | None, as_json: bool) -> None:
    if to != "hf" or out is None:
        raise UserError(
            f"a checkpoint becomes a model folder first: lalia convert {checkpoint} --to hf --out FOLDER; convert that "
            "further"
        )
    from lalia.training.pretrain import save_checkpoint_as_model

    save_checkpoint_as_model(checkpoint, out)
    if as_json:
        print_json({"path": str(out), "checkpoint": str(checkpoint)})
    else:
        print(f"{out}: the model of {checkpoint}")


Texts = Annotated[list[str] | None, typer.Argument(metavar="[TEXT]...", help="texts; - reads one per line")]


@app.command()
def embed(model: Model, texts: Texts = None, as_json: Json = False) -> None:
    """Make a vector of each text: one line of numbers for each."""
    encoder, given = _encoder(model), _texts(texts)
    with _notes():
        vectors = encoder.embed(given)
    if as_json:
        print_json({"texts": given, "embeddings": vectors.tolist()})
        return
    for vector in vectors:
        print(" ".join(f"{value:.7g}" for value in vector))


@app.command()
def fill(
    model: Model,
    text: Annotated[str, typer.Argument(help="a text with a mask ([MASK] for BERT) in it; - reads standard input")],
    top_k: Annotated[int, typer.Option(help="how many tokens to show", min=1)] = 5,
    as_json: Json = False,
) -> None:
    """Show what a masked language model would put in the mask's place."""
    encoder = _encoder(model)
    found = encoder.fill(standard_input().strip() if text == "-" else text, top_k)
    if as_json:
        print_json([filling._asdict() for filling in found])
        return
    for filling in found:
        print(f"{filling.probability:7.2%}  {filling.token}")


@app.command()
def classify(model: Model, texts: Texts = None, as_json: Json = False) -> None:
    """Give each text its label: one line of probability, label and text for each."""
    encoder, given = _encoder(model), _texts(texts)
    with _notes():
        results = encoder.classify(given)
    if as_json:
        print_json([{"text": text, **result._asdict()} for text, result in zip(given, results, strict=True)])
        return
    for text, result in zip(given, results, strict=True):
        print(f"{result.probability:7.2%}  {result.label}  {' '.join(text.split())[:80]}")


@app.command(name="train-classifier")
def train_classifier(
    examples: Annotated[Path, typer.Argument(help=".jsonl or .csv with text and label")],
    out: Annotated[Path, typer.Option(help="the folder to write")],
    base: Annotated[str | None, typer.Option(help="an encoder to begin with (default: none, a small new one)")] = None,
    epochs: Annotated[
        float | None, typer.Option(help="passes over the examples (default: 3 with a base, or 8)")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a classifier of texts on examples, and measure it on some held out."""
    from lalia.posttraining import classify as training
    from lalia.progress import Progress

    config = training.SCRATCH if base is None else training.ClassifierConfig()
    if epochs is not None:
        config = training.ClassifierConfig.parse({**config.model_dump(), "epochs": epochs}, "train-classifier")
    start = None if base is None else model_folder(base, "base")
    results = training.train_classifier(start, examples.expanduser(), out.expanduser(), config, Progress(quiet=as_json))
    if as_json:
        print_json(results)
        return
    for label, figures in results["per_label"].items():
        shown = [f"{name} {figures[name]:.3f}" for name in ("precision", "recall", "f1") if figures[name] is not None]
        print(f"{label:<20} {'  '.join(shown)}  ({figures['held_out']} held out)")
    print(
        f"accuracy {results['accuracy']:.3f}, macro-F1 {results['macro_f1']:.3f}; always {results['majority_label']!r} "
        f"would have accuracy {results['majority_accuracy']:.3f}; written to {out}"
    )


def _encoder(model: str) -> Any:
    """An encoder, or what makes vectors in a model that generates."""
    import lalia
    from lalia.inference.loading import as_encoder

    return as_encoder(lalia.load(model_folder(model, "base")))


def _texts(texts: list[str] | None) -> list[str]:
    """The texts given, or the lines of standard input."""
    if texts and texts != ["-"]:
        return texts
    return standard_input().splitlines()


@contextlib.contextmanager
def _notes() -> Iterator[None]:
    """Print warnings as one line each, at the end."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        print(f"lalia: note: {warning.message}", file=sys.stderr)
