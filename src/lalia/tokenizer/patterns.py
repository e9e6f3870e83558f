"""The regular expressions, as published, that cut text into the words which BPE merges may not cross.

`pre_tokenizer(name)` gives the `pre_tokenizer` part of a tokenizer.json. The expressions are in the dialect of the
`tokenizers` library (Oniguruma): there `$` is the end of a line, so the end of a text is written `\\z`, and `{1,3}+`
would mean a repetition.
"""

from typing import Any

from lalia.errors import UserError

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""Published with GPT-2."""
QWEN2 = (
    rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Published with Qwen2; llama.cpp knows it as the pre-tokenizer "qwen2"."""
LLAMA3 = QWEN2.replace(r"\p{N}| ?", r"\p{N}{1,3}| ?")
"""Published with Llama 3: as Qwen2's, but up to three digits together."""
CL100K = LLAMA3.replace(r"|\s*[\r\n]+|", r"|\s++\z|\s*[\r\n]+|")
"""Published with GPT-4, in the form of tiktoken 0.8 and later, which keeps white space at the end together."""
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Published with GPT-4o."""
TEKKEN = O200K.replace(CONTRACTIONS + "?", "").replace(r"\p{N}{1,3}", r"\p{N}")
"""Published with Mistral's Tekken."""
_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|]+"

# One expression per step; a step cuts within the pieces of the step before it.
SPLITS: dict[str, tuple[str, ...]] = {
    "gpt2": (GPT2,),
    "qwen2": (QWEN2,),
    "llama3": (LLAMA3,),
    "cl100k_base": (CL100K,),
    "o200k_base": (O200K,),
    "tekken": (TEKKEN,),
    "smollm": (r"\p{N}", GPT2),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"),
    "default": (_PUNCTUATION, GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}
"""Names of Lalia for the known ways to cut."""

TIKTOKEN_NAMES = {
    "gpt2": "gpt2", "r50k_base": "gpt2", "p50k_base": "gpt2", "cl100k_base": "cl100k_base",
    "o200k_base": "o200k_base", "llama3": "llama3", "qwen": "qwen2", "qwen2": "qwen2", "tekken": "tekken",
}  # fmt: skip
"""Names of tiktoken's encodings, and of model families that publish ranks."""

GGUF_NAMES = {
    "default": "default",
    **dict.fromkeys(["llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "dbrx", "smaug-bpe", "glm4",
                     "chatglm-bpe", "lfm2"], "llama3"),
    **dict.fromkeys(["qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez", "grok-2"], "qwen2"),
    **dict.fromkeys(["gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "modern-bert", "mellum",
                     "jina-v1-en", "jina-v2-code", "jina-v2-es", "jina-v2-de", "roberta-bpe", "gigachat"], "gpt2"),
    **dict.fromkeys(["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"], "smollm"),
    **dict.fromkeys(["gpt-4o", "llama4"], "o200k_base"),
    "tekken": "tekken",
    "falcon": "falcon",
    **dict.fromkeys(["deepseek-v3", "hunyuan-dense"], "deepseek-v3"),
}  # fmt: skip
"""Values of `tokenizer.ggml.pre` in GGUF files."""

WHOLE_WORDS_FIRST = {"llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "lfm2", "tekken"}
"""Values of `tokenizer.ggml.pre` whose tokenizer takes a word that is a token as it is, without merges."""
BEGINS_WITH_BOS = {*WHOLE_WORDS_FIRST}
"""Values of `tokenizer.ggml.pre` for which a text begins with bos unless the file says otherwise."""


def split_name(name: str, names: dict[str, str], what: str) -> str:
    """Look up a published name.

    Raises:
        UserError: if it is not in the table, with the names that are.
    """
    if name not in names:
        raise UserError(f"{what} {name!r} is not known; known: {', '.join(sorted(names))}")
    return names[name]


def pre_tokenizer(name: str) -> dict[str, Any]:
    """The `pre_tokenizer` of a byte-level tokenizer.json that cuts as `SPLITS[name]`."""
    steps = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in SPLITS[name]
    ]
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [*steps, to_bytes]}
