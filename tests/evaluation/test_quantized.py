import math

import pytest
import torch

from lalia.errors import UserError
from lalia.evaluation.quantized import compare_quantized, score
from lalia.formats.hf_folder import save_model
from lalia.inference.language_model import load
from lalia.model.config import ModelConfig
from lalia.model.transformer import Transformer
from lalia.tokenizer.bpe import train_tokenizer
from lalia.tokenizer.config import TokenizerConfig
from lalia.training.bits_per_byte import bits_per_byte
from lalia.training.trainer import initialize

TEXT = (
    "To be, or not to be, that is the question: Whether 'tis nobler in the mind to suffer the slings and arrows of "
    "outrageous fortune, or to take arms against a sea of troubles, and by opposing end them. "
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that has learned TEXT, so that a broken weight costs it dearly."""
    folder = tmp_path_factory.mktemp("trained")
    tokenizer = train_tokenizer([TEXT], TokenizerConfig(vocab_size=320))
    config = ModelConfig(
        family="qwen3",
        qk_norm="before_rope",
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
    )
    model = Transformer(config)
    initialize(model, seed=1)
    ids = torch.tensor([tokenizer.encode(TEXT)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model.logits(model(ids[:, :-1]))[0], ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_model(model.eval(), folder)
    tokenizer.save(folder)
    return folder


def test_bits_per_byte_before_and_after(folder):
    results = {how: compare_quantized(folder, [TEXT], how) for how in ("int8", "int4")}
    for result in results.values():
        assert 0 < result["before"]["bits_per_byte"] < 1.0  # it has learned something that can be lost
        assert result["after"]["size_bytes"] < result["before"]["size_bytes"] / 2
        assert result["after"]["tokens_per_second"] > 0
        assert result["bytes"] == len(TEXT)
    before = results["int8"]["before"]["bits_per_byte"]
    assert abs(results["int8"]["after"]["bits_per_byte"] - before) < 0.02
    assert 0.0 < abs(results["int4"]["after"]["bits_per_byte"] - before) < 0.3
    assert results["int8"]["after"]["size_bytes"] > results["int4"]["after"]["size_bytes"]
    assert set(results["int4"]["kinds"]) == {"int4", "float32"}


def test_the_scores_are_those_of_bits_per_byte(folder):
    model = load(folder)
    ids = model.encode(TEXT)
    nats, tokens, size = score(model, [TEXT])
    expected = bits_per_byte(model.model, [(ids, len(TEXT))], window=128)
    assert nats / math.log(2) / size == pytest.approx(expected, rel=1e-4)
    assert tokens == len(ids) - 1


def test_texts_without_anything_to_score_are_refused(folder):
    with pytest.raises(UserError, match="two tokens"):
        compare_quantized(folder, [""], "int8")
    with pytest.raises(UserError, match="int8 or int4"):
        compare_quantized(folder, [TEXT], "int2")  # pyright: ignore[reportArgumentType]
