"""What a sentence-transformers folder says beside the model: how token vectors become one vector for a text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from lalia.errors import CorruptFile, UserError
from lalia.files import read_json

MODULES, TRANSFORMER_SETTINGS, PROMPTS = (
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)
Mode = Literal["mean", "cls", "max", "lasttoken"]
MODES: tuple[Mode, ...] = get_args(Mode)
# Before version 5.4 a switch for each mode, afterwards one key.
SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True)
class Pooling:
    """From the vectors of a text's tokens to one vector.

    Attributes:
        modes: mean of all tokens (specials included, padding not), the first (cls), the maximum of each dimension, or
            the last token; the vectors of several modes are laid end to end.
        normalize: scale to length one, so that the dot product of two is the cosine of their angle.
        max_length: longest text in tokens, specials included; None means the model's context.
        prompt: put before every text.
    """

    modes: tuple[Mode, ...] = ("mean",)
    normalize: bool = True
    max_length: int | None = None
    prompt: str = ""


def read_pooling(folder: Path) -> Pooling | None:
    """The pooling of a sentence-transformers folder; None if it is none (it has no modules.json).

    Raises:
        UserError: if the folder asks for a module, a pooling mode or a setting that is not implemented.
        CorruptFile: if one of its files does not parse.
    """
    if not (folder / MODULES).is_file():
        return None
    modules = read_json(folder / MODULES)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise CorruptFile(f"{folder / MODULES} is not a list of objects; copy the model folder again")
    kinds = [str(module.get("type")).rpartition(".")[2] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UserError(
            f"{folder / MODULES} lists the modules {', '.join(kinds)}; Lalia computes Transformer, Pooling and, if "
            "wanted, Normalize, in this order"
        )
    if modules[0].get("path", ""):
        raise UserError(
            f"{folder / MODULES} has its model in the subfolder {modules[0]['path']!r}; move its files beside "
            f"{MODULES} and set that path to ''"
        )
    settings = _object(folder / TRANSFORMER_SETTINGS)
    if settings.get("do_lower_case"):
        raise UserError(
            f"{folder / TRANSFORMER_SETTINGS}: do_lower_case = true is not implemented; let the normalizer of "
            "tokenizer.json lower the case"
        )
    length = settings.get("max_seq_length")
    if length is None:
        length = _object(folder / "tokenizer_config.json").get("model_max_length")
        length = length if isinstance(length, int) and length < 10**9 else None  # 10**30 stands for none
    if length is not None and (type(length) is not int or length < 1):
        raise CorruptFile(f"{folder}: max_seq_length = {length!r}; expected a positive integer")
    return Pooling(
        _modes(folder / str(modules[1].get("path")) / "config.json"), "Normalize" in kinds, length, _prompt(folder)
    )


def _modes(path: Path) -> tuple[Mode, ...]:
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise CorruptFile(f"{path} is no JSON object; copy the model folder again")
    if settings.get("include_prompt") is False:
        raise UserError(f"{path}: include_prompt = false is not implemented; Lalia pools over all tokens")
    named = settings.get("pooling_mode")
    if named is None:
        named = [mode for switch, mode in SWITCHES.items() if settings.get(switch)]
    modes = [named] if isinstance(named, str) else list(named)
    if not modes or not set(modes) <= set(MODES):
        raise UserError(
            f"{path}: pooling {', '.join(map(str, modes)) or 'by no mode'}; known modes: {', '.join(MODES)}"
        )
    return cast(tuple[Mode, ...], tuple(modes))


def _prompt(folder: Path) -> str:
    """The text that the folder puts before every text; sentence-transformers does so only where a default is named."""
    settings = _object(folder / PROMPTS)
    name = settings.get("default_prompt_name")
    prompts = settings.get("prompts") or {}
    if name is None:
        return ""
    if not isinstance(prompts, dict) or not isinstance(prompts.get(name), str):
        raise CorruptFile(f"{folder / PROMPTS}: default_prompt_name = {name!r} is none of its prompts")
    return prompts[name]


def _object(path: Path) -> dict[str, Any]:
    values = read_json(path) if path.is_file() else {}
    if not isinstance(values, dict):
        raise CorruptFile(f"{path} is no JSON object; copy the model folder again")
    return values
