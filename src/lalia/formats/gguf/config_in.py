"""From the metadata of a GGUF file to the content of an equivalent config.json, in the spelling of transformers 5."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lalia.errors import CorruptFile, UserError

SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
"""The one size of each whose attention scale is (hidden_size / heads) ** -0.5; llama.cpp, too, tells it by this."""


FLOAT32_MAX = float(np.finfo(np.float32).max)


class Keys:
    """The metadata of one architecture, each value checked for its type."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """
        Args:
            shapes: of the file's tensors, under the file's names.
        """
        self.metadata, self.architecture, self.shapes = metadata, architecture, shapes

    def raw(self, key: str, default: Any = None) -> Any:
        """Whatever the file has."""
        value = self.metadata.get(f"{self.architecture}.{key}")
        return default if value is None else value

    def get(self, key: str, default: Any = None) -> Any:
        """A number, flag or text; CorruptFile for an array."""
        value = self.raw(key, default)
        if isinstance(value, np.ndarray | list):
            raise CorruptFile(f"{self.architecture}.{key} is an array, expected one value")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer; an array with one value per layer must have the same one in each."""
        value = self.raw(key, default)
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.size:
            if (value != value[0]).any():
                raise UserError(f"{self.architecture}.{key} differs from layer to layer, which is not implemented")
            value = int(value[0])
        if type(value) is not int or not 0 < value < 1 << 31:
            raise CorruptFile(f"{self.architecture}.{key} = {value!r}, expected a positive integer")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A positive number. float32 in the file, here the shortest decimal that is the same float32: 1e-05, not
        9.999999747378752e-06."""
        value = self.get(key, default)
        if type(value) not in (int, float) or not 0 < value < FLOAT32_MAX:
            raise CorruptFile(f"{self.architecture}.{key} = {value!r}, expected a positive number")
        return float(str(np.float32(value)))

    def optional_real(self, key: str) -> float | None:
        """`real`, or None where the file has none or 0."""
        return None if self.get(key) in (None, 0, 0.0) else self.real(key)

    def layers(self) -> int:
        """block_count; each layer has tensors, so there are not more layers than tensors."""
        count = self.integer("block_count")
        if count > len(self.shapes):
            raise CorruptFile(f"{self.architecture}.block_count = {count}, but it has {len(self.shapes)} tensors")
        return count

    def rows(self, tensor: str) -> int:
        """First dimension of a tensor."""
        if tensor not in self.shapes:
            raise CorruptFile(f"it has no tensor {tensor}")
        return self.shapes[tensor][0]


def config_values(
    metadata: Mapping[str, Any],
    architecture: str,
    shapes: Mapping[str, tuple[int, ...]],
    rope_divisors: np.ndarray | None = None,
) -> dict[str, Any]:
    """Content of config.json.

    Args:
        architecture: a known one.
        shapes: of the file's tensors, under the file's names.
        rope_divisors: the tensor rope_freqs.weight, if there is one.

    Raises:
        CorruptFile: for a key that is missing or of another type.
        UserError: for what config.json cannot say.
    """
    keys = Keys(metadata, architecture, shapes)
    readers: dict[str, Callable[[Keys], dict[str, Any]]] = {
        "llama": _llama,
        "gpt2": _gpt2,
        "phi2": _phi2,
        "gemma": _gemma,
        "gemma2": _gemma2,
        "gemma3": _gemma3,
        "qwen2": _qwen2,
        "qwen3": _qwen3,
        "qwen3moe": _qwen3_moe,
        "bert": _bert,
        "grok": _grok,
    }
    values = readers[architecture](keys)
    if rope_divisors is not None:
        rope = values.get("rope_parameters", {})
        if architecture != "llama" or rope["rope_type"] != "default":
            raise UserError(f"a tensor rope_freqs.weight is not implemented for {architecture!r} with {rope}")
        rope |= _llama3_scaling(rope_divisors, rope["rope_theta"])
    return values | _token_ids(metadata)


def _token_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    ids: dict[str, Any] = {}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        value = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if value is not None and type(value) is not int:
            raise CorruptFile(f"tokenizer.ggml.{theirs}_token_id = {value!r}, expected an integer")
        ids[f"{ours}_token_id"] = value
    return ids


def _base(keys: Keys, model_type: str, class_name: str) -> dict[str, Any]:
    """What all architectures share but GPT-2, which spells it in its own way."""
    hidden, heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    head_dim = keys.integer("attention.key_length", max(hidden // heads, 1))
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise UserError("keys and values of different lengths are not implemented")
    return {
        "architectures": [class_name],
        "model_type": model_type,
        "vocab_size": keys.rows("token_embd.weight"),
        "hidden_size": hidden,
        "num_hidden_layers": keys.layers(),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": keys.integer("feed_forward_length"),
        "max_position_embeddings": keys.integer("context_length"),
        "tie_word_embeddings": "output.weight" not in keys.shapes,
    }


def _llama_like(keys: Keys, model_type: str, class_name: str, theta: float = 10_000.0) -> dict[str, Any]:
    values = _base(keys, model_type, class_name)
    if keys.integer("rope.dimension_count", values["head_dim"]) != values["head_dim"]:
        raise UserError(f"{keys.architecture}.rope.dimension_count is not the head's, which is not implemented")
    return values | {
        "rms_norm_eps": keys.real("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in keys.shapes,
        "rope_parameters": _rope(keys, theta),
    }


def _rope(keys: Keys, theta: float = 10_000.0) -> dict[str, Any]:
    """rope_parameters; YaRN's and linear scaling are in the metadata, llama3's in a tensor (`_llama3_scaling`)."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": keys.real("rope.freq_base", theta)}
    kind = keys.get("rope.scaling.type", "none" if keys.get("rope.scale_linear") is None else "linear")
    if kind in ("none", ""):
        return rope
    if kind not in ("linear", "yarn"):
        raise UserError(f"{keys.architecture}.rope.scaling.type = {kind!r} is not implemented; linear and yarn are")
    factor = keys.real("rope.scaling.factor", keys.get("rope.scale_linear"))
    if kind == "linear" and factor == 1.0:
        return rope
    rope |= {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = keys.integer("rope.scaling.original_context_length")
        # llama.cpp multiplies by this and by 0.1 ln(factor) + 1, which transformers takes by itself.
        if keys.real("rope.scaling.attn_factor", 1.0) != 1.0:
            rope["attention_factor"] = keys.real("rope.scaling.attn_factor") * (0.1 * math.log(factor) + 1.0)
        for key in ("beta_fast", "beta_slow"):
            if keys.get(f"rope.scaling.yarn_{key}") is not None:
                rope[key] = keys.real(f"rope.scaling.yarn_{key}")
    return rope


def llama3_divisors(head_dim: int, theta: float, factor: float, low: float, high: float, original: float) -> np.ndarray:
    """What each rotary frequency is divided by under llama3 scaling, float64 (head_dim / 2,)."""
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


def _llama3_scaling(divisors: np.ndarray, theta: float) -> dict[str, Any]:
    """The rope_parameters whose divisors these are; a file stores the result and not the settings."""
    divisors = divisors.astype(np.float64).ravel()
    if not np.isfinite(divisors).all() or (divisors <= 0).any():
        raise CorruptFile("rope_freqs.weight holds zero, negative or infinite divisors")
    if (divisors == 1.0).all():
        return {}
    factor = float(str(np.float32(divisors.max())))
    for power in (13, *range(10, 21)):  # 8192, which Llama 3.1 and 3.2 have, before others
        settings = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1 << power}
        expected = llama3_divisors(2 * len(divisors), theta, factor, 1.0, 4.0, 1 << power)
        if np.allclose(divisors, expected, rtol=1e-4):
            return {"rope_type": "llama3", "factor": factor, **settings}
    raise UserError("rope_freqs.weight holds other divisors than llama3 scaling makes, which is not implemented")


