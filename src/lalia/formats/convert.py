"""A model folder into another format: ONNX, GGUF, or a Hugging Face folder."""

import difflib
import importlib.metadata
import importlib.util
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lalia.errors import UserError
from lalia.files import read_json, replace_directory, write_json, write_text
from lalia.formats.hf_folder import CONFIG, GENERATION, save_model
from lalia.formats.loading import OpenModel, gguf_path, open_model
from lalia.formats.sentence_transformers import Pooling, read_pooling
from lalia.formats.store import stored_name
from lalia.model.families import registry
from lalia.tokenizer.bpe import Tokenizer

VERSION = importlib.metadata.version("lalia")
RECORD, CARD = "conversion.json", "README.md"
"""The first marks a folder as ours, so that it may be replaced."""
COMPANIONS = (
    GENERATION,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "preprocessor_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
    "LICENSE",
)
"""Files that go with a model in any format."""
TOLERANCE = 1e-3
"""Relative error above which a float32 graph is no copy of its model; in practice it is about 1e-6."""
SAMPLE = """\
The ferry leaves at seven in the morning, and the island is an hour away if the wind is kind.
My sister asked for the recipe twice: flour, two eggs, a little salt, and butter that is really cold.
A river carries sand and stones to the sea, where over a very long time they become rock again.
"Why would anyone paint a door that colour?" he said, and laughed, because it was his own.
In 1958 the bridge was closed for repairs; it opened again three years later and has stood ever since.
To add two fractions, first give them the same denominator, then add what is above the line.
The committee will meet on Tuesday to hear both sides before it decides about the school's new roof.
She ran down the stairs, out of the house and across the wet grass, still holding the letter.
"""
"""What a converted model is compared on if the user names no text. Written for this purpose."""
SEQUENCE_LENGTH = 128
MAX_SEQUENCES = 32


@dataclass(frozen=True)
class Given:
    """What is converted.

    Attributes:
        name: of the model.
        open: its files.
        folder: with config.json, tokenizer and card: the model's own, or, for a GGUF file, one made of the file.
    """

    name: str
    open: OpenModel
    folder: Path


@dataclass(frozen=True)
class Target:
    """A format to convert to.

    Attributes:
        what: it is, for people.
        write: (what is converted, new folder, text to compare on) -> facts about what was written.
        needs: packages, with the extra that brings them.
    """

    what: str
    write: Callable[[Given, Path, str], dict[str, Any]]
    needs: tuple[str, ...] = ()
    extra: str = ""


def convert(source: Path, target: str, out: Path | None = None, text: Path | None = None) -> dict[str, Any]:
    """Write `source`, a model folder or a GGUF file, in another format.

    Args:
        target: one of TARGETS.
        out: the new folder; by default beside the source, with the target behind its name. One that is there already
            is replaced only if it came from here.
        text: a file of text that ONNX models are compared with their source on; by default SAMPLE.

    Returns:
        facts: target, path, bytes (of the model's files), and what the target's writer reports. Also in RECORD.

    Raises:
        UserError: for an unknown target, a missing extra, a folder that is in the way, a model that the format cannot
            hold, or a graph that does not compute what the model does.
    """
    chosen = TARGETS.get(target)
    if chosen is None:
        near = difflib.get_close_matches(target, TARGETS, n=1)
        hint = f" (nearest: {near[0]})" if near else ""
        raise UserError(f"--to {target!r} is unknown{hint}; choose one of {', '.join(TARGETS)}")
    missing = [name for name in chosen.needs if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'{target} needs {" and ".join(missing)}; install with: pip install "lalia[{chosen.extra}]"')
    if text is not None and not target.startswith("onnx"):
        raise UserError(f"--text has an effect where an ONNX model is compared with its source, not with --to {target}")
    source = source.expanduser()
    sample = SAMPLE if text is None else _read_text(text)
    with tempfile.TemporaryDirectory() as staging, open_model(source) as opened:
        given = _given(source, opened, Path(staging))
        # What is made of a model in the store is the user's own, and the store is not where they would look for it.
        beside = Path() if stored_name(source) else source.parent
        out = beside / f"{given.name}-{target}" if out is None else out.expanduser()
        _check_out(out, source)
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        try:
            facts = {"target": target, "path": str(out), **chosen.write(given, temporary, sample)}
            write_text(temporary / CARD, _card(given, target, chosen, facts))
            write_json(temporary / RECORD, {"lalia": VERSION, "source": given.name, **facts, "path": out.name})
            temporary.chmod(0o755)
            replace_directory(temporary, out)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return facts


