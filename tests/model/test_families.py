"""config.json to and from ModelConfig: what is read, what is refused, and that nothing is lost on the way."""

import json
import math
import re
from typing import Any, get_args

import pytest
import torch
import transformers

from lalia.errors import UserError
from lalia.model.config import ModelConfig, RopeScaling
from lalia.model.families.registry import FAMILIES, from_hf, to_hf
from lalia.model.shapes import ArchitectureConfig
from lalia.model.transformer import Transformer

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
}
DERIVED: dict[str, Any] = SIZES | {"head_dim": 12}  # families that derive head_dim
LAYER_NORM: dict[str, Any] = {
    "norm": "layer",
    "norm_eps": 1e-5,
    "qkv_bias": True,
    "attention_output_bias": True,
    "feed_forward_bias": True,
    "gated": False,
}
ENCODER: dict[str, Any] = DERIVED | LAYER_NORM | {"num_key_value_heads": 4, "head_dim": 12, "positions": "learned"}
BERT: dict[str, Any] = ENCODER | {"norm_order": "post", "embedding_norm": True, "causal": False, "activation": "gelu"}
DISTIL: dict[str, Any] = BERT | {"norm_eps": 1e-12}
VISION: dict[str, Any] = ENCODER | {"vocab_size": 0, "max_position_embeddings": 10}
MASKED: dict[str, Any] = {"head_transform": True, "head_bias": True}
GEMMA: dict[str, Any] = {"norm_weight": "offset", "embedding_multiplier": 48**0.5, "activation": "gelu_tanh"}
SLIDING, FULL = "sliding_attention", "full_attention"
YARN = RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=16, attention_factor=1.2, beta_fast=8.0)
LLAMA3 = RopeScaling(kind="llama3", factor=8.0, original_max_position_embeddings=16)
CONFIGS = {
    "gpt2": ModelConfig(family="gpt2", **ENCODER, activation="gelu_tanh"),
    "llama": ModelConfig(family="llama", **SIZES, rope_theta=5e5, tie_word_embeddings=False, rope_scaling=LLAMA3),
    "mistral": ModelConfig(family="mistral", **SIZES, sliding_window=8, rope_scaling=YARN),
    "mixtral": ModelConfig(family="mixtral", **SIZES, num_experts=4, num_experts_per_token=2, router_z_loss_coef=0.01),
    "grok-1": ModelConfig(
        family="grok-1",
        **SIZES,
        norm_order="sandwich",
        norm_eps=1e-5,
        embedding_multiplier=48**0.5,
        output_multiplier=3**-0.5,
        attention_softcap=30.0,
        activation="gelu_tanh",
        num_experts=4,
        num_experts_per_token=2,
        normalize_expert_weights=False,
    ),
    "phi": ModelConfig(
        family="phi",
        **DERIVED | LAYER_NORM,
        norm_order="parallel",
        rope_fraction=0.5,
        head_bias=True,
        activation="gelu_tanh",
        tie_word_embeddings=False,
    ),
    "gemma": ModelConfig(family="gemma", **SIZES, **GEMMA),
    "gemma2": ModelConfig(
        family="gemma2",
        **SIZES,
        **GEMMA,
        norm_order="sandwich",
        attention_softcap=50.0,
        logit_softcap=30.0,
        attention_scale=24**-0.5,
        sliding_window=8,
        layer_types=(SLIDING, FULL, SLIDING, FULL),
    ),
    "gemma3_text": ModelConfig(
        family="gemma3_text",
        **SIZES,
        **GEMMA,
        norm_order="sandwich",
        qk_norm="before_rope",
        attention_scale=24**-0.5,
        rope_theta=1e6,
        rope_theta_local=1e4,
        rope_scaling=RopeScaling(kind="linear", factor=8.0),
        sliding_window=8,
        layer_types=(SLIDING, SLIDING, FULL, SLIDING),
    ),
    "qwen2": ModelConfig(
        family="qwen2", **DERIVED, qkv_bias=True, sliding_window=8, layer_types=(FULL, FULL, SLIDING, SLIDING)
    ),
    "qwen3": ModelConfig(family="qwen3", **SIZES, qk_norm="before_rope", rope_theta=1e6),
    "qwen3_moe": ModelConfig(
        family="qwen3_moe",
        **SIZES,
        qk_norm="before_rope",
        num_experts=4,
        num_experts_per_token=2,
        expert_size=24,
        dense_layers=(1,),
    ),
    "nanochat": ModelConfig(
        family="nanochat",
        **SIZES,
        norm_weight="none",
        embedding_norm=True,
        qk_norm="after_rope",
        rope_direction=-1,
        activation="relu_squared",
        gated=False,
        logit_softcap=15.0,
        tie_word_embeddings=False,
    ),
    "bert": ModelConfig(family="bert", **BERT, **MASKED, type_vocab_size=2),
    "distilbert": ModelConfig(family="distilbert", **DISTIL, **MASKED),
    "clip_text_model": ModelConfig(
        family="clip_text_model", **ENCODER, head="none", activation="quick_gelu", projection_size=24
    ),
    "clip_vision_model": ModelConfig(
        family="clip_vision_model",
        **VISION,
        head="none",
        activation="quick_gelu",
        embedding_norm=True,
        causal=False,
        image_size=24,
        patch_size=8,
    ),
}
ROTARY = [family for family, config in CONFIGS.items() if config.positions == "rope"]
MORE = {
    "bert, pooled": ModelConfig(family="bert", **BERT, type_vocab_size=2, head="none", pooler="tanh"),
    "bert, classifier": ModelConfig(
        family="bert", **BERT, type_vocab_size=2, head="classifier", pooler="tanh", labels=("spam", "ham")
    ),
    "distilbert, classifier": ModelConfig(
        family="distilbert",
        **DISTIL,
        head="classifier",
        pooler="relu",
        labels=("LABEL_0", "LABEL_1", "LABEL_2"),
    ),
    "llama with biases": ModelConfig(
        family="llama", **SIZES, qkv_bias=True, attention_output_bias=True, feed_forward_bias=True
    ),
}
"""Variants of the families that have a config.json of their own."""


