"""One model, many ways to run it: in one pass, in pieces behind a cache, batched, packed, trained, counted."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lalia.model.attention import NUM_BLOCKS
from lalia.model.cache import KVCache
from lalia.model.config import ModelConfig
from lalia.model.transformer import Transformer

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "intermediate_size": 56,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": ModelConfig(family="llama", **SIZES),
    "qwen3": ModelConfig(family="qwen3", **SIZES, qk_norm="before_rope", tie_word_embeddings=False),
    "gemma3_text": ModelConfig(
        family="gemma3_text",
        **SIZES,
        norm_weight="offset",
        norm_order="sandwich",
        embedding_multiplier=40**0.5,
        qk_norm="before_rope",
        rope_theta=1e6,
        rope_theta_local=1e4,
        sliding_window=6,
        layer_types=("sliding_attention", "sliding_attention", "full_attention"),
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
    ),
}
LENGTH = 21
TOLERANCE = 1e-5


def make(family: str) -> Transformer:
    model = Transformer(CONFIGS[family])
    generator = torch.Generator().manual_seed(2)
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.data.copy_(0.6 + 0.2 * noise if weight.dim() == 1 else 1.2 * noise * weight.shape[1] ** -0.5)
    return model.eval()


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> Transformer:
    return make(request.param)


@pytest.fixture
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches start with room for 4 tokens, so that they grow within a test."""
    monkeypatch.setattr("lalia.model.cache.INITIAL_LENGTH", 4)


def random_tokens(batch: int, length: int = LENGTH, seed: int = 4) -> Tensor:
    return torch.randint(0, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Transformer, tokens: Tensor, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model.logits(model(tokens, **inputs))


def extend(model: Transformer, cache: KVCache, tokens: Tensor, first: int = 0) -> Tensor:
    """Logits of `tokens` behind what the slots first .. first + batch of the cache hold; advances their lengths."""
    batch, seq = tokens.shape
    cache.first = first
    with torch.no_grad():
        out = model.logits(model(tokens, cache=cache))
    for slot in range(first, first + batch):
        cache.lengths[slot] += seq
    return out


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.mark.parametrize("pieces", [[1] * LENGTH, [LENGTH], [7, 1, 1, 5, 7], [4, 17], [20, 1]], ids=str)
@pytest.mark.usefixtures("small_cache")
def test_pieces_behind_a_cache_equal_one_pass(model: Transformer, pieces: list[int]) -> None:
    tokens = random_tokens(1)
    cache = KVCache(model.config, num_slots=1, max_length=32)
    found = torch.cat([extend(model, cache, piece) for piece in tokens.split(pieces, 1)], 1)
    assert difference(found, logits(model, tokens)) <= TOLERANCE


@pytest.mark.usefixtures("small_cache")
def test_sequences_of_different_lengths_in_one_cache(model: Transformer) -> None:
    """Three prompts of different lengths, prefilled alone, then decoded together, one and then two tokens a pass."""
    tokens, lengths = random_tokens(3), [3, 9, 16]
    expected = logits(model, tokens)
    cache = KVCache(model.config, num_slots=4, max_length=32)
    for row, length in enumerate(lengths):
        extend(model, cache, tokens[row : row + 1, :length], first=row + 1)
    for count in (1, 2, 2):
        before = cache.lengths[1:]
        step = torch.stack([tokens[row, start : start + count] for row, start in enumerate(before)])
        found = extend(model, cache, step, first=1)
        for row, start in enumerate(before):
            assert difference(found[row], expected[row, start : start + count]) <= TOLERANCE
    assert cache.lengths == [0, *(length + 5 for length in lengths)]


@pytest.mark.usefixtures("small_cache")
def test_a_slot_can_move_and_be_used_again(model: Transformer) -> None:
    tokens = random_tokens(2)
    cache = KVCache(model.config, num_slots=2, max_length=32)
    extend(model, cache, tokens[:1, :18], first=0)
    extend(model, cache, tokens[1:, :10], first=1)
    cache.move(1, 0)  # over a longer sequence, whose rest must not be seen
    found = extend(model, cache, tokens[1:, 10:], first=0)
    assert difference(found, logits(model, tokens)[1:, 10:]) <= TOLERANCE


@pytest.mark.usefixtures("small_cache")
def test_batched_prefill_equals_separate(model: Transformer) -> None:
    tokens = random_tokens(3)
    cache = KVCache(model.config, num_slots=3, max_length=LENGTH)
    assert difference(extend(model, cache, tokens), logits(model, tokens)) <= TOLERANCE
    separate = torch.cat([logits(model, row[None]) for row in tokens])
    assert difference(logits(model, tokens), separate) <= TOLERANCE


def test_packed_documents_equal_separate_ones(model: Transformer) -> None:
    lengths = [[9, 12], [5, 8, 8]]
    tokens = random_tokens(2)
    ids = torch.stack([torch.cat([torch.full((n,), i) for i, n in enumerate(row)]) for row in lengths])
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    packed = logits(model, tokens, document_ids=ids, positions=positions)
    separate = torch.stack(
        [torch.cat([logits(model, piece[None])[0] for piece in tokens[i].split(row)]) for i, row in enumerate(lengths)]
    )
    assert (
        difference(packed, separate) <= 2 * TOLERANCE
    )  # of values up to 5; products of other heights add in another order
    # Negative controls: without the ids documents see each other. Rotary positions are relative, so that they
    # restart changes nothing within a document.
    assert difference(logits(model, tokens, positions=positions), separate) > 1e-2
    assert difference(logits(model, tokens, document_ids=ids), separate) <= 2 * TOLERANCE


def test_later_tokens_do_not_matter_and_earlier_ones_do(model: Transformer) -> None:
    tokens = random_tokens(1)
    other = tokens.clone()
    other[0, 10] = (other[0, 10] + 1) % SIZES["vocab_size"]
    a, b = logits(model, tokens), logits(model, other)
    assert torch.equal(a[:, :10], b[:, :10])
    assert (a[:, 10:] - b[:, 10:]).abs().amax(-1).min() > 1e-4


def test_window_reaches_back_its_length() -> None:
    """With windows of 6 in every layer, three layers see 3 * 5 tokens back and no more."""
    config = CONFIGS["gemma3_text"].model_copy(update={"layer_types": None})
    model = Transformer(config)
    model.load_state_dict(make("gemma3_text").state_dict())
    tokens = random_tokens(1)
    other = tokens.clone()
    other[0, 2] = (other[0, 2] + 1) % SIZES["vocab_size"]
    changed = (logits(model, tokens) != logits(model, other)).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == list(range(2, 2 + 3 * 5 + 1))


def test_training_pass_equals_inference_pass(model: Transformer) -> None:
    """Training takes other code (blocked attention, recomputing functions); document masks included."""
    tokens = random_tokens(2)
    ids = torch.tensor([[0] * 9 + [1] * 12, [0] * 21])
    for inputs in ({}, {"document_ids": ids}):
        with torch.enable_grad():
            trained = model.logits(model(tokens, **inputs))
        assert difference(trained.detach(), logits(model, tokens, **inputs)) <= TOLERANCE
    trained.square().mean().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.abs().max() > 0, name
    model.zero_grad()


def test_gradient_is_the_slope_of_the_loss(model: Transformer) -> None:
    """Along the gradient's direction the loss changes by its norm (central difference in double precision)."""
    double = Transformer(model.config).double()
    double.load_state_dict(model.state_dict())
    double.compute_dtype = torch.float64
    tokens = random_tokens(2)

    def loss() -> Tensor:
        scores = double.logits(double(tokens[:, :-1]))
        return torch.nn.functional.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten())

    loss().backward()
    gradients = {name: weight.grad for name, weight in double.named_parameters() if weight.grad is not None}
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    step, values = 1e-5, []
    for sign in (1, -2):  # forward by one step, then back by two
        with torch.no_grad():
            for name, weight in double.named_parameters():
                weight.add_(gradients[name] / norm, alpha=sign * step)
            values.append(loss())
    slope = (values[0] - values[1]) / (2 * step)
    assert slope == pytest.approx(norm.item(), rel=1e-5)


