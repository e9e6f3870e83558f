"""Write a model as a GGUF file: values and names as llama.cpp expects them, tensor by tensor."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lalia.errors import UserError
from lalia.files import read_json
from lalia.formats.gguf.architectures import EMBEDDING, HEAD, Architecture, architecture_of_model_type, pattern
from lalia.formats.gguf.config_in import config_values as read_back
from lalia.formats.gguf.config_out import config_metadata, rope_divisors
from lalia.formats.gguf.container_out import NewTensor, write_container
from lalia.formats.gguf.kinds import KINDS
from lalia.formats.gguf.quantize import WRITTEN, quantize
from lalia.formats.gguf.vocabulary import vocabulary_metadata
from lalia.formats.hf_folder import TOKEN_IDS, SafetensorFiles, read_config
from lalia.model.config import ModelConfig
from lalia.model.families import registry

FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32}
"""general.file_type: what most tensors are."""
KEPT_F32 = re.compile(r"norm|position_embd|token_types|ffn_gate_inp")
"""Names of the file whose tensors stay F32, as in llama.cpp: few values, or (the router) sensitive ones."""
SLICE_VALUES = 1 << 20
"""Values quantized at a time."""
NOT_IN_CONTEXT = {"family", "router_aux_loss_coef", "router_z_loss_coef", "sliding_window", "layer_types"}
"""Settings that may differ in the file: training's, and those compared layer by layer."""


class NamedTensors(Protocol):
    """Tensors under Hugging Face names; every `lalia.formats.weights.TensorSource` is such."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def tensor(self, name: str) -> Tensor: ...


class InMemory:
    """A `NamedTensors` of tensors that are in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]