def test_every_family_of_the_config_is_registered() -> None:
    assert set(get_args(ModelConfig.model_fields["family"].annotation)) == set(FAMILIES) == set(CONFIGS)
    assert len(FAMILIES) == 17


@pytest.mark.parametrize("config", (CONFIGS | MORE).values(), ids=CONFIGS | MORE)
def test_round_trip(config: ModelConfig) -> None:
    assert from_hf(to_hf(config)) == config
    assert from_hf(json.loads(json.dumps(to_hf(config)))) == config


@pytest.mark.parametrize("family", get_args(ArchitectureConfig.model_fields["family"].annotation))
def test_default_shapes_fit_their_folder(family: Any) -> None:
    config = ArchitectureConfig(family=family).build(vocab_size=512, context=64, hidden_size=96, num_layers=2)
    assert from_hf(to_hf(config)).num_matrix_parameters() == config.num_matrix_parameters()


def llama_like(layers: int, hidden: int, heads: int, kv: int, ff: int, vocab: int, **more: Any) -> dict[str, Any]:
    """What the config.json of a published model says of its size."""
    return {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": ff,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        **more,
    }


def gpt2(layers: int, hidden: int, heads: int) -> dict[str, Any]:
    sizes = {"n_layer": layers, "n_embd": hidden, "n_head": heads, "n_positions": 1024, "vocab_size": 50257}
    return {"model_type": "gpt2", **sizes}


def bert(architecture: str) -> dict[str, Any]:
    values = llama_like(12, 768, 12, 12, 3072, 30522, model_type="bert", max_position_embeddings=512)
    return values | {"architectures": [architecture]}


def distilbert(architecture: str) -> dict[str, Any]:
    sizes = {"dim": 768, "n_layers": 6, "n_heads": 12, "hidden_dim": 3072, "vocab_size": 30522}
    return {"model_type": "distilbert", "architectures": [architecture], "max_position_embeddings": 512, **sizes}