def _given(source: Path, opened: OpenModel, staging: Path) -> Given:
    gguf = gguf_path(source)
    if gguf is None:
        return Given(source.resolve().name, opened, source)
    ids = sorted(opened.end_ids)
    tokenizer = opened.needed_tokenizer()
    roles = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    write_json(staging / CONFIG, {**registry.to_hf(opened.config), **roles})
    tokenizer.save(staging, opened.config.max_position_embeddings)
    if ids:
        write_json(staging / GENERATION, {**roles, "eos_token_id": ids})
    for name in (CARD, "LICENSE"):
        if (gguf.parent / name).is_file():
            shutil.copyfile(gguf.parent / name, staging / name)
    return Given(source.resolve().name.removesuffix(".gguf"), opened, staging)


def _read_text(path: Path) -> str:
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None


def _check_out(out: Path, source: Path) -> None:
    if out.resolve() == source.resolve() or out.resolve() in source.resolve().parents:
        raise UserError(f"--out {out} holds the model that is to be converted; give another folder")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / RECORD).is_file():
        raise UserError(f"--out {out} holds files that lalia convert did not write; give another folder or empty it")


# Writers, one for each kind of target


def _to_onnx(int8: bool) -> Callable[[Given, Path, str], dict[str, Any]]:
    def write(given: Given, folder: Path, text: str) -> dict[str, Any]:
        from lalia.formats.onnx.export import export_onnx
        from lalia.formats.onnx.run import OnnxModel, compare

        source, model = given.folder, given.open.model()
        path = folder / ("model_quantized.onnx" if int8 else "model.onnx")
        exported = export_onnx(model, path, int8=int8, **_pooling(source))
        _copy_companions(source, folder)
        sequences, bytes_per_token = _sequences(source, model, text)
        figures = compare(model, OnnxModel(path), sequences)
        if not int8 and figures["relative_error"] > TOLERANCE:
            raise UserError(
                f"the graph differs from the {model.config.family} model by {figures['relative_error']:.1e} of its "
                f"output, limit {TOLERANCE}: the ONNX writer does not know something that this model uses; use "
                "--to hf or a GGUF target"
            )
        for key in ("bits_per_token", "bits_per_token_before"):
            if key in figures and bytes_per_token:
                figures[key.replace("token", "byte")] = figures.pop(key) / bytes_per_token
        float_bytes = 4 * model.num_parameters()
        return {
            "task": exported.task,
            "files": [path.name for path in exported.files],
            "bytes": exported.num_bytes,
            "float32_bytes": float_bytes,
            **figures,
        }

    return write


def _to_gguf(kind: str) -> Callable[[Given, Path, str], dict[str, Any]]:
    def write(given: Given, folder: Path, text: str) -> dict[str, Any]:
        from lalia.formats.gguf.export import config_of, save_gguf, tokenizer_of

        del text
        path = folder / f"{given.name}.{kind}.gguf"
        # From the source's own tensors, one at a time, never the whole model.
        source = given.folder
        saved = save_gguf(path, config_of(source), given.open.source, tokenizer_of(source), kind, given.name)
        kinds = {stored: len(names) for stored, names in saved.kinds.items()}
        return {"files": [path.name], "bytes": saved.num_bytes, "tensors": kinds, "remarks": saved.remarks}

    return write


def _to_hf(given: Given, folder: Path, text: str) -> dict[str, Any]:
    del text
    source, model = given.folder, given.open.model()
    _copy_companions(source, folder)
    generation = read_json(source / GENERATION) if (source / GENERATION).is_file() else None
    save_model(model, folder, generation, ids=read_json(source / CONFIG))
    files = sorted(folder.glob("*.safetensors"))
    return {"files": [path.name for path in files], "bytes": sum(path.stat().st_size for path in files)}