def test_bfloat16_activations(model: Transformer) -> None:
    tokens = random_tokens(2)
    expected = logits(model, tokens)
    model.compute_dtype = torch.bfloat16
    try:
        found = logits(model, tokens)
        cache = KVCache(model.config, num_slots=2, max_length=LENGTH, dtype=torch.bfloat16)
        cached = torch.cat([extend(model, cache, piece) for piece in tokens.split((10, 11), 1)], 1)
    finally:
        model.compute_dtype = torch.float32
    assert found.dtype == torch.bfloat16
    scale = expected.pow(2).mean().sqrt()
    for low in (found, cached):
        assert (low.float() - expected).pow(2).mean().sqrt() < 0.05 * scale


@pytest.mark.parametrize("length", [64, 256])
def test_flops_per_token(length: int, model: Transformer) -> None:
    """Against PyTorch's counter, which counts matrix products, as the formula does."""
    c = model.config.model_copy(update={"sliding_window": None, "layer_types": None})
    model = Transformer(c)
    tokens = torch.zeros(1, length, dtype=torch.int64)
    # A forward pass with attention as plain products over the whole square: a third of a step.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.logits(model(tokens))
    assert 3 * counter.get_total_flops() / length == pytest.approx(c.flops_per_token(length), rel=1e-6)
    # A step: the linear layers agree; blocked attention does less of the square that the formula counts: with n blocks
    # (n + 1) / (2 n) of it.
    with FlopCounterMode(display=False) as counter:
        model.logits(model(tokens)).sum().backward()
    counts = {str(op): flops / length for op, flops in counter.get_flop_counts()["Global"].items()}
    assert counts.pop("aten.mm") == pytest.approx(c.flops_per_token(0), rel=1e-6)
    attention = c.flops_per_token(length) - c.flops_per_token(0)
    assert sum(counts.values()) == pytest.approx(attention * (NUM_BLOCKS + 1) / (2 * NUM_BLOCKS), rel=1e-6)


def test_flops_of_windowed_layers() -> None:
    c = CONFIGS["gemma3_text"]
    full = c.model_copy(update={"sliding_window": None, "layer_types": None})
    saved = 12 * c.query_size * 2 * (100 - 6)  # two of three layers see 6 of 100 tokens
    assert full.flops_per_token(100) - c.flops_per_token(100) == saved


def test_counts(model: Transformer) -> None:
    c = model.config
    norms = sum(weight.numel() for weight in model.parameters() if weight.dim() == 1)
    embedding = 0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size
    assert model.num_parameters() == c.num_matrix_parameters() + norms + embedding
    cache = KVCache(c, num_slots=2, max_length=10, dtype=torch.bfloat16)
    cache.reserve(2, 10)
    assert sum(block.nbytes for block in cache.layers) == 2 * c.cache_bytes(10, 2)
