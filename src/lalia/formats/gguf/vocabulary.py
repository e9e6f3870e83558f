"""From a tokenizer folder to the tokenizer metadata of a GGUF file.

llama.cpp does not read split patterns: it knows some published ones by name ("pre"). A tokenizer whose pattern is not
among them is refused, because llama.cpp would split, and so encode, differently.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend

from lalia.errors import CorruptFile, UserError
from lalia.files import read_json
from lalia.tokenizer.bpe import Tokenizer
from lalia.tokenizer.patterns import GPT2, SPLITS

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5

PRE_BY_SPLIT = {
    SPLITS["gpt2"]: "gpt-2",
    SPLITS["smollm"]: "smollm",
    SPLITS["qwen2"]: "qwen2",
    SPLITS["llama3"]: "llama-bpe",
}
WITHOUT_MERGES = ("llama-bpe",)
"""Pre-tokenizers with which llama.cpp takes a whole word that is a token, whatever its merges (ignore_merges)."""


def vocabulary_metadata(folder: Path, vocab_size: int, ids: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Metadata of the tokenizer in `folder` (byte-level BPE), and remarks on what llama.cpp will do otherwise.

    Args:
        vocab_size: rows of the embedding; ids without a token are filled with unused ones.
        ids: bos_token_id, eos_token_id (an id or several) and pad_token_id of config.json, for what
            tokenizer_config.json does not name; of several eos ids a second becomes llama.cpp's eot.

    Raises:
        UserError: for a tokenizer that llama.cpp has no equivalent of, naming what differs.
        CorruptFile: if a file does not parse.
    """
    tokenizer = Tokenizer.load(folder)
    path = folder / "tokenizer.json"
    content = read_json(path)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens but the model {vocab_size} embeddings; this "
            "tokenizer belongs to another model"
        )
    try:
        pre, remarks = _pre_tokenizer(content)
        tokens, types = _tokens(content, vocab_size)
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptFile(f"{path} is no usable tokenizer ({error!r}); fetch it or run tokenize again") from None
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.merges": merges,
        **_special_ids(tokenizer, folder, ids),
        **_ends(path),
    }
    if tokenizer.chat_template is not None:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    return metadata, remarks


def _pre_tokenizer(content: dict[str, Any]) -> tuple[str, list[str]]:
    """llama.cpp's name of the pre-tokenizer of a tokenizer.json, and remarks."""
    model = content["model"]
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        raise UserError("it is no byte-level BPE, the only kind that is written to GGUF")
    used = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    if used:
        raise UserError(f"its model has {', '.join(f'{key} = {model[key]!r}' for key in used)}; llama.cpp does not")
    steps = content.get("pre_tokenizer") or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    pre = PRE_BY_SPLIT.get(_splits(steps))
    if pre is None:
        raise UserError(
            f"its pre-tokenizer {json.dumps(steps)[:400]} has no name in llama.cpp that Lalia knows; known are "
            f"{', '.join(PRE_BY_SPLIT.values())}"
        )
    if bool(model.get("ignore_merges")) != (pre in WITHOUT_MERGES):
        raise UserError(
            f"ignore_merges = {bool(model.get('ignore_merges'))}, but llama.cpp takes {pre in WITHOUT_MERGES} for "
            f"its pre-tokenizer {pre!r}"
        )
    remarks = []
    normalizer = (content.get("normalizer") or {}).get("type")
    if normalizer == "NFC":
        remarks.append("the tokenizer composes characters (NFC) before encoding; llama.cpp does not")
    elif normalizer is not None:
        raise UserError(f"its normalizer {normalizer} has no equivalent in llama.cpp")
    stripping = [t["content"] for t in content.get("added_tokens", ()) if t.get("lstrip") or t.get("rstrip")]
    if stripping:
        remarks.append(f"{', '.join(stripping[:8])}: the tokenizer takes the spaces beside them in, llama.cpp may not")
    return pre, remarks


def _splits(steps: list[dict[str, Any]]) -> tuple[str, ...]:
    """The patterns that cut a text, one after the other; () where something else is done to it, too."""
    patterns: list[str] = []
    for step in steps[:-1]:
        if step.get("type") == "Digits" and step.get("individual_digits"):
            patterns.append(r"\p{N}")
        elif step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            patterns.append(step["pattern"].get("Regex", ""))
        else:
            return ()
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return ()
    return (*patterns, GPT2) if last.get("use_regex", True) else tuple(patterns)


def _tokens(content: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Text and type of every id."""
    tokens: list[str | None] = [None] * vocab_size
    types = [UNUSED] * vocab_size
    for text, i in content["model"]["vocab"].items():
        tokens[i], types[i] = text, NORMAL
    for added in content.get("added_tokens", ()):
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added.get("special") else USER_DEFINED
    return [f"[PAD{i}]" if text is None else text for i, text in enumerate(tokens)], types


def _special_ids(tokenizer: Tokenizer, folder: Path, ids: dict[str, Any]) -> dict[str, Any]:
    settings_path = folder / "tokenizer_config.json"
    settings = read_json(settings_path) if settings_path.is_file() else {}
    metadata: dict[str, Any] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        text = settings.get(f"{name}_token")
        text = text.get("content") if isinstance(text, dict) else text
        given = ids.get(f"{name}_token_id")
        candidates = [
            *([tokenizer.special[text]] if isinstance(text, str) and text in tokenizer.special else []),
            *(given if isinstance(given, list) else [] if given is None else [given]),
        ]
        if candidates:
            metadata[f"tokenizer.ggml.{key}_token_id"] = candidates[0]
        others = [i for i in candidates if i != candidates[0]]
        if name == "eos" and isinstance(given, list) and others:
            metadata["tokenizer.ggml.eot_token_id"] = others[0]
    return metadata


def _ends(path: Path) -> dict[str, bool]:
    """Whether the tokenizer puts a special token before and behind a text, seen by encoding one."""
    backend = Backend.from_file(str(path))
    plain = len(backend.encode("a", add_special_tokens=False).ids)
    mask = backend.encode("a").special_tokens_mask
    first = len(mask) > plain and mask[0] == 1
    last = len(mask) > plain and mask[-1] == 1
    return {"tokenizer.ggml.add_bos_token": first, "tokenizer.ggml.add_eos_token": last}
