import subprocess
import sys
from collections.abc import Callable

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


WINDOWS = {
    "window 1": {"sliding_window": 1},
    "window 2": {"sliding_window": 2},
    "window 7": {
        "sliding_window": 7,
        "layer_types": ("sliding_attention", "full_attention"),
        "rope_theta_local": 500.0,
    },
    "gemma2": {"sliding_window": 7, "layer_types": ("full_attention", "sliding_attention"), "attention_softcap": 2.0},
}
LENGTH = 90


def windowed(**changes) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(CONFIG.model_copy(update=changes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def largest_difference(model: Transformer, reference: Transformer, damage: Callable[[KVCache], None] | None = None):
    """From the full forward of `reference`: pieces shorter and longer than the window, slots of different lengths, a
    slot used again and one that moved; `damage` is done to the cache after every pass."""
    tokens = torch.randint(0, 64, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(tokens)
    cache = KVCache(model.config, 4, LENGTH)
    found = []

    def extend(first: int, rows: list[int], count: int) -> None:
        cache.first = first
        starts = cache.lengths[first : first + len(rows)]
        out = forward(model, torch.stack([tokens[r, s : s + count] for r, s in zip(rows, starts, strict=True)]), cache)
        wanted = torch.stack([expected[r, s : s + count] for r, s in zip(rows, starts, strict=True)])
        found.append((out - wanted).abs().max().item())
        if damage is not None:
            damage(cache)

    for slot, pieces in enumerate(((3, 1, 30, 2, 1, 1, 6), (7, 8), (1, 1, 1))):
        for count in pieces:
            extend(slot, [slot], count)
    for count in (1, 1, 3, 1, 9, 20, 1):  # together, at lengths 44, 15 and 3
        extend(0, [0, 1, 2], count)
    cache.move(2, 3)
    cache.lengths[1] = 0  # another sequence in a used slot
    for count in (5, 1, 40, 3):
        extend(1, [0], count)
    extend(3, [2], 2)
    return max(found)


@pytest.mark.parametrize("changes", WINDOWS.values(), ids=WINDOWS.keys())
def test_a_window_of_keys_is_enough(changes):
    model = windowed(**changes)
    assert largest_difference(model, model) < 1e-4
    exact = KVCache(model.config, 2, LENGTH)
    exact.reserve(2, LENGTH, exact=True)
    assert exact.nbytes == 2 * model.config.cache_bytes(LENGTH)
    rows = [block.shape[2] for block in exact.layers]
    assert rows == [model.config.window_of_layer(layer) or LENGTH for layer in range(2)]


def test_the_comparison_notices_another_window_and_a_ring_out_of_place():
    model = windowed(sliding_window=7)
    assert largest_difference(model, windowed(sliding_window=8)) > 1e-2
    assert largest_difference(windowed(sliding_window=8), model) > 1e-2

    def shift(cache: KVCache) -> None:
        cache.layers[1] = cache.layers[1].roll(1, 2)

    assert largest_difference(model, model, shift) > 1e-2


def test_bytes_by_the_formula():
    config = CONFIG.model_copy(
        update={"sliding_window": 50, "layer_types": ("sliding_attention", "full_attention"), "num_key_value_heads": 2}
    )
    per_layer_and_token = 2 * 2 * 8 * 2  # keys and values, heads, head_dim, bytes
    assert config.cache_bytes_per_token(2) == 2 * per_layer_and_token
    assert config.cache_bytes(50, 2) == 100 * per_layer_and_token
    assert config.cache_bytes(200, 2) == 250 * per_layer_and_token
    cache = KVCache(config, 3, 200, torch.bfloat16)
    for length in (64, 65, 100, 129):
        cache.reserve(1, length)
        assert config.cache_bytes(length, 2) <= cache.nbytes < 2 * config.cache_bytes(length, 2)
    cache.reserve(1, 150, exact=True)  # not less than before, and no more than there may be
    assert cache.nbytes == config.cache_bytes(200, 2)


MEASURE = """
import sys
from pathlib import Path
from lalia.model.cache import KVCache
from lalia.model.config import ModelConfig

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

config = ModelConfig.model_validate_json(sys.argv[1])
KVCache(config, 1, 64).layers[0].add_(0)  # what the first use of PyTorch costs
before = resident()
cache = KVCache(config, 4, 1 << 20)
cache.reserve(4, 1 << 20)
unused = resident() - before
cache.lengths[0] = 1 << 18
for block in cache.layers:
    block[0, :, : 1 << 18] = 1.0
print(cache.nbytes, unused, resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_room_costs_memory_only_where_it_is_used():
    """In a process of its own: in this one other tests' memory comes and goes."""
    config = CONFIG.model_copy(update={"max_position_embeddings": 1 << 20})
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, config.model_dump_json()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    reserved, unused, used = map(int, done.stdout.split())
    assert reserved == 4 * config.cache_bytes(1 << 20) == 512 << 20
    assert unused < 16 << 20
    assert config.cache_bytes(1 << 18) <= used < config.cache_bytes(1 << 18) + (16 << 20)
