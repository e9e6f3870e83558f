"""The transformer: token embedding, layers of attention and feed-forward, final norm, head."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lalia.model.attention import attend
from lalia.model.cache import KVCache
from lalia.model.config import ModelConfig
from lalia.model.functions import linear, relu_squared, rms_norm, rotary_table, rotate, swiglu


class Linear(nn.Module):
    """y = x W^T, with the weight cast to the activation's dtype, so that the activation alone decides the precision."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class RMSNorm(nn.Module):
    """RMSNorm with the scale that the config asks for (w, 1 + w, or none)."""

    def __init__(self, size: int, config: ModelConfig) -> None:
        super().__init__()
        self.eps, self.offset = config.rms_norm_eps, config.norm_weight == "offset"
        self.weight = nn.Parameter(torch.empty(size)) if config.norm_weight != "none" else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.offset and weight is not None:
            weight = weight + 1.0
        return rms_norm(x, weight, self.eps)


class Attention(nn.Module):
    """Multi-head attention with grouped key-value heads, rotary positions and optional QK-norm."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.qkv = Linear(config.hidden_size, config.query_size + 2 * config.key_value_size)
        self.output = Linear(config.query_size, config.hidden_size)
        if config.qk_norm != "none":
            self.query_norm = RMSNorm(config.head_dim, config)
            self.key_norm = RMSNorm(config.head_dim, config)
        self.scale = config.attention_scale or config.head_dim**-0.5

    def forward(self, x: Tensor, context: "Context") -> Tensor:  # x (batch, seq, hidden)
        c = self.config
        batch, seq, _ = x.shape
        heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
        qkv = self.qkv(x).view(batch, seq, heads + 2 * kv_heads, c.head_dim)
        query, key, value = qkv.split((heads, kv_heads, kv_heads), 2)  # (batch, seq, heads, head_dim)
        window = c.window_of_layer(self.layer)
        cos, sin = context.rotary(window)
        if c.qk_norm == "before_rope":
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)  # (batch, heads, seq, head_dim)
        if c.qk_norm == "after_rope":
            query, key = self.query_norm(query), self.key_norm(key)
        value = value.transpose(1, 2)
        if context.cache is not None:
            key, value = context.cache.append(self.layer, key, value, context.positions, context.num_keys)
        mask = context.mask(window)
        attended = attend(query, key, value, self.scale, mask, causal=mask is None and seq > 1)
        return self.output(attended.transpose(1, 2).reshape(batch, seq, c.query_size))


class FeedForward(nn.Module):
    """Gated (SwiGLU, GeGLU) or plain (relu squared) feed-forward network."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gated, self.activation = config.gated, config.activation
        self.up = Linear(config.hidden_size, config.intermediate_size * (2 if config.gated else 1))
        self.down = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)  # gated: gate then up along the last dimension
        if self.gated and self.activation == "silu":
            return self.down(swiglu(x))
        gate, up = x.chunk(2, -1) if self.gated else (x, None)
        if self.activation == "relu_squared":
            gate = relu_squared(gate)
        elif self.activation == "gelu_tanh":
            gate = F.gelu(gate, approximate="tanh")
        else:
            gate = F.silu(gate)
        return self.down(gate if up is None else gate * up)


