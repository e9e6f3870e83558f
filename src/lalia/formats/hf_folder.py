"""The model folder of the ecosystem: config.json, model.safetensors, generation_config.json, tokenizer files.

What `save_model` writes, transformers, vLLM and llama.cpp's converter read as it stands; what they publish for the
families of `lalia.model.families`, `load_model` reads. Weights are safetensors only: a pickle may run code.
"""

import contextlib
import difflib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lalia.errors import CorruptFile, UserError
from lalia.files import write_json
from lalia.model.config import ModelConfig
from lalia.model.families import registry
from lalia.model.families.family import Piece
from lalia.model.transformer import Transformer
from lalia.tokenizer.bpe import Tokenizer

CONFIG, WEIGHTS, INDEX, GENERATION = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "generation_config.json",
)
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def save_model(
    model: Transformer, folder: Path, generation: Mapping[str, Any] | None = None, dtype: torch.dtype = torch.float32
) -> None:
    """Write config.json, model.safetensors and, with `generation`, generation_config.json.

    Each file is whole or absent; config.json, without which nothing is a model folder, comes last. Other files in the
    folder, such as the tokenizer's, stay.

    Args:
        folder: created if missing.
        generation: content of generation_config.json: eos_token_id (an id or a list), bos_token_id, pad_token_id,
            temperature and so on. The three ids also go into config.json, null where not given.
        dtype: of the weights on disk: float32, bfloat16 or float16.

    Raises:
        UserError: if the family's config.json cannot express the model's config.
    """
    values = registry.to_hf(model.config)
    family = registry.FAMILIES[model.config.family]
    tensors: dict[str, Tensor] = {}
    for parameter, weight in model.named_parameters():
        for piece in family.pieces(model.config, parameter, weight.shape[0]):
            # A copy, because safetensors refuses tensors that share memory, as the pieces of one weight do.
            tensors[piece.name] = weight.detach()[piece.start : piece.end].to("cpu", dtype, copy=True).contiguous()
    _write_tensors(folder / WEIGHTS, tensors)
    generation = dict(generation or {})
    if generation:
        write_json(folder / GENERATION, generation)
    ids = {key: generation.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    # transformers 4 reads torch_dtype, transformers 5 dtype.
    write_json(folder / CONFIG, {**values, **ids, "dtype": DTYPES[dtype], "torch_dtype": DTYPES[dtype]})


def load_model(folder: Path, dtype: torch.dtype = torch.float32, trainable: bool = False) -> Transformer:
    """The model of a folder, in eval mode, computing in `dtype`.

    Args:
        dtype: of the weights in memory, whatever the file has, and of the activations (`compute_dtype`).
        trainable: whether the weights require gradients.

    Raises:
        UserError: if there is no such folder, config.json or model.safetensors, if the model is of a kind that is not
            implemented, or if its weights hold NaN or infinity.
        CorruptFile: if a file is cut short or does not parse, or if weights are missing, left over or of another
            shape than config.json says. The message lists them.
    """
    config = read_config(folder)
    with torch.device("meta"):  # no memory and no initialisation: every weight is replaced below
        model = Transformer(config)
    family = registry.FAMILIES[config.family]
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    pieces = {name: family.pieces(config, name, shape[0]) for name, shape in shapes.items()}
    with contextlib.ExitStack() as stack:
        files = [_open(path, stack) for path in _weight_paths(folder)]
        stored = {name: file for file in files for name in list(file.keys())}
        _check_tensors(folder, stored, shapes, pieces)
        state: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            state[name] = torch.empty(shape, dtype=dtype)
            for piece in pieces[name]:
                state[name][piece.start : piece.end] = stored[piece.name].get_tensor(piece.name)
        if "lm_head.weight" in stored and config.tie_word_embeddings:
            head = stored["lm_head.weight"].get_tensor("lm_head.weight").to(dtype)
            if not torch.equal(head, state["embedding.weight"]):
                raise CorruptFile(
                    f"{folder}: tie_word_embeddings = true in {CONFIG}, but lm_head.weight differs from the embedding; "
                    "set it to false if the head is a weight of its own"
                )
    bad = [pieces[name][0].name for name, weight in state.items() if not bool(torch.isfinite(weight).all())]
    if bad:
        raise UserError(
            f"{folder}: NaN or infinity in {_listed(bad)} (read as {DTYPES[dtype]}); the training run diverged or the "
            "dtype is too narrow: use an earlier checkpoint or a wider dtype"
        )
    model.load_state_dict(state, assign=True)
    model.compute_dtype = dtype
    return model.requires_grad_(trainable).eval()


def load_folder(
    folder: Path, dtype: torch.dtype = torch.float32, trainable: bool = False
) -> tuple[Transformer, Tokenizer]:
    """`load_model` and the tokenizer beside it.

    Raises:
        UserError: also if there is no tokenizer, or it has more tokens than the model has embeddings. Fewer are
            allowed: embeddings are often padded to a round number.
    """
    config = read_config(folder)
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens but {CONFIG} says vocab_size = "
            f"{config.vocab_size}; this tokenizer belongs to another model"
        )
    return load_model(folder, dtype, trainable), tokenizer


