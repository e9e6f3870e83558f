import pytest
import torch

from lalia.inference import context as context_module
from lalia.inference import decoder as decoder_module
from lalia.inference.decoder import Decoder, Linear
from lalia.model.cache import KVCache
from lalia.model.transformer import Transformer

SWITCHES = {
    "llama": {"qk_norm": "none"},
    "qwen3": {},
    "windows": {
        "sliding_window": 5,
        "layer_types": ("sliding_attention", "full_attention"),
        "rope_theta_local": 500.0,
    },
    "all windows": {"sliding_window": 5},
    "gemma": {
        "norm_order": "sandwich",
        "norm_weight": "offset",
        "activation": "gelu_tanh",
        "embedding_multiplier": 5.65,
        "attention_scale": 0.3,
    },
    "gpt2": {
        "norm": "layer",
        "positions": "learned",
        "qk_norm": "none",
        "qkv_bias": True,
        "attention_output_bias": True,
        "feed_forward_bias": True,
        "activation": "gelu_tanh",
        "gated": False,
    },
    "phi": {
        "norm": "layer",
        "norm_order": "parallel",
        "qk_norm": "none",
        "rope_fraction": 0.5,
        "qkv_bias": True,
        "attention_output_bias": True,
        "feed_forward_bias": True,
        "head_bias": True,
        "tie_word_embeddings": False,
        "activation": "gelu_tanh",
        "gated": False,
    },
    "gemma2": {
        "norm_order": "sandwich",
        "norm_weight": "offset",
        "qk_norm": "none",
        "attention_softcap": 2.0,
        "logit_softcap": 30.0,
        "sliding_window": 5,
        "layer_types": ("sliding_attention", "full_attention"),
    },
    "experts": {"num_experts": 4, "num_experts_per_token": 2, "expert_size": 24, "dense_layers": (1,)},
    "grok": {
        "norm_order": "sandwich",
        "qk_norm": "none",
        "attention_softcap": 2.0,
        "output_multiplier": 0.6,
        "num_experts": 4,
        "num_experts_per_token": 2,
        "normalize_expert_weights": False,
        "activation": "gelu_tanh",
    },
    "scaled": {
        "rope_scaling": {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.2}
    },
    "nanochat": {
        "qk_norm": "after_rope",
        "norm_weight": "none",
        "embedding_norm": True,
        "activation": "relu_squared",
        "gated": False,
        "tie_word_embeddings": False,
        "logit_softcap": 15.0,
        "rope_direction": -1,
    },
}


def errors(model: Transformer, num_tokens: int = 40) -> list[float]:
    """Largest differences from the model's own full forward: of pieces of a prompt, then of batched decoding."""
    tokens = torch.randint(0, model.config.vocab_size, (3, num_tokens), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model.logits(model(tokens))
    decoder, cache = Decoder(model), KVCache(model.config, 3, num_tokens)
    found = []
    for slot, (first, second) in enumerate(((3, 7), (20, 5), (1, 9))):
        cache.first = slot
        decoder(tokens[slot : slot + 1, :first], cache)
        logits = decoder.logits(decoder(tokens[slot : slot + 1, first : first + second], cache))
        found.append((logits - expected[slot, first : first + second]).abs().max().item())
    cache.first = 0
    rows = torch.arange(3)
    for _ in range(10):
        positions = torch.tensor(cache.lengths)
        logits = decoder.logits(decoder(tokens[rows, positions][:, None], cache))
        found.append((logits - expected[rows, positions]).abs().max().item())
    cache.first = 1  # one token of one sequence
    position = cache.lengths[1]
    logits = decoder.logits(decoder(tokens[1:2, position : position + 1], cache))
    found.append((logits - expected[1, position]).abs().max().item())
    return found


@pytest.mark.parametrize("padded_tokens", [0, 10_000])
@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES.keys())
def test_equals_the_full_forward(model_factory, monkeypatch, switches, padded_tokens):
    monkeypatch.setattr(context_module, "PADDED_BATCH_TOKENS", padded_tokens)
    assert max(errors(model_factory(**switches))) < 2e-4


def test_the_comparison_notices_a_wrong_rotation(model_factory, monkeypatch):
    rotary = Decoder.rotary

    def backwards(self, rope, layer, length):
        cos, sin = rotary(self, rope, layer, length)
        return cos, -sin

    monkeypatch.setattr(Decoder, "rotary", backwards)
    assert max(errors(model_factory())) > 1e-2


def test_without_copies_of_the_weights(model_factory, monkeypatch):
    monkeypatch.setattr(decoder_module, "COPY_LIMIT_BYTES", 0)
    assert max(errors(model_factory())) < 2e-4


@pytest.mark.parametrize("shape", [(24, 16), (16, 16), (16, 40)])
@pytest.mark.parametrize("rows", [1, 2, 16, 33])
@pytest.mark.parametrize("copy", [False, True])
def test_linear_in_every_layout(shape, rows, copy):
    weight, x = torch.randn(shape), torch.randn(rows, shape[1])
    torch.testing.assert_close(Linear(weight, None, torch.float32, copy)(x), x @ weight.t(), rtol=1e-4, atol=1e-4)


def test_refresh_takes_over_a_training_step(model_factory):
    model = model_factory()
    decoder = Decoder(model)
    tokens = torch.tensor([[5, 6, 7]])

    def difference() -> float:
        with torch.no_grad():
            expected = model.logits(model(tokens))[0]
        return (decoder.logits(decoder(tokens, KVCache(model.config, 1, 8))) - expected).abs().max().item()

    assert not decoder.refresh()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(tokens).square().mean().backward()
    optimizer.step()
    assert difference() > 1e-3  # stale
    assert decoder.refresh()
    assert difference() < 1e-4


def test_bfloat16_activations(model_factory):
    model = model_factory()
    model.compute_dtype = torch.bfloat16
    tokens = torch.randint(0, 100, (1, 12))
    with torch.no_grad():
        expected = model.logits(model(tokens)).float()[0]
    decoder = Decoder(model)
    logits = decoder.logits(decoder(tokens, KVCache(model.config, 1, 16, torch.bfloat16)))
    assert logits.dtype == torch.float32
    assert (logits - expected).norm() / expected.norm() < 0.05