class Block(nn.Module):
    """One layer: x += attention(norm(x)); x += feed_forward(norm(x)), with norms after them too under "sandwich"."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.sandwich = config.norm_order == "sandwich"
        self.attention_norm = RMSNorm(config.hidden_size, config)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config)
        self.feed_forward = FeedForward(config)
        if self.sandwich:
            self.post_attention_norm = RMSNorm(config.hidden_size, config)
            self.post_feed_forward_norm = RMSNorm(config.hidden_size, config)

    def forward(self, x: Tensor, context: "Context") -> Tensor:
        attended = self.attention(self.attention_norm(x), context)
        x = x + (self.post_attention_norm(attended) if self.sandwich else attended)
        fed = self.feed_forward(self.feed_forward_norm(x))
        return x + (self.post_feed_forward_norm(fed) if self.sandwich else fed)


class Transformer(nn.Module):
    """Decoder-only transformer. `forward` gives the final hidden states, `logits` the scores over the vocabulary."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # nn.Embedding(...) would draw random weights, for whoever made the model to overwrite; on the meta device that
        # costs seconds of imports.
        self.embedding = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size), freeze=False)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config)
        self.head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)
        self.compute_dtype = torch.float32
        """dtype of the activations; weights stay as they are and are cast where they are used."""

    @property
    def head_weight(self) -> Tensor:
        """(vocab_size, hidden_size)"""
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Final hidden states.

        Args:
            tokens: (batch, seq) token ids.
            positions: (batch, seq) or (seq,) positions; default 0, 1, 2, ... Not with a cache, which has its own.
            document_ids: (batch, seq); a token attends only to tokens of its own document. None means one document.
            cache: computed keys and values to attend to; the new ones are appended, lengths are not advanced.

        Returns:
            (batch, seq, hidden_size)
        """
        c = self.config
        context = Context(c, tokens, positions, document_ids, cache, self.compute_dtype)
        x = self.embedding(tokens).to(self.compute_dtype)  # (batch, seq, hidden)
        if c.embedding_multiplier != 1.0:
            x = x * torch.tensor(c.embedding_multiplier, dtype=x.dtype)
        if c.embedding_norm:
            x = rms_norm(x, None, c.rms_norm_eps)
        for layer in self.layers:
            x = layer(x, context)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary, soft-capped if the config says so: (..., hidden_size) -> (..., vocab_size)."""
        logits = linear(hidden, self.head_weight)
        cap = self.config.logit_softcap
        return torch.tanh(logits / cap) * cap if cap else logits

    def num_parameters(self) -> int:
        """Number of distinct weights (a tied head counts once)."""
        return sum(p.numel() for p in self.parameters())


class Context:
    """What every layer of one forward pass shares: positions, rotary tables, masks, cache."""

    def __init__(
        self,
        config: ModelConfig,
        tokens: Tensor,
        positions: Tensor | None,
        document_ids: Tensor | None,
        cache: KVCache | None,
        dtype: torch.dtype,
    ) -> None:
        batch, seq = tokens.shape
        self.config, self.cache, self.dtype = config, cache, dtype
        self.document_ids = document_ids
        assert positions is None or cache is None, "a cache has its own positions"
        if positions is None:
            positions = torch.arange(seq, device=tokens.device) if cache is None else cache.positions(batch, seq)
        self.positions = positions
        self.seq = seq
        self.num_keys = seq if cache is None else int(positions.max()) + 1
        self._rotary: dict[float, tuple[Tensor, Tensor]] = {}
        self._masks: dict[int | None, Tensor | None] = {}

    def rotary(self, window: int | None) -> tuple[Tensor, Tensor]:
        """cos and sin tables of a layer with this window."""
        c = self.config
        theta = c.rope_theta_local if window is not None and c.rope_theta_local is not None else c.rope_theta
        if theta not in self._rotary:
            cos, sin = rotary_table(self.positions, c.head_dim, theta, c.rope_direction)
            self._rotary[theta] = (cos.to(self.dtype), sin.to(self.dtype))
        return self._rotary[theta]

    def mask(self, window: int | None) -> Tensor | None:
        """Boolean mask (batch or 1, 1, seq, keys), True where allowed; None where plain causal attention is exact."""
        if window is not None and window >= self.num_keys:
            window = None
        if window not in self._masks:
            self._masks[window] = self._make_mask(window)
        return self._masks[window]

    def _make_mask(self, window: int | None) -> Tensor | None:
        if self.cache is None:
            if self.document_ids is None and window is None:
                return None
            query = torch.arange(self.seq, device=self.positions.device)[None, :]  # (1, seq)
        else:
            query = self.positions  # (batch, seq)
            if query.shape[0] == 1 and window is None and (self.seq == 1 or self.num_keys == self.seq):
                return None
        key = torch.arange(self.num_keys, device=query.device)
        allowed = key <= query[..., None]  # (batch or 1, seq, keys)
        if window is not None:
            allowed &= key > query[..., None] - window
        if self.document_ids is not None:
            allowed = allowed & (self.document_ids[:, :, None] == self.document_ids[:, None, :])
        return cast(Tensor, allowed).unsqueeze(1)