MISTRAL = llama_like(32, 4096, 32, 8, 14336, 32000, model_type="mistral")
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "GPT-2": (gpt2(12, 768, 12), 124_439_808),
    "GPT-2 medium": (gpt2(24, 1024, 16), 354_823_168),
    "GPT-2 large": (gpt2(36, 1280, 20), 774_030_080),
    "GPT-2 xl": (gpt2(48, 1600, 25), 1_557_611_200),
    "Llama 2 7B": (llama_like(32, 4096, 32, 32, 11008, 32000), 6_738_415_616),
    "Llama 2 13B": (llama_like(40, 5120, 40, 40, 13824, 32000), 13_015_864_320),
    "Llama 2 70B": (llama_like(80, 8192, 64, 8, 28672, 32000), 68_976_648_192),
    "Llama 3.1 8B": (
        llama_like(
            32, 4096, 32, 8, 14336, 128256, max_position_embeddings=131_072,
            rope_scaling=SCALED | {"original_max_position_embeddings": 8192},
        ),
        8_030_261_248,
    ),
    "Llama 3.2 1B": (
        llama_like(16, 2048, 32, 8, 8192, 128256, head_dim=64, tie_word_embeddings=True),
        1_235_814_400,
    ),
    "Llama 3.2 3B": (
        llama_like(28, 3072, 24, 8, 8192, 128256, head_dim=128, tie_word_embeddings=True),
        3_212_749_824,
    ),
    "Mistral 7B v0.1": (MISTRAL, 7_241_732_096),
    "Mistral 7B v0.3": (MISTRAL | {"vocab_size": 32768, "sliding_window": None}, 7_248_023_552),
    "Mixtral 8x7B": (
        MISTRAL | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2},
        46_702_792_704,
    ),
    "Grok-1": (
        llama_like(64, 6144, 48, 8, 32768, 131072, model_type="grok-1", head_dim=128, num_experts=8),
        315_684_820_992,
    ),
    "Phi-2": (
        llama_like(32, 2560, 32, 32, 10240, 51200, model_type="phi", partial_rotary_factor=0.4),
        2_779_683_840,
    ),
    "Gemma 2B": (llama_like(18, 2048, 8, 1, 16384, 256000, model_type="gemma", head_dim=256), 2_506_172_416),
    "Qwen2.5 0.5B": (
        llama_like(24, 896, 14, 2, 4864, 151936, model_type="qwen2", tie_word_embeddings=True),
        494_032_768,
    ),
    "Qwen3 0.6B": (
        llama_like(
            28, 1024, 16, 8, 3072, 151936, model_type="qwen3", head_dim=128, tie_word_embeddings=True,
            rope_scaling=None, sliding_window=None, use_sliding_window=False, max_window_layers=28,
        ),
        596_049_920,
    ),
    "BERT base": (bert("BertModel"), 109_482_240),
    "BERT base, masked LM": (bert("BertForMaskedLM"), 109_514_298),
    "DistilBERT base": (distilbert("DistilBertModel"), 66_362_880),
    "DistilBERT base, masked LM": (distilbert("DistilBertForMaskedLM"), 66_985_530),
}  # fmt: skip


