"""Texts sampled while a model trains."""

from typing import Any

import torch

from lalia.model.transformer import Transformer
from lalia.tokenizer.bpe import Tokenizer, train_tokenizer
from lalia.tokenizer.config import TokenizerConfig
from lalia.training.sample import sample_text
from tests.tokenizer.conftest import make_random_texts
from tests.training.conftest import tiny_model


def plainly_sampled(model: Transformer, tokenizer: Tokenizer, max_tokens: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    ids = [tokenizer.end_of_text_id]
    for _ in range(max_tokens):
        scores = model.logits(model(torch.tensor([ids]))[0, -1]) / 0.8
        ids.append(int(torch.multinomial(torch.softmax(scores, -1), 1, generator=generator)))
        if ids[-1] == tokenizer.end_of_text_id:
            return tokenizer.decode(ids[1:-1])
    return tokenizer.decode(ids[1:])


@torch.no_grad()
def test_every_pass_has_one_length_and_the_text_is_that_of_any_length() -> None:
    tokenizer = train_tokenizer(make_random_texts(200), TokenizerConfig(vocab_size=320))
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    lengths: list[int] = []
    model.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    texts: list[Any] = [sample_text(model, tokenizer, max_tokens=12, seed=seed) for seed in range(5)]
    assert set(lengths) == {12}  # a compiled model is compiled anew for every other
    assert texts == [plainly_sampled(model, tokenizer, 12, seed) for seed in range(5)]
    assert len(set(texts)) == 5