TARGETS: dict[str, Target] = {
    "onnx": Target("ONNX in float32", _to_onnx(int8=False), ("onnx", "onnxruntime"), "onnx"),
    "onnx-int8": Target("ONNX in 8 bits", _to_onnx(int8=True), ("onnx", "onnxruntime"), "onnx"),
    "gguf-f16": Target("GGUF (llama.cpp) in float16", _to_gguf("F16")),
    "gguf-q8_0": Target("GGUF (llama.cpp) in 8 bits", _to_gguf("Q8_0")),
    "gguf-q4_0": Target("GGUF (llama.cpp) in 4 bits", _to_gguf("Q4_0")),
    "hf": Target("a Hugging Face folder with float32 safetensors", _to_hf),
}


def _copy_companions(source: Path, folder: Path) -> None:
    """config.json, tokenizer, settings."""
    for name in COMPANIONS:
        if (source / name).is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)
    shutil.copyfile(source / CONFIG, folder / CONFIG)


def _pooling(source: Path) -> dict[str, Any]:
    """How a sentence-transformers folder makes one vector of a text, as arguments of `export_onnx`.

    Raises:
        UserError: if it is a way that the graphs do not know.
    """
    pooling = read_pooling(source) or Pooling()
    named = {"mean": "mean", "cls": "first"}
    if len(pooling.modes) != 1 or pooling.modes[0] not in named:
        raise UserError(f"{source}: pooling by {', '.join(pooling.modes)}; ONNX graphs pool by mean or by cls")
    return {"pooling": named[pooling.modes[0]], "normalize": pooling.normalize}


def _sequences(source: Path, model: Any, text: str) -> tuple[list[list[int]], float]:
    """Token sequences to compare on, and their bytes per predicted token (0 where unknown)."""
    import torch

    c = model.config
    length = min(SEQUENCE_LENGTH, c.max_position_embeddings)
    if c.image_size is not None:
        raise UserError("a tower of images is exported by lalia.formats.onnx.export.export_onnx, not by convert")
    if not (source / "tokenizer.json").is_file():
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, c.vocab_size, (4, length), generator=generator).tolist(), 0.0
    tokenizer = Tokenizer.load(source)
    if not c.causal:
        lines = [line for line in text.splitlines() if line.strip()][:MAX_SEQUENCES]
        return [found.ids for found in tokenizer.encode_with_specials(lines, max_tokens=length)], 0.0
    ids = tokenizer.encode(text)
    pieces = [ids[start : start + length] for start in range(0, len(ids), length)][:MAX_SEQUENCES]
    pieces = [piece for piece in pieces if len(piece) > 1]
    if not pieces:
        raise UserError(f"the text to compare on has {len(ids)} tokens; give one of at least two")
    predicted = [i for piece in pieces for i in piece[1:]]
    return pieces, sum(len(tokenizer.token_bytes(i)) for i in predicted) / len(predicted)


# The card


def _card(given: Given, target: str, chosen: Target, facts: dict[str, Any]) -> str:
    """The source's card with a section on the conversion, or that section alone."""
    card = given.folder / CARD
    before = card.read_text(encoding="utf-8").rstrip() if card.is_file() else f"# {given.name}"
    lines = ["## Conversion", "", f"Made by Lalia {VERSION}: `lalia convert {given.name} --to {target}`.", ""]
    lines.append(f"- {chosen.what}: {', '.join(facts['files'])}, {facts['bytes']:,} bytes")
    lines += [f"- {line}" for line in report(facts)]
    return before + "\n\n" + "\n".join(lines) + "\n"


def report(facts: dict[str, Any]) -> list[str]:
    """What a conversion cost, in sentences."""
    lines = []
    if "relative_error" in facts:
        lines.append(
            f"differs from its source by at most {facts['max_difference']:.2g} (root mean square "
            f"{facts['relative_error']:.2g} of the deviation)"
        )
    if "top1_agreement" in facts:
        lines.append(f"the most probable token is the same in {facts['top1_agreement']:.1%} of the places")
    if "bits_per_byte" in facts:
        lines.append(f"bits per byte: {facts['bits_per_byte_before']:.4f} before, {facts['bits_per_byte']:.4f} after")
    if "cosine" in facts:
        lines.append(f"cosine of an embedding with its source's: at least {facts['cosine']:.5f}")
    if facts.get("float32_bytes"):
        lines.append(f"{facts['bytes'] / facts['float32_bytes']:.0%} of the float32 weights' bytes")
    return lines + [str(remark) for remark in facts.get("remarks", [])]
