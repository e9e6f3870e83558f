"""Long prompts in pieces: the cache of windowed layers, positions as transformers has them, memory, and the engine."""

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lalia.errors import UserError
from lalia.formats.hf_folder import load_model
from lalia.inference import context as context_module
from lalia.inference.decoder import Decoder
from lalia.inference.engine import Engine
from lalia.inference.sampling import SamplingParams
from lalia.model.attention import attend_behind
from lalia.model.cache import KVCache
from lalia.model.rotary import rotary_table
from lalia.model.transformer import Transformer

transformers = pytest.importorskip("transformers")

MIXED = {"layer_types": ("sliding_attention", "full_attention"), "rope_theta_local": 500.0}
WINDOWS = {
    "all layers, window 1": {"sliding_window": 1},
    "all layers, window 7": {"sliding_window": 7},
    "one layer, window 16": {"sliding_window": 16, **MIXED},
    "gemma2": {"sliding_window": 7, **MIXED, "attention_softcap": 2.0, "qk_norm": "none"},
    "no window": {},
    "no window, softcap": {"attention_softcap": 2.0, "qk_norm": "none"},
}
NUM_TOKENS = 200


def largest_difference(model: Transformer, reference: Transformer) -> float:
    """Of the decoder from the full forward of `reference`: pieces of many lengths, then slots of different lengths one
    token at a time together, then another sequence in a used slot."""
    tokens = torch.randint(0, model.config.vocab_size, (3, NUM_TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference.logits(reference(tokens))
    decoder, cache = Decoder(model), KVCache(model.config, 4, NUM_TOKENS)
    found = []

    def extend(first: int, rows: list[int], count: int) -> None:
        cache.first = first
        starts = cache.lengths[first : first + len(rows)]
        piece = torch.stack([tokens[r, s : s + count] for r, s in zip(rows, starts, strict=True)])
        wanted = torch.cat([expected[r, s : s + count] for r, s in zip(rows, starts, strict=True)])
        found.append((decoder.logits(decoder(piece, cache)) - wanted).abs().max().item())

    for slot, pieces in enumerate(((3, 50, 1, 17, 64, 2), (5, 30), (1,))):
        for count in pieces:
            extend(slot, [slot], count)
    for _ in range(20):
        extend(0, [0, 1, 2], 1)
    cache.lengths[1] = 0
    for count in (2, 90, 1, 1):
        extend(1, [0], count)
    cache.move(2, 3)
    extend(3, [2], 30)
    return max(found)


@pytest.mark.parametrize("padded_tokens", [0, 10_000])
@pytest.mark.parametrize("switches", WINDOWS.values(), ids=WINDOWS.keys())
def test_pieces_and_batches_many_times_the_window(model_factory, monkeypatch, switches, padded_tokens):
    monkeypatch.setattr(context_module, "PADDED_BATCH_TOKENS", padded_tokens)
    monkeypatch.setattr(context_module, "BLOCK_ROWS", 10)
    monkeypatch.setattr(context_module, "ROTARY_TABLE_POSITIONS", 60)
    model = model_factory(**switches)
    assert largest_difference(model, model) < 3e-4


def test_the_comparison_notices_a_window_off_by_one(model_factory):
    for window in (1, 7, 16):
        a, b = (model_factory(sliding_window=w) for w in (window, window + 1))
        assert min(largest_difference(a, b), largest_difference(b, a)) > 1e-2


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(("before", "seq"), [(1, 2), (100, 7), (3, 600), (1000, 300)])
def test_attention_in_two_parts(heads, kv_heads, before, seq):
    torch.manual_seed(0)
    query, num_keys = torch.randn(1, heads, seq, 8) * 3, before + seq
    key, value = torch.randn(2, 1, kv_heads, num_keys, 8)
    allowed = torch.arange(num_keys) <= torch.arange(before, num_keys)[:, None]

    def reference(allowed: Tensor) -> Tensor:
        q, k, v = query.double(), key.double(), value.double()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=0.5, enable_gqa=True).float()

    found = attend_behind(query, key, value, 0.5)
    torch.testing.assert_close(found, reference(allowed), rtol=1e-5, atol=1e-5)
    allowed[-1, 0] = False  # control: one key of one token
    assert (found - reference(allowed)).abs().max() > 1e-5
    low = attend_behind(query.bfloat16(), key.bfloat16(), value.bfloat16(), 0.5)
    assert low.dtype == torch.bfloat16 and (low.float() - found).norm() / found.norm() < 0.05


SCALINGS = {
    "llama3": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192},
    "yarn": {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 8192},
}  # fmt: skip
CONTEXT = 131_072