@pytest.mark.parametrize(("values", "num_parameters"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_sizes(values: dict[str, Any], num_parameters: int) -> None:
    """From config.json alone, without memory for a weight."""
    with torch.device("meta"):
        model = Transformer(from_hf(values))
    assert model.num_parameters() == num_parameters


@pytest.mark.parametrize(("name", "num_parameters"), [("Mixtral 8x7B", 12_879_925_248), ("Grok-1", 83_756_587_008)])
def test_published_active_sizes(name: str, num_parameters: int) -> None:
    """Weights that one token meets: those of the chosen experts, the router, the embedding and the norms."""
    config = from_hf(PUBLISHED[name][0])
    norms = config.num_hidden_layers * (4 if config.norm_order == "sandwich" else 2) + 1
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    assert config.num_matrix_parameters() + norms * config.hidden_size + embedding == num_parameters


@pytest.mark.parametrize("config", (CONFIGS | MORE).values(), ids=CONFIGS | MORE)
def test_every_weight_has_names_of_its_own(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Transformer(config)
    names: list[str] = []
    for parameter, weight in model.named_parameters():
        shape = tuple(weight.shape)
        pieces = FAMILIES[config.family].pieces(config, parameter, shape)
        assert [piece.start for piece in pieces] == [0, *(piece.end for piece in pieces[:-1])]
        assert pieces[-1].end == (shape[0] * shape[1] if len(shape) == 3 else shape[0])
        assert sum(math.prod(piece.shape) for piece in pieces) == weight.numel()
        names += [piece.name for piece in pieces]
    assert len(names) == len(set(names))
    assert not any("#" in name or "@" in name for name in names)
    stored = [FAMILIES[config.family].stored(config, name) for name in names]
    assert [FAMILIES[config.family].canonical(config, name) for name in stored] == names


@pytest.mark.parametrize("family", CONFIGS)
def test_older_spelling(family: str) -> None:
    """transformers 4 writes rope_theta, rope_scaling and rope_local_base_freq, and no rope_parameters."""
    values = to_hf(CONFIGS[family])
    nested = values.pop("rope_parameters", None)
    assert (nested is None) == (family not in ROTARY)
    if family == "gemma3_text":
        values["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}
    elif values.get("rope_scaling"):
        values["rope_scaling"].pop("rope_type")  # the oldest files say type
    assert from_hf(values) == CONFIGS[family]


@pytest.mark.parametrize("family", CONFIGS)
def test_newer_spelling(family: str) -> None:
    """transformers 5 writes rope_parameters only."""
    values = to_hf(CONFIGS[family])
    for key in ("rope_theta", "rope_local_base_freq", "rope_scaling", "partial_rotary_factor"):
        values.pop(key, None)
    assert from_hf(values) == CONFIGS[family]


@pytest.mark.parametrize("family", ROTARY)
def test_a_lost_spelling_is_seen(family: str) -> None:
    """Without either spelling the rotation is the family's default, which none of the configs that scale has."""
    values = to_hf(CONFIGS[family])
    for key in ("rope_theta", "rope_local_base_freq", "rope_scaling", "partial_rotary_factor", "rope_parameters"):
        values.pop(key, None)
    default = 1e6 if family == "mixtral" else 1e4
    scaled = CONFIGS[family].rope_scaling is not None or CONFIGS[family].rope_theta != default
    assert (from_hf(values) != CONFIGS[family]) == scaled


REQUIRED: dict[str, Any] = {key: SIZES[key] for key in SIZES if key not in ("num_key_value_heads", "head_dim")}


@pytest.mark.parametrize("family", [family for family in CONFIGS if family != "grok-1"])
def test_absent_keys_have_the_defaults_of_transformers(family: str) -> None:
    """What a config.json leaves out is what transformers' class would fill in."""
    sizes = REQUIRED
    if family == "gpt2":
        sizes = {"vocab_size": 97, "n_embd": 48, "n_layer": 4, "n_head": 4, "n_positions": 64}
    if family == "distilbert":
        sizes = {"vocab_size": 97, "dim": 48, "n_layers": 4, "n_heads": 4, "hidden_dim": 80}
        sizes |= {"max_position_embeddings": 64}
    if family == "clip_vision_model":
        sizes = {key: REQUIRED[key] for key in REQUIRED if key not in ("vocab_size", "max_position_embeddings")}
    filled = transformers.AutoConfig.for_model(family, **sizes).to_dict()
    # The exception: classes fill in the key-value heads of one published model (8, 16, 32), whatever the number of
    # heads; ours are as many as heads, as where the key is null. Such files fail on their weights' shapes.
    filled["num_key_value_heads"] = None
    assert from_hf({"model_type": family, **sizes}) == from_hf({**filled, "architectures": None})


def test_absent_keys() -> None:
    llama = from_hf({"model_type": "llama", **REQUIRED, "num_key_value_heads": None})
    assert (llama.num_key_value_heads, llama.head_dim, llama.rope_theta) == (4, 12, 10_000.0)
    assert (llama.norm_eps, llama.tie_word_embeddings) == (1e-6, False)
    assert from_hf({"model_type": "qwen3", **REQUIRED}).head_dim == 128
    gemma = from_hf({"model_type": "gemma3_text", **REQUIRED, "num_hidden_layers": 7})
    assert (gemma.head_dim, gemma.attention_scale, gemma.tie_word_embeddings) == (256, None, True)
    assert [gemma.window_of_layer(layer) for layer in range(7)] == [4096] * 5 + [None, 4096]
    assert (gemma.rope_theta, gemma.rope_theta_local) == (1e6, 1e4)
    assert from_hf({"model_type": "nanochat", **REQUIRED}).logit_softcap == 15.0
    assert from_hf({"model_type": "nanochat", **REQUIRED, "final_logit_softcapping": None}).logit_softcap == 0.0
    # In a Mistral file null and absent differ.
    assert from_hf({"model_type": "mistral", **REQUIRED}).sliding_window == 4096
    assert from_hf({"model_type": "mistral", **REQUIRED, "sliding_window": None}).sliding_window is None
    # Qwen's switch overrides a window that is there.
    unused = {"sliding_window": 8, "use_sliding_window": False}
    assert from_hf({"model_type": "qwen2", **REQUIRED, **unused}).sliding_window is None
    # The first Gemma files say "gelu" and mean the tanh form.
    assert from_hf({"model_type": "gemma", **REQUIRED, "hidden_act": "gelu"}).activation == "gelu_tanh"
    grok = from_hf({"model_type": "grok-1", **REQUIRED})
    assert (grok.num_experts, grok.num_experts_per_token, grok.attention_softcap) == (8, 2, 30.0)
    assert grok.embedding_multiplier == pytest.approx(48**0.5)


@pytest.mark.parametrize("old", [{"n_ctx": 64, "n_positions": None}, {"n_ctx": 64}])
def test_gpt2_of_2019(old: dict[str, Any]) -> None:
    values = {key: value for key, value in to_hf(CONFIGS["gpt2"]).items() if key not in ("n_positions", "n_inner")}
    config = from_hf({**values, **old, "n_inner": None})
    assert (config.max_position_embeddings, config.intermediate_size) == (64, 4 * 48)


def test_layer_types_beat_any_pattern() -> None:
    values = {**to_hf(CONFIGS["gemma3_text"]), "sliding_window_pattern": 2}
    assert from_hf(values).layer_types == CONFIGS["gemma3_text"].layer_types
    del values["layer_types"]
    assert from_hf(values).layer_types == (SLIDING, FULL, SLIDING, FULL)


@pytest.mark.parametrize("scaling", [YARN, LLAMA3, RopeScaling(kind="linear", factor=2.0)], ids=lambda s: s.kind)
def test_scalings_in_the_old_spelling(scaling: RopeScaling) -> None:
    config = CONFIGS["llama"].model_copy(update={"rope_scaling": scaling})
    values = to_hf(config)
    del values["rope_parameters"]
    values["rope_scaling"]["type"] = values["rope_scaling"].pop("rope_type")
    assert from_hf(values) == config
    beside = dict(values, rope_scaling=dict(values["rope_scaling"]))
    if scaling.kind != "linear":  # Phi-3 and others give the original context beside the scaling
        beside["original_max_position_embeddings"] = beside["rope_scaling"].pop("original_max_position_embeddings")
        assert from_hf(beside) == config


LISTED = ", ".join(FAMILIES)
BAD_YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"model_type": "mamba"}, f"'mamba' is not implemented; known types are {re.escape(LISTED)}"),
        ("llama", {"model_type": None}, "model_type = None"),
        ("llama", {"model_type": ["llama"]}, "model_type = "),
        ("llama", {"model_type": "clip"}, "holds two towers; part = None, expected 'text' or 'vision'"),
        ("gemma3_text", {"model_type": "gemma3", "text_config": {}}, "multimodal folder"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "expected LlamaForCausalLM"),
        ("bert", {"architectures": ["BertForQuestionAnswering"]}, "expected BertForMaskedLM or BertForPreTraining"),
        ("llama", {"auto_map": {"AutoModel": "evil.Model"}}, "asks to run code"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True: not impl"),
        ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn = True: not implemented"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights = False"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm = True: not implemented"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_token = 5 must be 1 to num_experts = 4"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts = 0; expected positive"),
        ("mixtral", {"num_local_experts": 10**6}, "num_local_experts = 1000000; expected at most 10000"),
        ("qwen3_moe", {"mlp_only_layers": 1}, "mlp_only_layers = 1; expected a list"),
        ("grok-1", {"hidden_act": "gelu"}, "hidden_act = 'gelu': not implemented"),
        ("gemma", {"attention_bias": True}, "attention_bias = True: not implemented"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
        ("bert", {"is_decoder": True}, "is_decoder = True"),
        ("bert", {"problem_type": "multi_label_classification"}, "problem_type = 'multi_label"),
        ("clip_vision_model", {"patch_size": 7}, "image_size = 24 must be a multiple of patch_size = 7"),
        ("llama", {"hidden_act": "swishmax"}, "hidden_act = 'swishmax' is not implemented; implemented are silu"),
        ("llama", {"hidden_act": {}}, "hidden_act = {}"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}}, "rope_scaling = .*dynamic.*types default"),
        ("llama", {"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_scaling = .*su"),
        ("llama", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 5e5}}, "rope_parameters = .*longrope"),
        ("llama", {"rope_parameters": BAD_YARN | {"rope_theta": 1.0}}, "rope_theta = 500000.0 but rope_parameters sa"),
        ("llama", {"rope_scaling": BAD_YARN}, "rope_scaling says 'yarn' but rope_parameters says 'llama3'|but rope"),
        ("llama", {"rope_parameters": [1]}, "is no object"),
        (
            "llama",
            {"rope_scaling": {"type": "linear"}, "rope_parameters": None},
            r"rope_scaling\.factor = None",
        ),
        ("phi", {"partial_rotary_factor": 0.25}, "partial_rotary_factor = 0.25 but rope_parameters says 0.5"),
        ("phi", {"partial_rotary_factor": 0.1, "rope_parameters": None}, "must be even for rotary"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"hidden_size": None, "vocab_size": "many"}, "vocab_size = 'many', hidden_size = None; expected pos"),
        ("llama", {"num_attention_heads": 3}, "must be a multiple of num_key_value_heads"),
        ("llama", {"head_dim": 15}, "head_dim = 15 must be even"),
        ("llama", {"num_hidden_layers": 10**8}, "num_hidden_layers = 100000000; expected at most"),
        (
            "qwen3",
            {"rms_norm_eps": "small", "rope_theta": -1, "rope_parameters": None},
            "norm_eps = 'small'.*rope_theta = -1",
        ),
        ("llama", {"layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types = .*: not implemented"),
        ("mistral", {"layer_types": ["sliding_attention"] * 4}, "layer_types = .*: not implemented"),
        ("gemma3_text", {"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        ("gemma3_text", {"layer_types": ["chunked_attention"] * 4}, "layer_types = .*chunked"),
        ("gemma3_text", {"layer_types": "all"}, "layer_types = 'all'"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_text", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar = 0"),
        ("gemma3_text", {"sliding_window": None}, "needs sliding_window"),
        ("gemma3_text", {"sliding_window": 0}, "sliding_window = 0: .*greater than 0"),
        ("gemma3_text", {"final_logit_softcapping": -1}, "logit_softcap = -1: .*greater than or equal to 0"),
        ("gemma3_text", {"rope_local_base_freq": 5.0}, "rope_local_base_freq = 5.0 but .*sliding_attention says"),
        ("gemma3_text", {"rope_parameters": {"rope_type": "default"}}, "expected full_attention and sliding_attention"),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 8.0}}},
            r"rope_parameters\.sliding_attention = .*only full layers scale",
        ),
        ("nanochat", {"hidden_act": "swishmax"}, "hidden_act = 'swishmax'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_refused(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_hf({**to_hf(CONFIGS[family]), **changes})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"id2label": ["a", "b"]}, r"id2label = \['a', 'b'\]; expected an object"),
        ({"id2label": {"0": "a", "2": "b"}}, "numbers its labels 0, 1, 2"),
        ({"id2label": {"0": "a"}}, "at least two labels, got 1"),
        ({"id2label": None, "num_labels": 1}, "num_labels = 1; expected an integer from 2"),
    ],
    ids=str,
)
def test_labels_that_are_none(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_hf({**to_hf(MORE["bert, classifier"]), **values})


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"qk_norm": "before_rope"}, r"qk_norm = 'before_rope' \(would become 'none'\)"),
        ("llama", {"logit_softcap": 30.0, "gated": False}, r"gated = False .* logit_softcap = 30\.0"),
        ("llama", {"sliding_window": 8}, "window of each layer"),
        ("llama", {"qkv_bias": True}, "qkv_bias = True"),
        ("qwen3", {"rope_direction": -1}, "rope_direction"),
        ("qwen3", {"head": "classifier", "labels": ("a", "b")}, "cannot express head = 'classifier'; it has Qwen3For"),
        ("qwen3", {"num_experts": 4, "num_experts_per_token": 2}, "num_experts = 4"),
        ("gpt2", {"activation": "gelu"}, "written with 'gelu_tanh' only"),
        ("gpt2", {"head_dim": 16}, "head_dim = 16 must be hidden_size / num_attention_heads = 12"),
        ("gpt2", {"num_key_value_heads": 2}, r"num_key_value_heads = 2 \(would become 4\)"),
        ("mixtral", {"normalize_expert_weights": False}, "normalize_expert_weights = False"),
        ("mixtral", {"dense_layers": (0,)}, "dense_layers"),
        ("mixtral", {"expert_size": 24}, "expert_size = 24"),
        ("grok-1", {"router_z_loss_coef": 0.1}, "router_z_loss_coef = 0.1"),
        ("gemma2", {"qk_norm": "before_rope"}, "qk_norm"),
        ("gemma3_text", {"attention_scale": 0.3}, r"attention_scale = 0\.3"),
        ("gemma3_text", {"embedding_multiplier": 1.0}, r"embedding_multiplier = 1\.0"),
        ("gemma3_text", {"num_attention_heads": 10}, "must be a multiple of num_attention_heads = 10"),
        ("nanochat", {"norm_weight": "plain"}, "norm_weight"),
        ("nanochat", {"attention_scale": 1.0}, "attention_scale"),
        ("distilbert", {"norm_eps": 1e-5}, r"norm_eps = 1e-05 \(would become 1e-12\)"),
        ("distilbert", {"type_vocab_size": 2}, "type_vocab_size = 2"),
        ("bert", {"tie_word_embeddings": False}, "tie_word_embeddings = False"),
        ("clip_text_model", {"causal": False}, "causal = False"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_a_folder_cannot_express_is_refused(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        to_hf(ModelConfig.model_validate({**CONFIGS[family].model_dump(), **changes}))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention_scale": 16**-0.5}),
        ("llama", {"router_aux_loss_coef": 0.5}),  # means nothing without experts
        ("qwen3", {"layer_types": (FULL,) * 4, "sliding_window": 8}),
        ("mistral", {"layer_types": (SLIDING,) * 4}),
        ("mixtral", {"expert_size": 80}),
        ("gemma3_text", {"layer_types": (FULL,) * 4, "sliding_window": None, "rope_theta_local": None}),
        ("gemma3_text", {"layer_types": (SLIDING,) * 4, "rope_scaling": None}),
        ("gemma3_text", {"rope_theta_local": None, "rope_scaling": None}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_two_ways_to_say_the_same_are_the_same(family: str, changes: dict[str, Any]) -> None:
    to_hf(ModelConfig.model_validate({**CONFIGS[family].model_dump(), **changes}))


def test_experts_cost_a_token_what_a_dense_network_does() -> None:
    dense, mixture = (ArchitectureConfig(family=family).build(512, 64, 256, 4) for family in ("qwen3", "qwen3_moe"))
    routers = 4 * 8 * 256
    assert (mixture.num_experts, mixture.num_experts_per_token) == (8, 2)
    assert mixture.num_matrix_parameters() == pytest.approx(dense.num_matrix_parameters() + routers, rel=0.01)
    chosen = ArchitectureConfig(family="qwen3_moe", num_experts=4, num_experts_per_token=1, expert_size=48)
    built = chosen.build(512, 64, 256, 4)
    assert (built.num_experts, built.num_experts_per_token, built.expert_size) == (4, 1, 48)
    with pytest.raises(UserError, match="'qwen3' has no experts; set it to 'qwen3_moe'"):
        ArchitectureConfig.parse({"num_experts": 4})
