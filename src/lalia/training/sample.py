"""A text from a model in training: plain sampling, enough to see whether it learns."""

import torch

from lalia.model.transformer import Transformer
from lalia.tokenizer.bpe import Tokenizer


@torch.no_grad()
def sample_text(model: Transformer, tokenizer: Tokenizer, max_tokens: int, seed: int, temperature: float = 0.8) -> str:
    """Sample from the start of a document until its end or `max_tokens`; the seed alone decides the randomness."""
    generator = torch.Generator().manual_seed(seed)
    limit = min(max_tokens, model.config.max_position_embeddings - 1)
    ids = [tokenizer.end_of_text_id]
    for _ in range(limit):
        # Without a cache: for a few tokens it saves little, and a model that several processes share has no such.
        # Always of one length, which a causal model does not see: a compiled one is compiled anew for every other.
        padded = ids + [tokenizer.end_of_text_id] * (limit - len(ids))
        hidden = model(torch.tensor([padded], device=model.device))
        probabilities = torch.softmax(model.logits(hidden[0, len(ids) - 1]).float().cpu() / temperature, -1)
        token = int(torch.multinomial(probabilities, 1, generator=generator))
        if token == tokenizer.end_of_text_id:
            break
        ids.append(token)
    return tokenizer.decode(ids[1:])