def _llama(keys: Keys) -> dict[str, Any]:
    experts = keys.get("expert_count", 0)
    window = keys.get("attention.sliding_window", 0)
    if experts:
        values = _llama_like(keys, "mixtral", "MixtralForCausalLM") | _experts(keys)
        values |= {"num_local_experts": values.pop("num_experts"), "sliding_window": None}
    elif window:
        values = _llama_like(keys, "mistral", "MistralForCausalLM")
        values["sliding_window"] = keys.integer("attention.sliding_window")
    else:
        values = _llama_like(keys, "llama", "LlamaForCausalLM")
        values["mlp_bias"] = False
    return values


def _experts(keys: Keys) -> dict[str, Any]:
    return {"num_experts": keys.integer("expert_count"), "num_experts_per_tok": keys.integer("expert_used_count")}


def _qwen2(keys: Keys) -> dict[str, Any]:
    values = _llama_like(keys, "qwen2", "Qwen2ForCausalLM")
    del values["attention_bias"]  # Qwen2's class has biases on query, key and value, and no such key
    return values | {"use_sliding_window": False, "sliding_window": None}


def _qwen3(keys: Keys) -> dict[str, Any]:
    return _llama_like(keys, "qwen3", "Qwen3ForCausalLM") | {"use_sliding_window": False, "sliding_window": None}


