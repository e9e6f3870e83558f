import pytest
import torch

from lalia.model.cache import KVCache
from lalia.model.config import ModelConfig
from lalia.model.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=200,
)


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(CONFIG).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def forward(model: Transformer, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
    with torch.no_grad():
        hidden = model(tokens, cache=cache)
    for slot in range(cache.first, cache.first + tokens.shape[0]):
        cache.lengths[slot] += tokens.shape[1]
    return hidden


def test_the_transformer_with_a_cache_equals_one_forward(model):
    tokens = torch.randint(0, 64, (2, 12))
    with torch.no_grad():
        expected = model(tokens)
    cache = KVCache(CONFIG, 2, 12)
    pieces = [forward(model, tokens[:, a:b], cache) for a, b in ((0, 5), (5, 6), (6, 12))]
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=1e-4, atol=1e-4)


def test_memory_grows_with_use_and_keeps_its_content():
    cache = KVCache(CONFIG, 8, 1000)
    assert cache.layers[0].shape[0] == 1 and cache.layers[0].shape[2] == 64
    cache.layers[1][0, :, :64], cache.lengths[0] = 7.0, 64
    cache.reserve(3, 65)
    assert cache.layers[1].shape == (4, 2, 128, 8)
    assert (cache.layers[1][0, :, :64] == 7.0).all() and cache.layers[1].sum() == 7.0 * 2 * 64 * 8
    cache.reserve(8, 1000)
    assert cache.layers[1].shape == (8, 2, 1000, 8)  # never beyond the limits


def test_move_copies_a_slot(model):
    tokens = torch.randint(0, 64, (2, 9))
    cache = KVCache(CONFIG, 2, 20)
    forward(model, tokens[:, :8], cache)
    expected = forward(model, tokens[:, 8:], cache)
    cache.lengths[1] = 8
    cache.move(1, 0)
    assert cache.lengths[0] == 8
    torch.testing.assert_close(forward(model, tokens[1:, 8:], cache)[0], expected[1], rtol=1e-4, atol=1e-5)
    cache.lengths = [8, 8]
    cache.layers[0][0].zero_()  # control: the content matters
    assert not torch.allclose(forward(model, tokens[1:, 8:], cache)[0], expected[1], atol=1e-3)
