import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gguf import quants
from gguf.constants import GGMLQuantizationType
from torch import Tensor, nn

from lalia.errors import UserError
from lalia.formats.gguf.groups import EXACT, codes_of
from lalia.formats.hf_folder import SafetensorFiles, read_config, save_model
from lalia.formats.weights import assemble
from lalia.inference import quantization
from lalia.inference.decoder import Decoder, Linear
from lalia.inference.language_model import LanguageModel
from lalia.inference.quantization import (
    Groups,
    QuantizedLinear,
    QuantizedWeight,
    quantization_report,
    quantize,
    quantize_model,
    quantized_reader,
    quantized_weight,
)
from lalia.model.cache import KVCache
from lalia.model.transformer import Transformer

BFLOAT16_ERROR = 2.0**-8
"""Relative distance of neighbouring bfloat16 numbers: the kernel rounds activations and results to them."""
SHAPES = [(64, 96), (100, 64), (33, 128), (16, 32), (4112, 64)]
"""Rows that are no multiple of what the kernel takes, and more than one chunk of them, included."""


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_rows", [1, 3, 17])
@pytest.mark.parametrize("copy", [False, True])
def test_the_kernel_is_the_product_with_the_dequantized_weights(bits, shape, num_rows, copy):
    groups = quantize(random(*shape), bits)
    x, bias = random(num_rows, shape[1], seed=2), random(shape[0], seed=3)
    expected = x.bfloat16().float() @ groups.dequantized().t() + bias
    found = QuantizedLinear(groups, copy)(x, bias)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert relative(found, expected) < BFLOAT16_ERROR


@pytest.mark.parametrize("bits", [4, 8])
def test_the_comparison_notices_a_wrong_zero_point_or_group(bits):
    groups = quantize(random(64, 128), bits, group=32)
    x = random(3, 128, seed=2)
    found = QuantizedLinear(groups)(x)

    def error(wrong: Groups) -> float:
        return relative(found, x.bfloat16().float() @ wrong.dequantized().t())

    assert error(groups) < BFLOAT16_ERROR
    shifted = Groups(groups.codes, groups.scale, groups.offset + groups.scale, bits)
    assert error(shifted) > 1.5 * BFLOAT16_ERROR
    neighbours = Groups(groups.codes, groups.scale.roll(1, 1), groups.offset.roll(1, 1), bits)
    assert error(neighbours) > 10 * BFLOAT16_ERROR
    larger = Groups(groups.codes, groups.scale[:, ::2], groups.offset[:, ::2], bits)
    assert larger.group == 64 and error(larger) > 10 * BFLOAT16_ERROR


@pytest.mark.parametrize(("bits", "steps"), [(4, 15), (8, 254)])
def test_rounding_is_to_the_nearest_code(bits, steps):
    weight = random(48, 64)
    groups = quantize(weight, bits, group=32)
    blocks = weight.view(48, 2, 32)
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    if bits == 8:
        high = torch.maximum(high, -low)
        low = -high
    step = (high - low) / steps
    # Half a step, and what rounding scale and zero to bfloat16 can add at the ends of a group.
    assert bool(((groups.dequantized().view_as(blocks) - blocks).abs() <= step * (0.5 + steps * 2.0**-8)).all())
    assert groups.num_bytes() == 48 * 64 * bits // 8 + 96 * bits


def test_eight_bits_are_closer_than_four():
    weight = random(64, 128)
    errors = [relative(quantize(weight, bits).dequantized(), weight) for bits in (4, 8)]
    assert 0.03 < errors[0] < 0.12 and errors[1] < 0.01


def test_constant_and_zero_groups():
    weight = torch.zeros(16, 64)
    weight[1] = 0.5
    for bits in (4, 8):
        torch.testing.assert_close(quantize(weight, bits).dequantized(), weight, rtol=0.01, atol=0)


def test_weights_that_are_no_numbers_are_refused():
    weight = random(16, 32)
    weight[3, 4] = math.nan
    with pytest.raises(UserError, match="NaN"):
        quantize(weight, 4)