def read_config(folder: Path) -> ModelConfig:
    """The config of a model folder, without reading weights.

    Raises:
        UserError: if there is no such folder or config.json (names near it are offered), or the model is of a kind
            that is not implemented.
        CorruptFile: if config.json does not parse.
    """
    _check_folder(folder)
    path = folder / CONFIG
    if not path.is_file():
        inside = [child.name for child in sorted(folder.iterdir()) if (child / CONFIG).is_file()]
        hint = f"it holds the model folders {', '.join(inside)}" if inside else "a model folder has one"
        raise UserError(f"{folder} has no {CONFIG}; {hint}")
    values = _read_object(path)
    try:
        return registry.from_hf(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _check_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    if folder.exists():
        raise UserError(f"{folder} is a file; give the folder that holds {CONFIG}")
    if not folder.parent.is_dir():
        raise UserError(
            f"there is no folder {folder} (nor {folder.parent}); give the path of a model folder. Lalia downloads "
            "nothing: fetch a published model first"
        )
    siblings = sorted(child.name for child in folder.parent.iterdir() if child.is_dir())
    near = difflib.get_close_matches(folder.name, siblings, n=3, cutoff=0.4) or siblings[:5]
    hint = f"did you mean {' or '.join(str(folder.parent / name) for name in near)}?" if near else "it is empty there"
    raise UserError(f"there is no folder {folder}; {hint}")


def _read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise CorruptFile(f"{path} is not valid JSON ({error}); copy or make the model folder again") from None
    if not isinstance(values, dict):
        raise CorruptFile(f"{path} holds {type(values).__name__}, expected an object; copy or make the folder again")
    return values


def _weight_paths(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        weight_map = _read_object(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CorruptFile(f"{folder / INDEX} has no weight_map; copy the model folder again")
        names = sorted({str(name) for name in weight_map.values()})
        outside = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
        if outside:
            raise UserError(f"{folder / INDEX} names {_listed(outside)}; expected .safetensors files beside it")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CorruptFile(f"{folder} lacks {_listed(missing)}, which {INDEX} names; copy the model folder again")
        return [folder / name for name in names]
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder} has its weights only as {_listed(pickles)}, a pickle, which can run code when read; convert it "
            f"where you trust it (transformers: save_pretrained writes {WEIGHTS}), or get the safetensors version"
        )
    raise UserError(f"{folder} has neither {WEIGHTS} nor {INDEX}; the download or the training run did not finish")


def _open(path: Path, stack: contextlib.ExitStack) -> Any:
    """The open safetensors file; its tensors are views of the mapped file."""
    try:
        return stack.enter_context(safe_open(path, framework="pt"))
    except (SafetensorError, OSError, ValueError) as error:  # an empty file cannot be mapped
        raise CorruptFile(
            f"{path} ({path.stat().st_size} bytes) is cut short or no safetensors file ({error}); copy or make it again"
        ) from None


def _check_tensors(
    folder: Path, stored: dict[str, Any], shapes: dict[str, tuple[int, ...]], pieces: dict[str, list[Piece]]
) -> None:
    """Hold names, shapes and types of the stored tensors against those the config asks for; all problems at once."""
    expected = {
        piece.name: (piece.end - piece.start, *shape[1:]) for name, shape in shapes.items() for piece in pieces[name]
    }
    missing = [name for name in expected if name not in stored]
    # A tied head may be stored twice; old Llama files carry rotary frequencies.
    extra = [name for name in stored if name not in expected and not _redundant(name, "head.weight" in shapes)]
    wrong = []
    for name in expected.keys() & stored.keys():
        tensor = stored[name].get_slice(name)
        shape, kind = tuple(tensor.get_shape()), tensor.get_dtype()
        if shape != expected[name]:
            wrong.append(f"{name} has shape {list(shape)}, expected {list(expected[name])}")
        elif kind not in FLOAT_DTYPES:
            wrong.append(f"{name} is {kind}, expected one of {', '.join(FLOAT_DTYPES)}")
    problems = [
        f"{what} {_listed(names)}"
        for what, names in (
            ("missing weights:", missing),
            ("unknown weights:", extra),
            ("wrong weights:", sorted(wrong)),
        )
        if names
    ]
    if problems:
        raise CorruptFile(
            f"{folder}: weights and {CONFIG} disagree; {'; '.join(problems)}. Take both from the same model"
        )


def _redundant(name: str, untied: bool) -> bool:
    return name.endswith(".rotary_emb.inv_freq") or (name == "lm_head.weight" and not untied)


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file through a temporary neighbour, fsync and rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    temporary = Path(name)
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        code = re.search(r"os error (\d+)", str(error)) if isinstance(error, SafetensorError) else None
        if code:  # a full disk is an OSError everywhere else
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
        raise