def hf_config(scaling: dict[str, float | str], **changes) -> Any:
    values = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": CONTEXT,
        "rope_parameters": {**scaling, "rope_theta": 500_000.0},
    }
    return transformers.LlamaConfig(**{**values, **changes})


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
def test_logits_beyond_8192_equal_those_of_transformers(tmp_path, scaling):
    torch.manual_seed(0)
    peer = transformers.LlamaForCausalLM(hf_config(scaling)).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
    peer.save_pretrained(tmp_path)
    length, last = 9_500, 1200  # compared: positions 8,300 on
    tokens = torch.randint(0, 64, (1, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = peer(tokens, logits_to_keep=last).logits[0]

    def difference(model: Transformer) -> float:
        decoder, cache = Decoder(model), KVCache(model.config, 1, length)
        hidden = torch.cat([decoder(piece, cache) for piece in tokens.split(512, 1)])
        return (decoder.logits(hidden[-last:]) - expected).abs().max().item()

    model = load_model(tmp_path)
    assert difference(model) <= 1e-5
    unscaled = Transformer(model.config.model_copy(update={"rope_scaling": None}))
    unscaled.load_state_dict(model.state_dict())
    assert difference(unscaled) > 1e-3


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
def test_rotary_tables_of_the_whole_context_equal_those_of_transformers(scaling):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from lalia.model.families.registry import from_hf

    peer = hf_config(scaling, head_dim=64)
    config = from_hf(peer.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    positions = torch.arange(CONTEXT)
    expected_cos, expected_sin = LlamaRotaryEmbedding(peer)(torch.zeros(1), positions[None])
    cos, sin = rotary_table(positions, config, 0)
    assert (cos - expected_cos[0]).abs().max() <= 1e-6
    assert (sin[:, 32:] - expected_sin[0, :, 32:]).abs().max() <= 1e-6
    # Both round the frequency and the angle to float32, which at 131,071 costs up to 0.012.
    frequency = 500_000.0 ** (-torch.arange(0, 64, 2).double() / 64)
    factor = 1.0 if config.rope_scaling is None else config.rope_scaling.attention_factor
    exact = (positions.double()[:, None] * frequency[:3]).cos() * factor  # the fast dimensions, which are not scaled
    errors = (cos[:, :3] - exact).abs().amax(0).tolist()
    assert errors[0] < 1e-6  # a whole number
    assert 1e-3 < errors[1] < 0.015
    shifted = rotary_table(positions + 1, config, 0)[0]
    assert (shifted - expected_cos[0]).abs().max() > 0.1


MEMORY = """
from pathlib import Path
import torch
from lalia.inference import context
from lalia.inference.decoder import Decoder
from lalia.model.attention import attend
from lalia.model.cache import KVCache
from lalia.model.config import ModelConfig
from lalia.model.transformer import Transformer

torch.manual_seed(0)
torch.set_num_threads(1)
length = 16384
model = Transformer(ModelConfig(
    family="llama", vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, max_position_embeddings=length))
for parameter in model.parameters():
    torch.nn.init.normal_(parameter)
decoder, tokens = Decoder(model), torch.randint(64, (1, length))

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

kept = []  # for the memory of the next cache to be new

def growth():
    cache = KVCache(model.config, 1, length)
    kept.append(cache)
    cache.reserve(1, length, exact=True)
    pieces = tokens.split(512, 1)
    for piece in pieces[:3]:
        decoder(piece, cache)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    for piece in pieces[3:]:
        decoder(piece, cache)
    return status("VmHWM") - before

def masked(query, key, value, scale):
    keys = torch.arange(key.shape[2])
    return attend(query, key, value, scale, (keys <= keys[-query.shape[2]:, None])[None, None])

growth()  # what is allocated once and kept
used = growth()
context.attend_behind = masked
print(used, growth(), model.config.cache_bytes(length) - model.config.cache_bytes(3 * 512))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_a_prefill_grows_only_with_the_cache():
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    used, with_mask, formula = map(int, run.stdout.split())
    assert used <= formula + (4 << 20)  # less where the system hands out memory in huge pages
    assert with_mask > formula + (30 << 20)  # control: 512 rows over all keys, 32 MiB


@pytest.fixture
def long_engine(model_factory, tokenizer):
    def make(**options) -> Engine:
        return Engine(model_factory(max_position_embeddings=CONTEXT), tokenizer, max_batch=3, **options)

    return make


def test_the_engine_computes_a_long_prompt_in_pieces_beside_others(long_engine):
    prompt = torch.randint(0, 300, (2500,), generator=torch.Generator().manual_seed(1)).tolist()
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    engine = long_engine(max_length=4096)
    expected = engine.submit(prompt, params)
    expected.wait()
    # Room for the prompt and all of its answer but the last token, no more.
    assert engine.cache.nbytes == engine.cache.layers[0].shape[0] * engine.decoder.config.cache_bytes(2507)
    with torch.no_grad():
        model = engine.decoder.model
        logits = model.logits(model(torch.tensor([prompt + expected.token_ids[:-1]]))[0, -8:])
    assert engine._never is not None
    assert logits.masked_fill(engine._never, float("-inf")).argmax(-1).tolist() == expected.token_ids

    other = engine.submit([5, 6, 7], SamplingParams(temperature=0, max_tokens=200, ignore_eos=True))
    engine.step()
    long = engine.submit(prompt, params)
    steps = 0
    while not long.token_ids:
        before = len(other.token_ids)
        engine.step()
        steps += 1
        assert len(other.token_ids) == before + 1  # never waits for more than a piece
    assert steps == -(-2499 // 128)
    long.wait()
    assert long.token_ids == expected.token_ids


def test_a_long_prompt_can_be_cancelled_between_pieces(long_engine):
    engine = long_engine(max_length=4096)
    request = engine.submit([1] * 4000, SamplingParams(max_tokens=5))
    for _ in range(3):
        engine.step()
    assert 1024 < engine.stats()["cached_tokens"] < 4000
    request.cancel()
    assert not engine.step()
    stats = engine.stats()
    assert request.finish_reason == "cancelled" and stats["cached_tokens"] == stats["running"] == 0
    again = engine.submit([7, 8], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    again.wait()
    fresh = long_engine().submit([7, 8], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    fresh.wait()
    assert again.token_ids == fresh.token_ids


def test_max_length_bounds_the_context_of_a_131072_model(long_engine):
    with pytest.raises(UserError, match="the context holds 4096"):
        long_engine(max_length=4096).submit([1] * 4096, SamplingParams())
    with pytest.raises(UserError, match="131072"):
        long_engine().submit([1] * CONTEXT, SamplingParams())