@pytest.mark.parametrize("kind", sorted(EXACT))
def test_the_blocks_of_gguf_are_taken_exactly(kind):
    number = GGMLQuantizationType[kind]
    columns = 512
    _, block_bytes = quants.GGML_QUANT_SIZES[number]  # pyright: ignore[reportPrivateImportUsage]
    weights_per_block = quants.GGML_QUANT_SIZES[number][0]  # pyright: ignore[reportPrivateImportUsage]
    generator = np.random.default_rng(1)
    raw = generator.integers(0, 256, (20, columns // weights_per_block, block_bytes), dtype=np.uint8)
    halves = 1 if kind in ("Q4_0", "Q5_0", "Q8_0") else 2
    scales = generator.normal(size=(*raw.shape[:2], halves)).astype(np.float16)
    raw[..., : 2 * halves] = scales.view(np.uint8)
    expected = torch.from_numpy(quants.dequantize(raw.reshape(20, -1), number))
    codes = codes_of(kind, torch.from_numpy(raw.reshape(20, -1)))
    groups = Groups(*codes)
    assert groups.bits == (4 if kind.startswith("Q4") else 8) and groups.group == 32
    torch.testing.assert_close(groups.dequantized(), expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())
    # The kernel's scales are bfloat16: a relative error of 2^-9 of the scale and of the middle of a group.
    x = random(1, columns, seed=2)
    assert relative(QuantizedLinear(groups)(x), x @ expected.t()) < 3 * BFLOAT16_ERROR


def test_a_weight_looks_rows_up_and_multiplies_but_does_nothing_else():
    groups = quantize(random(40, 32), 8)
    weight = quantized_weight(groups, lookup=True, product=True, copy=False, note="")
    assert weight.shape == (40, 32) and weight.numel() == 1280 and weight.device.type == "cpu"
    ids = torch.tensor([[3, 39], [0, 3]])
    torch.testing.assert_close(F.embedding(ids, weight), groups.dequantized()[ids])
    x = random(2, 5, 32)
    torch.testing.assert_close(F.linear(x, weight), x @ groups.dequantized().t(), rtol=0.05, atol=0.1)
    operations = (
        lambda: weight + 1,
        lambda: weight.sum(),
        lambda: weight.requires_grad_(True),
        lambda: weight.t(),
        lambda: weight.copy_(random(40, 32)),
        lambda: list(weight),
        lambda: F.linear(x.requires_grad_(), weight),
    )
    for operation in operations:
        with pytest.raises(UserError, match="quantised"):
            operation()


def quantized_copy(model: Transformer, how, model_factory, **changes) -> Transformer:
    copy = model_factory(**changes)
    copy.load_state_dict(model.state_dict())
    quantize_model(copy, how)
    return copy


BIASES = {"qkv_bias": True, "attention_output_bias": True, "feed_forward_bias": True}
FAMILIES = {
    "qwen3": {},
    "biases": {"family": "phi", "norm": "layer", "norm_order": "parallel", "gated": False, **BIASES},
    "untied": {"tie_word_embeddings": False},
    "experts": {"family": "mixtral", "num_experts": 4, "num_experts_per_token": 2},
}
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


@pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES.keys())
@pytest.mark.parametrize("how", ["int8", "int4"])
def test_the_decoder_computes_with_the_dequantized_weights(model_factory, changes, how):
    changes = WIDE | changes
    model = model_factory(**changes)
    quantized = quantized_copy(model, how, model_factory, **changes)
    report = {row["name"]: row for row in quantization_report(quantized)}
    assert all(row["kind"] == how for name, row in report.items() if quantization.QUANTIZED.fullmatch(name))
    reference = model_factory(**changes)
    state = model.state_dict()
    for name, weight in quantized.named_parameters():
        if isinstance(weight, QuantizedWeight):
            bits = quantization.BITS[how]
            matrices = list(state[name]) if state[name].dim() == 3 else [state[name]]
            values = [quantize(matrix, bits).dequantized() for matrix in matrices]
            state[name] = torch.stack(values) if state[name].dim() == 3 else values[0]
    reference.load_state_dict(state)
    tokens = torch.randint(0, 300, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference.logits(reference(tokens))[0]
        from_model = quantized.logits(quantized(tokens))[0] if changes.get("family") != "mixtral" else None
        float_logits = model.logits(model(tokens))[0]
    decoder, cache = Decoder(quantized), KVCache(quantized.config, 1, 32)
    found = [decoder.logits(decoder(tokens[:, :20], cache))]
    found += [decoder.logits(decoder(tokens[:, i : i + 1], cache)) for i in range(20, 24)]
    assert relative(torch.cat(found), expected) < 0.05
    if from_model is not None:
        assert relative(from_model, expected) < 0.05
    if how == "int4":  # the comparison would notice the weights before rounding
        assert relative(float_logits, expected) > 0.1


def test_odd_rows_stay_in_floating_point_and_are_reported(model_factory):
    model = model_factory(hidden_size=32, intermediate_size=48)
    rows = {row["name"]: row for row in quantize_model(model, "int4")}
    odd, whole = rows["layers.0.feed_forward.down.weight"], rows["layers.0.feed_forward.up.weight"]
    assert odd["kind"] == "float32" and "48 are no multiple of 32" in odd["note"]
    assert whole["kind"] == "int4" and whole["group"] == 32
    Decoder(model)(torch.tensor([[1, 2]]), KVCache(model.config, 1, 8))


def test_training_and_saving_are_refused(model_factory, tmp_path):
    model = model_factory()
    quantize_model(model, "int8")
    with pytest.raises(UserError, match="quantised"):
        model.requires_grad_(True)
    with pytest.raises(UserError, match="quantised"):
        save_model(model, tmp_path / "model")
    with pytest.raises(UserError, match="int8 or int4"):
        quantize_model(model, "int2")  # pyright: ignore[reportArgumentType]


def test_a_folder_is_quantized_while_it_is_read(model_factory, tmp_path):
    model = model_factory()
    save_model(model, tmp_path)
    with SafetensorFiles(tmp_path) as source:
        read = assemble(read_config(tmp_path), source, torch.float32, reader=quantized_reader(source, "int4"))
        same = assemble(read_config(tmp_path), source, torch.float32, reader=quantized_reader(source, None))
    assert not quantization.is_quantized(same)
    quantize_model(model, "int4")
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(read.logits(read(tokens)), model.logits(model(tokens)))


def test_bytes_of_a_step(model_factory):
    model = model_factory(**WIDE)
    full = quantization.weight_bytes(model, torch.float32)
    quantize_model(model, "int4")
    matrices = sum(p.numel() for p in model.parameters() if isinstance(p, QuantizedWeight))
    kept = sum(p.numel() for p in model.parameters() if not isinstance(p, QuantizedWeight))
    assert full == 4 * (matrices + kept)
    assert quantization.weight_bytes(model, torch.float32) == matrices * 5 // 8 + 4 * kept  # 4 bits + 32 / 32


def test_generation_with_quantized_weights_is_the_same_alone_and_in_a_batch(model_factory, tokenizer, monkeypatch):
    monkeypatch.setattr(quantization, "COPY_LIMIT_BYTES", 0)  # the copy rounds otherwise than the kernel
    model = model_factory(**WIDE)
    quantize_model(model, "int8")
    language_model = LanguageModel(model, tokenizer, max_batch=4)
    prompts = ["To be", "or not", "the slings"]
    together = language_model.generate(prompts, max_tokens=8, temperature=0.0)
    alone = [language_model.generate(prompt, max_tokens=8, temperature=0.0) for prompt in prompts]
    assert [g.token_ids for g in together] == [g.token_ids for g in alone]


def test_linear_of_the_decoder_takes_a_bias():
    groups = quantize(random(48, 32), 4)
    weight = quantized_weight(groups, lookup=False, product=True, copy=False, note="")
    bias, x = nn.Parameter(random(48, seed=2)), random(1, 32, seed=3)
    with torch.inference_mode():
        found = Linear(weight, bias, torch.float32, copy=True)(x)
        torch.testing.assert_close(found - bias, Linear(weight, None, torch.float32, copy=True)(x))