@dataclass
class Saved:
    """What `save_gguf` wrote.

    Attributes:
        path: of the file.
        num_bytes: its size.
        kinds: kind -> names of the file's tensors that have it.
        remarks: what is not as one might think: other kinds than asked for, tensors left out, tokenizer differences.
    """

    path: Path
    num_bytes: int = 0
    kinds: dict[str, list[str]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def save_gguf(
    path: Path | str,
    config_values: Mapping[str, Any],
    tensors: NamedTensors | Mapping[str, Tensor],
    tokenizer_folder: Path | str | None,
    kind: str = "F16",
    name: str | None = None,
) -> Saved:
    """Write a model to a GGUF file. Memory stays near the largest tensor.

    Matrices are written as `kind`; norms, biases, position tables and routers as F32. With a quantized kind, the matrix
    that makes the logits (the head, or the embedding if they are one) is Q8_0, as errors there cost most, and a matrix
    whose rows are no multiple of 32 is F16, which `Saved.remarks` says.

    Args:
        config_values: content of config.json, of a family that llama.cpp has.
        tensors: the model folder's tensors, under its names.
        tokenizer_folder: with tokenizer.json; None writes a file that Lalia reads
            and llama.cpp's server does not.
        kind: one of `quantize.WRITTEN`.
        name: general.name; the file's stem by default.

    Raises:
        UserError: for a model or tokenizer that llama.cpp cannot express, naming what; for missing tensors, for NaN,
            infinity or values beyond the kind's range.
    """
    path = Path(path)
    if kind not in WRITTEN:
        raise UserError(f"kind = {kind!r} cannot be written; choose one of {', '.join(WRITTEN)}")
    source = InMemory(tensors) if isinstance(tensors, Mapping) else tensors
    architecture = architecture_of_model_type(config_values.get("model_type"))
    config = registry.from_hf(dict(config_values))
    values = registry.to_hf(config)
    saved = Saved(path)
    parts = _collect(architecture, config, source, saved)
    if architecture.name == "llama" and config.sliding_window is not None:
        saved.remarks.append(
            f"llama.cpp lets this architecture attend to everything, not to sliding_window = {config.sliding_window} "
            "tokens: it computes the same on texts up to that length only"
        )
    divisors = rope_divisors(values, architecture)
    metadata: dict[str, Any] = {
        "general.architecture": architecture.name,
        "general.type": "model",
        "general.name": name or path.stem,
        "general.file_type": FILE_TYPES[kind],
        **config_metadata(values, architecture),
    }
    if kind not in ("F32", "F16", "BF16"):
        metadata["general.quantization_version"] = 2
    # Shapes as a reader of the file will see them.
    shapes = {file_name: _file_shape(architecture, source, file_name, theirs) for file_name, theirs in parts.items()}
    _check_expressed(config, read_back(metadata, architecture.name, shapes, divisors))
    if tokenizer_folder is None:
        metadata["tokenizer.ggml.model"] = "none"
        saved.remarks.append("without a tokenizer: llama.cpp's server does not start with such a file")
    else:
        ids = {key: config_values.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        vocabulary, remarks = vocabulary_metadata(Path(tokenizer_folder), config.vocab_size, ids)
        metadata |= vocabulary
        saved.remarks += remarks
    new = []
    for file_name, theirs in parts.items():
        chosen = _choose_kind(file_name, shapes[file_name], kind, HEAD not in parts, saved)
        pieces = _Pieces(architecture, config, source, file_name, theirs, chosen)
        new.append(NewTensor(file_name, KINDS[chosen], shapes[file_name], pieces))
        saved.kinds.setdefault(chosen, []).append(file_name)
    if divisors is not None:
        stored = torch.from_numpy(divisors)
        new.append(
            NewTensor("rope_freqs.weight", KINDS["F32"], tuple(stored.shape), lambda: [stored.view(torch.uint8)])
        )
        saved.kinds.setdefault("F32", []).append("rope_freqs.weight")
    write_container(path, metadata, new)
    saved.num_bytes = path.stat().st_size
    return saved


def convert_folder(folder: Path | str, path: Path | str, kind: str = "F16") -> Saved:
    """Write a model folder (config.json, safetensors, tokenizer) to a GGUF file; see `save_gguf`.

    Raises:
        UserError: if there is no such folder, or for what `save_gguf` refuses.
        CorruptFile: if a file of the folder is damaged.
    """
    folder = Path(folder)
    read_config(folder)  # with the messages of a folder that is none
    with SafetensorFiles(folder) as files:
        return save_gguf(path, config_of(folder), files, tokenizer_of(folder), kind, name=folder.resolve().name)


def config_of(folder: Path) -> dict[str, Any]:
    """config.json, with the ids of generation_config.json: what ends the model's answers goes before config.json."""
    generation = folder / "generation_config.json"
    said = read_json(generation) if generation.is_file() else {}
    ids = {key: said[key] for key in TOKEN_IDS if said.get(key) is not None}
    return {**read_json(folder / "config.json"), **ids}


def tokenizer_of(folder: Path) -> Path | None:
    """The folder, if it has a tokenizer."""
    return folder if (folder / "tokenizer.json").is_file() else None


def _collect(
    architecture: Architecture, config: ModelConfig, source: NamedTensors, saved: Saved
) -> dict[str, list[str]]:
    """The file's tensors in its order: its name -> the model folder's, several if experts are stacked.

    Raises:
        UserError: naming tensors that are unknown, or missing.
    """
    rules = [
        (re.compile(re.escape(theirs).replace(r"\#", r"(?P<layer>\d+)").replace("%", r"(?P<expert>\d+)")), ours)
        for ours, theirs in architecture.tensors.items()
    ]
    found: dict[str, dict[int, str]] = {}
    unknown = []
    for name in source.names():
        plain = _plain_name(architecture, name)
        match, ours = next(((m, ours) for rule, ours in rules if (m := rule.fullmatch(plain))), (None, ""))
        if match is None:
            unknown.append(name)
            continue
        groups = match.groupdict()
        if ours == HEAD and config.tie_word_embeddings:
            continue  # the file has the embedding only
        found.setdefault(ours.replace("#", groups.get("layer") or ""), {})[int(groups.get("expert") or 0)] = name
    left_out = [name for name in unknown if _may_be_left_out(name)]
    unknown = [name for name in unknown if name not in left_out]
    if unknown:
        raise UserError(f"architecture {architecture.name!r} of GGUF has no place for {_listed(unknown)}")
    if left_out:
        saved.remarks.append(f"left out, as a GGUF file has no place for them: {_listed(left_out)}")
    missing = [EMBEDDING] if EMBEDDING not in found else []
    templates = {pattern(ours)[0] for ours in found}
    for layer in range(config.num_hidden_layers):
        for template in templates:
            ours = template.replace("#", str(layer))
            if "#" in template and ours not in found and not _in_some_layers(config, template):
                missing.append(ours)
    for ours, experts in found.items():
        expected = config.num_experts if "_exps." in ours else 1
        if sorted(experts) != list(range(expected)):
            missing.append(f"{ours} (experts {sorted(experts)} of {expected})")
    if missing:
        raise UserError(f"these tensors of the GGUF file have no source in the model: {_listed(missing)}")
    order = sorted(
        found, key=lambda ours: (pattern(ours)[1] if pattern(ours)[1] is not None else -1, ours != EMBEDDING)
    )
    return {ours: [name for _, name in sorted(found[ours].items())] for ours in order}


def _plain_name(architecture: Architecture, name: str) -> str:
    """Names of older files and of models with another head."""
    if architecture.name == "gpt2":
        return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
    if architecture.name == "grok" and name.endswith("norm.weight"):
        return name.removesuffix(".weight") + ".scale"
    return name.removeprefix("bert.") if architecture.name == "bert" else name


def _may_be_left_out(name: str) -> bool:
    """Buffers that repeat the config, and BERT's heads, for which llama.cpp has no tensors."""
    return bool(
        re.search(r"\.attn\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$|position_ids$|^cls\.|(^|\.)pooler\.", name)
    )


def _in_some_layers(config: ModelConfig, template: str) -> bool:
    """Whether a layer may lack a tensor that others have: experts and their router, or what stands in their place."""
    return bool(config.dense_layers) and re.match(r"blk\.#\.ffn_(gate|up|down|gate_inp)", template) is not None


def _file_shape(architecture: Architecture, source: NamedTensors, ours: str, theirs: list[str]) -> tuple[int, ...]:
    shape = source.shape(theirs[0])
    if pattern(ours)[0] in architecture.transposed:
        shape = shape[::-1]
    return (len(theirs), *shape) if "_exps." in ours else shape


def _choose_kind(name: str, shape: tuple[int, ...], kind: str, tied: bool, saved: Saved) -> str:
    if len(shape) == 1 or KEPT_F32.search(name):
        return "F32"
    if kind not in ("F32", "F16", "BF16") and name == (EMBEDDING if tied else HEAD):
        kind = "Q8_0"
    if shape[-1] % KINDS[kind].block_size:
        saved.remarks.append(f"{name} is F16: its rows of {shape[-1]} values are no multiple of {kind}'s block of 32")
        return "F16"
    return kind


class _Pieces:
    """The bytes of one of the file's tensors, made when they are written."""

    def __init__(
        self,
        architecture: Architecture,
        config: ModelConfig,
        source: NamedTensors,
        ours: str,
        theirs: list[str],
        kind: str,
    ) -> None:
        self.architecture, self.config, self.source = architecture, config, source
        self.ours, self.theirs, self.kind = ours, theirs, kind

    def __call__(self) -> Iterator[Tensor]:
        for name in self.theirs:
            rows = self._values(name)
            rows = rows.reshape(-1, rows.shape[-1])
            step = max(1, SLICE_VALUES // rows.shape[1])
            for start in range(0, len(rows), step):
                piece = rows[start : start + step].float().contiguous()
                if not bool(torch.isfinite(piece).all()):
                    raise UserError(f"NaN or infinity in {name}; the training run diverged: use an earlier checkpoint")
                try:
                    yield quantize(self.kind, piece)
                except UserError as error:
                    raise UserError(f"{name}: {error}") from None

    def _values(self, name: str) -> Tensor:
        """A tensor of the model folder, changed to what the file holds."""
        values = self.source.tensor(name).detach().to("cpu")
        architecture, ours = self.architecture, self.ours
        if architecture.interleaved and architecture.is_rotated(ours):
            c = self.config
            heads = c.num_attention_heads if ".attn_q." in ours else c.num_key_value_heads
            halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
            values = halves.transpose(1, 2).reshape(values.shape)
        if architecture.norm_offset and architecture.is_norm(ours):
            values = values.float() + 1.0
        return values.T if pattern(ours)[0] in architecture.transposed else values


def _check_expressed(config: ModelConfig, values: dict[str, Any]) -> None:
    """Refuse a model that would be another one when read back from the file.

    Raises:
        UserError: naming each setting and what it would become.
    """
    before, after = _meaning(config), _meaning(registry.from_hf(values))
    lost = [key for key in before if not _same(before[key], after.get(key))]
    if lost:
        listed = ", ".join(f"{key} = {before[key]!r} (would become {after.get(key)!r})" for key in lost)
        raise UserError(f"a GGUF file of architecture {values['model_type']!r} cannot express {listed}")


def _meaning(config: ModelConfig) -> dict[str, Any]:
    values = config.model_dump(exclude=NOT_IN_CONTEXT)
    values["attention_scale"] = config.attention_scale or config.head_dim**-0.5
    layers = range(config.num_hidden_layers)
    windows = values["window of each layer"] = [config.window_of_layer(layer) for layer in layers]
    if values.get("rope_theta_local") is None or None not in windows:
        values["rope_theta_local"] = values["rope_theta"]
    return values


def _same(one: Any, other: Any) -> bool:
    """Equal, numbers up to the precision of the file's float32."""
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= 1e-6 * max(abs(one), abs(other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return one == other


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