def _qwen3_moe(keys: Keys) -> dict[str, Any]:
    return (
        _llama_like(keys, "qwen3_moe", "Qwen3MoeForCausalLM")
        | _experts(keys)
        | {
            "moe_intermediate_size": keys.integer("expert_feed_forward_length"),
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "use_sliding_window": False,
            "sliding_window": None,
        }
    )


def _gemma(keys: Keys) -> dict[str, Any]:
    values = _llama_like(keys, "gemma", "GemmaForCausalLM")
    return values | {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}


def _gemma_scale(keys: Keys, values: dict[str, Any]) -> float:
    """query_pre_attn_scalar, which the file does not have."""
    scale = keys.optional_real("attention.scale")
    if scale is not None:
        return round(scale**-2)
    whole = values["num_hidden_layers"] == GEMMA_27B_LAYERS[keys.architecture]
    return values["hidden_size"] // values["num_attention_heads"] if whole else values["head_dim"]


def _gemma2(keys: Keys) -> dict[str, Any]:
    values = _gemma(keys)
    return values | {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "query_pre_attn_scalar": _gemma_scale(keys, values),
        "sliding_window": keys.integer("attention.sliding_window", 4096),
        "layer_types": [FULL if layer % 2 else SLIDING for layer in range(values["num_hidden_layers"])],
        "attn_logit_softcapping": keys.optional_real("attn_logit_softcapping"),
        "final_logit_softcapping": keys.optional_real("final_logit_softcapping"),
    }


def _gemma3(keys: Keys) -> dict[str, Any]:
    values = _gemma(keys)
    every = keys.integer("attention.sliding_window_pattern", 6)
    local = {"rope_type": "default", "rope_theta": keys.real("rope.freq_base_swa", 10_000.0)}
    return values | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": _gemma_scale(keys, values),
        "sliding_window": keys.integer("attention.sliding_window", 1024),
        "layer_types": [SLIDING if (layer + 1) % every else FULL for layer in range(values["num_hidden_layers"])],
        "rope_parameters": {FULL: _rope(keys, 1_000_000.0), SLIDING: local},
        "attn_logit_softcapping": None,
        "final_logit_softcapping": keys.optional_real("final_logit_softcapping"),
    }


def _gpt2(keys: Keys) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": keys.rows("token_embd.weight"),
        "n_embd": keys.integer("embedding_length"),
        "n_layer": keys.layers(),
        "n_head": keys.integer("attention.head_count"),
        "n_positions": keys.integer("context_length"),
        "n_inner": keys.integer("feed_forward_length"),
        "layer_norm_epsilon": keys.real("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
        "tie_word_embeddings": "output.weight" not in keys.shapes,
    }


def _phi2(keys: Keys) -> dict[str, Any]:
    values = _base(keys, "phi", "PhiForCausalLM")
    head_dim = values.pop("head_dim")
    fraction = keys.integer("rope.dimension_count", head_dim) / head_dim
    return values | {
        "layer_norm_eps": keys.real("attention.layer_norm_epsilon"),
        "hidden_act": "gelu_new",
        "qk_layernorm": False,
        "partial_rotary_factor": fraction,
        "rope_parameters": _rope(keys) | {"partial_rotary_factor": fraction},
    }


def _bert(keys: Keys) -> dict[str, Any]:
    values = _base(keys, "bert", "BertModel")
    for key in ("head_dim", "num_key_value_heads"):
        del values[key]
    return values | {
        "layer_norm_eps": keys.real("attention.layer_norm_epsilon"),
        "hidden_act": "gelu",
        "type_vocab_size": keys.rows("token_types.weight") if "token_types.weight" in keys.shapes else 0,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
    }


def _grok(keys: Keys) -> dict[str, Any]:
    values = _llama_like(keys, "grok-1", "Grok1ModelForCausalLM") | _experts(keys)
    return values | {
        "hidden_act": "gelu_pytorch_tanh",
        "embedding_multiplier_scale": keys.real("embedding_scale", 78.38367176906169),
        "output_multiplier_scale": keys.real("logit_scale", 0.5773502691896257),
        "max_attn_value": keys.real("attn_logit_softcapping", 30.0),
    }
