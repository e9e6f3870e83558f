"""config.json to and from ModelConfig: what is read, what is refused, and that nothing is lost on the way."""

from typing import Any, get_args

import pytest
import torch

from lalia.errors import UserError
from lalia.model.config import ModelConfig
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
CONFIGS = {
    "llama": ModelConfig(family="llama", **SIZES, rope_theta=5e5, tie_word_embeddings=False),
    "qwen3": ModelConfig(family="qwen3", **SIZES, qk_norm="before_rope", rope_theta=1e6),
    "gemma3_text": ModelConfig(
        family="gemma3_text",
        **SIZES,
        norm_weight="offset",
        norm_order="sandwich",
        embedding_multiplier=48**0.5,
        qk_norm="before_rope",
        attention_scale=24**-0.5,
        rope_theta=1e6,
        rope_theta_local=1e4,
        sliding_window=8,
        layer_types=("sliding_attention", "sliding_attention", "full_attention", "sliding_attention"),
        activation="gelu_tanh",
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
}


def test_every_family_of_the_config_is_registered() -> None:
    assert set(get_args(ModelConfig.model_fields["family"].annotation)) == set(FAMILIES) == set(CONFIGS)


@pytest.mark.parametrize("family", CONFIGS)
def test_round_trip(family: str) -> None:
    config = CONFIGS[family]
    assert from_hf(to_hf(config)) == config


@pytest.mark.parametrize("family", CONFIGS)
def test_default_shapes_fit_their_folder(family: Any) -> None:
    config = ArchitectureConfig(family=family).build(vocab_size=512, context=64, hidden_size=96, num_layers=2)
    assert from_hf(to_hf(config)).num_matrix_parameters() == config.num_matrix_parameters()


@pytest.mark.parametrize(
    ("values", "num_parameters"),
    [
        ({"model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
          "intermediate_size": 11008, "vocab_size": 32000}, 6_738_415_616),  # Llama 2 7B
        ({"model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
          "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256}, 8_030_261_248),  # Llama 3 8B
        ({"model_type": "qwen3", "num_hidden_layers": 28, "hidden_size": 1024, "num_attention_heads": 16,
          "num_key_value_heads": 8, "intermediate_size": 3072, "vocab_size": 151936, "tie_word_embeddings": True,
          "rope_scaling": None, "sliding_window": None, "use_sliding_window": False, "max_window_layers": 28},
         596_049_920),  # Qwen3 0.6B
    ],
    ids=["llama-2-7b", "llama-3-8b", "qwen3-0.6b"],
)  # fmt: skip
def test_published_sizes(values: dict[str, Any], num_parameters: int) -> None:
    with torch.device("meta"):
        model = Transformer(from_hf({**values, "max_position_embeddings": 4096}))
    assert model.num_parameters() == num_parameters


@pytest.mark.parametrize("family", CONFIGS)
def test_every_weight_has_a_name_of_its_own(family: str) -> None:
    config = CONFIGS[family]
    with torch.device("meta"):
        model = Transformer(config)
    names: list[str] = []
    for parameter, weight in model.named_parameters():
        pieces = FAMILIES[family].pieces(config, parameter, weight.shape[0])
        assert [piece.start for piece in pieces] == [0, *(piece.end for piece in pieces[:-1])]
        assert pieces[-1].end == weight.shape[0]
        names += [piece.name for piece in pieces]
    assert len(names) == len(set(names))
    assert "model.layers.3.self_attn.v_proj.weight" in names
    assert not any("#" in name for name in names)


@pytest.mark.parametrize("family", CONFIGS)
def test_older_spelling(family: str) -> None:
    """transformers 4 writes rope_theta (and rope_local_base_freq) without rope_parameters."""
    values = to_hf(CONFIGS[family])
    del values["rope_parameters"]
    values["rope_scaling"] = None
    assert from_hf(values) == CONFIGS[family]


@pytest.mark.parametrize("family", CONFIGS)
def test_newer_spelling(family: str) -> None:
    values = to_hf(CONFIGS[family])
    values.pop("rope_theta")
    values.pop("rope_local_base_freq", None)
    assert from_hf(values) == CONFIGS[family]


def test_absent_keys_have_the_defaults_of_transformers() -> None:
    required = {key: SIZES[key] for key in SIZES if key not in ("num_key_value_heads", "head_dim")}
    llama = from_hf({"model_type": "llama", **required, "num_key_value_heads": None})
    assert (llama.num_key_value_heads, llama.head_dim, llama.rope_theta) == (4, 12, 10_000.0)
    assert (llama.rms_norm_eps, llama.tie_word_embeddings) == (1e-6, False)
    assert from_hf({"model_type": "qwen3", **required}).head_dim == 128
    gemma = from_hf({"model_type": "gemma3_text", **required, "num_hidden_layers": 7})
    assert (gemma.head_dim, gemma.attention_scale, gemma.tie_word_embeddings) == (256, None, True)
    assert [gemma.window_of_layer(layer) for layer in range(7)] == [4096] * 5 + [None, 4096]
    assert (gemma.rope_theta, gemma.rope_theta_local) == (1e6, 1e4)
    assert from_hf({"model_type": "nanochat", **required}).logit_softcap == 15.0
    assert from_hf({"model_type": "nanochat", **required, "final_logit_softcapping": None}).logit_softcap == 0.0


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"model_type": "mamba"}, r"'mamba' is not implemented; known types are llama, qwen3, gemma3_text"),
        ("llama", {"model_type": None}, "model_type = None"),
        ("llama", {"model_type": ["llama"]}, "model_type = "),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "expected LlamaForCausalLM"),
        ("llama", {"auto_map": {"AutoModel": "evil.Model"}}, "asks to run code"),
        (
            "llama",
            {"attention_bias": True, "mlp_bias": True},
            "attention_bias = True, mlp_bias = True: not implemented",
        ),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not implemented; implemented are silu"),
        ("llama", {"hidden_act": {}}, "hidden_act = {}"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling = .*llama3"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling = .*linear"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5}}, "rope_parameters = .*yarn"),
        ("llama", {"rope_parameters": {"rope_theta": 1.0}}, "rope_theta = 500000.0 but rope_parameters says 1.0"),
        ("llama", {"rope_parameters": [1]}, "is no object"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"hidden_size": None, "vocab_size": "many"}, "vocab_size = 'many', hidden_size = None; expected pos"),
        ("llama", {"num_attention_heads": 3}, "must be a multiple of num_key_value_heads"),
        ("llama", {"head_dim": 15}, "head_dim = 15 must be even"),
        ("llama", {"rms_norm_eps": "small", "rope_theta": -1, "rope_parameters": None}, "rms_norm_eps.*rope_theta"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window = True"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types"),
        ("gemma3_text", {"layer_types": ["full_attention", "sliding_attention"] * 2}, "every k-th layer"),
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
            {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}}},
            r"rope_parameters\.full_attention = .*linear",
        ),
        ("nanochat", {"hidden_act": "swishmax"}, "hidden_act = 'swishmax'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_refused(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_hf({**to_hf(CONFIGS[family]), **changes})


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"qk_norm": "before_rope"}, r"qk_norm = 'before_rope' \(would become 'none'\)"),
        ("llama", {"logit_softcap": 30.0, "gated": False}, r"gated = False .* logit_softcap = 30\.0"),
        ("qwen3", {"sliding_window": 8, "full_attention_every": 2}, "window of each layer"),
        ("qwen3", {"rope_direction": -1}, "rope_direction"),
        ("gemma3_text", {"attention_scale": 0.3}, r"attention_scale = 0\.3"),
        ("gemma3_text", {"embedding_multiplier": 1.0}, r"embedding_multiplier = 1\.0"),
        ("gemma3_text", {"num_attention_heads": 10}, "must be a multiple of num_attention_heads = 10"),
        ("nanochat", {"norm_weight": "plain"}, "norm_weight"),
        ("nanochat", {"attention_scale": 1.0}, "attention_scale"),
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
        ("llama", {"sliding_window": 8}),
        ("gemma3_text", {"full_attention_every": 1, "sliding_window": None, "rope_theta_local": None}),
        ("gemma3_text", {"full_attention_every": 9}),
        ("gemma3_text", {"rope_theta_local": None}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_two_ways_to_say_the_same_are_the_same(family: str, changes: dict[str, Any]) -> None:
    to_hf(ModelConfig.model_validate({**CONFIGS[family].model_dump(), **changes}))
