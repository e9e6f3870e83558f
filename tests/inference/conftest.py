import pytest
import torch

from lalia.inference.engine import Engine
from lalia.model.config import ModelConfig
from lalia.model.transformer import Transformer
from lalia.tokenizer.bpe import Tokenizer, train_tokenizer
from lalia.tokenizer.config import TokenizerConfig

TEXT = (
    "To be, or not to be, that is the question: Whether 'tis nobler in the mind to suffer the slings and arrows of "
    "outrageous fortune, or to take arms against a sea of troubles, and by opposing end them. To die, to sleep, no "
    "more; and by a sleep to say we end the heart-ache and the thousand natural shocks that flesh is heir to."
)
PADDED_VOCAB_SIZE = 352
"""Rows of the embedding: more than the tokenizer's 320 ids, as in models padded to a round number."""


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT], TokenizerConfig(vocab_size=320))


def make_model(seed: int = 0, **changes) -> Transformer:
    """Random weights, large enough that the model has strong opinions and greedy choices are no ties."""
    values = {
        "vocab_size": PADDED_VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 300,
        "qk_norm": "before_rope",
    }
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**{**values, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    return model


@pytest.fixture
def model_factory():
    return make_model


@pytest.fixture(scope="session")
def model() -> Transformer:
    return make_model()


@pytest.fixture
def engine(model, tokenizer) -> Engine:
    return Engine(model, tokenizer, max_batch=4)
