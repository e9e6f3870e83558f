"""Between the separate tensors of a file and the fused weights of a `Transformer`."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from lalia.errors import CorruptFile, UserError
from lalia.model.config import ModelConfig
from lalia.model.families import registry
from lalia.model.families.family import Family, Piece
from lalia.model.transformer import Transformer


class TensorSource(Protocol):
    """An open file, or several, of named tensors in the spelling and layout of a Hugging Face folder."""

    @property
    def where(self) -> str:
        """What to call it in messages."""
        ...

    def names(self) -> list[str]:
        """Names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, known without reading it."""
        ...

    def kind(self, name: str) -> str:
        """Type on disk, such as F32 or Q4_1."""
        ...

    def tensor(self, name: str) -> Tensor:
        """The values, in a floating type; may be a view of the mapped file."""
        ...


NOT_FLOATS = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F8_E4M3", "F8_E5M2")


Reader = Callable[[Transformer, str, Sequence[tuple[str, Piece]]], nn.Parameter | None]
"""Makes a parameter, given its name and its pieces with their stored names, in a form of its own; None to leave it."""


def assemble(
    config: ModelConfig,
    source: TensorSource,
    dtype: torch.dtype,
    trainable: bool = False,
    reader: Reader | None = None,
) -> Transformer:
    """The model of `config` with the weights of `source`, in eval mode, computing in `dtype`.

    Names, shapes and types are compared with what the config asks for before memory is taken. A weight that is stored
    as it is used stays a view of the mapped file. `reader` may read some weights otherwise, as quantised ones are.

    Raises:
        CorruptFile: if weights are missing, left over, of another shape or type, or doubled; all are listed.
        UserError: if weights hold NaN or infinity.
    """
    family = registry.FAMILIES[config.family]
    stored = _canonical_names(config, family, source)
    if config.num_hidden_layers > len(stored):
        raise CorruptFile(
            f"{source.where}: {len(stored)} tensors cannot be {config.num_hidden_layers} layers; config and weights "
            "are not of the same model"
        )
    with torch.device("meta"):  # no memory and no initialisation: every weight is replaced below
        model = Transformer(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    pieces = {name: family.pieces(config, name, shape) for name, shape in shapes.items()}
    _check_tensors(config, source, stored, pieces)
    state: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        made = reader and reader(model, name, [(stored[piece.name], piece) for piece in pieces[name]])
        state[name] = _read(source, stored, pieces[name], shape, dtype) if made is None else made
    head = stored.get("lm_head.weight") if config.tie_word_embeddings else None
    embedding = stored[pieces["embedding.weight"][0].name] if head is not None else ""
    if head is not None and not torch.equal(source.tensor(head).to(dtype), source.tensor(embedding).to(dtype)):
        raise CorruptFile(
            f"{source.where}: tie_word_embeddings = true, but {head} differs from the embedding; set it to false "
            "in config.json if the head is a weight of its own"
        )
    plain = {name: weight for name, weight in state.items() if not isinstance(weight, nn.Parameter)}
    bad = [stored[pieces[name][0].name] for name, weight in plain.items() if not _finite(weight)]
    if bad:
        kind = str(dtype).removeprefix("torch.")
        raise UserError(
            f"{source.where}: NaN or infinity in {listed(bad)} (read as {kind}); the training run diverged or the "
            "dtype is too narrow: use an earlier checkpoint or a wider dtype"
        )
    model.load_state_dict(plain, assign=True, strict=len(plain) == len(state))
    for name, weight in state.items():
        if isinstance(weight, nn.Parameter):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, weight)
    model.compute_dtype = dtype
    return model.requires_grad_(trainable).eval()


def disassemble(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """(name in a model folder, tensor in its layout) of every weight, as views where possible, in the model's order."""
    family = registry.FAMILIES[model.config.family]
    for parameter, weight in model.named_parameters():
        matrix = weight.detach().flatten(0, -2) if weight.dim() == 3 else weight.detach()
        for piece in family.pieces(model.config, parameter, tuple(weight.shape)):
            part = matrix[piece.start : piece.end]
            part = part.t() if piece.transposed else part.view(piece.shape)
            yield family.stored(model.config, piece.name), part


def listed(names: Iterable[str]) -> str:
    """Up to eight names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _canonical_names(config: ModelConfig, family: Family, source: TensorSource) -> dict[str, str]:
    """Canonical name -> stored name, for the tensors that mean something."""
    stored: dict[str, str] = {}
    for name in source.names():
        canonical = family.canonical(config, name)
        if canonical is None or canonical.endswith(".rotary_emb.inv_freq"):  # old Llama files carry frequencies
            continue
        if canonical in stored:
            raise CorruptFile(f"{source.where}: {name} and {stored[canonical]} are the same weight; remove one")
        stored[canonical] = name
    return stored


def _check_tensors(
    config: ModelConfig, source: TensorSource, stored: dict[str, str], pieces: dict[str, list[Piece]]
) -> None:
    """Hold names, shapes and types of the stored tensors against those the config asks for; all problems at once."""
    expected = {piece.name: piece.shape for parts in pieces.values() for piece in parts}
    missing = [name for name in expected if name not in stored]
    tied = "head.weight" not in pieces  # then the head may be stored a second time
    extra = [stored[name] for name in stored if name not in expected and not (name == "lm_head.weight" and tied)]
    wrong = []
    for canonical in expected.keys() & stored.keys():
        name = stored[canonical]
        shape, kind = source.shape(name), source.kind(name)
        if shape != expected[canonical]:
            wrong.append(f"{name} has shape {list(shape)}, expected {list(expected[canonical])}")
        elif kind in NOT_FLOATS:
            wrong.append(f"{name} is {kind}, expected a floating type of at least 16 bits")
    problems = [
        f"{what} {listed(names)}"
        for what, names in (
            ("missing weights:", missing),
            ("unknown weights:", extra),
            ("wrong weights:", sorted(wrong)),
        )
        if names
    ]
    if problems:
        raise CorruptFile(
            f"{source.where}: weights and config disagree; {'; '.join(problems)}. Take both from the same model"
        )


def _read(
    source: TensorSource, stored: dict[str, str], pieces: list[Piece], shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    first = pieces[0]
    if len(pieces) == 1 and not first.transposed:
        return source.tensor(stored[first.name]).to(dtype).reshape(shape)
    weight = torch.empty(shape, dtype=dtype)
    rows = weight.flatten(0, -2) if weight.dim() == 3 else weight
    for piece in pieces:
        tensor = source.tensor(stored[piece.name])
        rows[piece.start : piece.end] = tensor.t() if piece.transposed and tensor.dim() == 2 else tensor
    return weight


def _finite(weight: Tensor) -> bool:
    # A sum is not finite if a term is not; one that overflows by itself is looked at term by term.
    return bool(torch.isfinite(weight.sum(dtype=torch.float32))) or bool(torch.isfinite(weight).all())
