"""The transformer: embedding, layers of attention and feed-forward, final norm, heads."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lalia.model.attention import Pattern, attend
from lalia.model.cache import KVCache
from lalia.model.config import ModelConfig, RopeScaling
from lalia.model.experts import FeedForward, Linear, MixtureOfExperts, elementwise
from lalia.model.functions import linear, rms_norm, rotate
from lalia.model.rotary import rotary_table


class Norm(nn.Module):
    """RMSNorm with the scale that the config asks for (w, 1 + w, or none), or LayerNorm with weight and bias."""

    def __init__(self, size: int, config: ModelConfig) -> None:
        super().__init__()
        self.eps, self.offset, self.kind = config.norm_eps, config.norm_weight == "offset", config.norm
        has_weight = config.norm_weight != "none"
        self.weight = nn.Parameter(torch.empty(size)) if has_weight else None
        self.bias = nn.Parameter(torch.empty(size)) if has_weight and config.norm == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.kind == "layer":
            weight, bias = (None if p is None else p.to(x.dtype) for p in (weight, self.bias))
            return F.layer_norm(x, x.shape[-1:], weight, bias, self.eps)
        if self.offset and weight is not None:
            weight = weight + 1.0
        return rms_norm(x, weight, self.eps)


class Attention(nn.Module):
    """Multi-head attention with grouped key-value heads, rotary positions and optional QK-norm."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.qkv = Linear(config.hidden_size, config.query_size + 2 * config.key_value_size, config.qkv_bias)
        self.output = Linear(config.query_size, config.hidden_size, config.attention_output_bias)
        if config.qk_norm != "none":
            self.query_norm = Norm(config.head_dim, config)
            self.key_norm = Norm(config.head_dim, config)
        self.scale = config.attention_scale or config.head_dim**-0.5

    def forward(self, x: Tensor, context: "Context") -> Tensor:  # x (batch, seq, hidden)
        c = self.config
        batch, seq, _ = x.shape
        heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
        qkv = self.qkv(x).view(batch, seq, heads + 2 * kv_heads, c.head_dim)
        query, key, value = qkv.split((heads, kv_heads, kv_heads), 2)  # (batch, seq, heads, head_dim)
        if c.qk_norm == "before_rope":
            query, key = self.query_norm(query), self.key_norm(key)
        if c.positions == "rope":
            cos, sin = context.rotary(self.layer)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)  # (batch, heads, seq, head_dim)
        else:
            query, key = query.transpose(1, 2), key.transpose(1, 2)
        if c.qk_norm == "after_rope":
            query, key = self.query_norm(query), self.key_norm(key)
        value = value.transpose(1, 2)
        attended = context.attend(self.layer, query, key, value, self.scale)
        return self.output(attended.transpose(1, 2).reshape(batch, seq, c.query_size))


class Block(nn.Module):
    """One layer, x the residual stream, a the attention, f the feed-forward network, n norms; dropout, where it is set,
    follows a and f:

    pre       x += a(n1(x));      x += f(n2(x))
    sandwich  x += n3(a(n1(x)));  x += n4(f(n2(x)))
    post      x = n1(x + a(x));   x = n2(x + f(x))
    parallel  x += a(n1(x)) + f(n1(x))
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.order = config.norm_order
        self.dropout = nn.Dropout(0.0)
        self.attention_norm = Norm(config.hidden_size, config)
        self.attention = Attention(config, layer)
        if self.order != "parallel":
            self.feed_forward_norm = Norm(config.hidden_size, config)
        self.feed_forward = MixtureOfExperts(config) if config.experts_of_layer(layer) else FeedForward(config)
        if self.order == "sandwich":
            self.post_attention_norm = Norm(config.hidden_size, config)
            self.post_feed_forward_norm = Norm(config.hidden_size, config)

    def forward(self, x: Tensor, context: "Context") -> Tensor:
        if self.order == "post":
            x = self.attention_norm(x + self.dropout(self.attention(x, context)))
            return self.feed_forward_norm(x + self._feed(x, context))
        normed = self.attention_norm(x)
        attended = self.dropout(self.attention(normed, context))
        if self.order == "parallel":
            return x + attended + self._feed(normed, context)
        x = x + (self.post_attention_norm(attended) if self.order == "sandwich" else attended)
        fed = self._feed(self.feed_forward_norm(x), context)
        return x + (self.post_feed_forward_norm(fed) if self.order == "sandwich" else fed)

    def _feed(self, x: Tensor, context: "Context") -> Tensor:
        if isinstance(self.feed_forward, MixtureOfExperts):
            return self.dropout(self.feed_forward(x, context.router_logits))
        return self.dropout(self.feed_forward(x))


class Transformer(nn.Module):
    """Decoder or encoder, of tokens or of image patches, as the config says.

    `forward` gives the final hidden states; `logits` the scores over the vocabulary, `pooled` one vector per sequence,
    `classify` the scores over the labels, `project` vectors in the space that the two towers of CLIP share.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        c = config
        if c.image_size is None:
            self.embedding = _embedding(c.vocab_size, c.hidden_size)
        else:
            assert c.patch_size is not None
            self.patch_embedding = Linear(c.num_channels * c.patch_size**2, c.hidden_size)
            self.class_embedding = nn.Parameter(torch.empty(c.hidden_size))
        if c.positions == "learned":
            self.position_embedding = _embedding(c.max_position_embeddings, c.hidden_size)
        if c.type_vocab_size:
            self.type_embedding = _embedding(c.type_vocab_size, c.hidden_size)
        self.embedding_norm = Norm(c.hidden_size, c) if c.embedding_norm else None
        self.dropout = nn.Dropout(0.0)
        self.layers = nn.ModuleList(Block(c, layer) for layer in range(c.num_hidden_layers))
        self.norm = None if c.norm_order == "post" else Norm(c.hidden_size, c)
        self.pooler = None if c.pooler == "none" else Linear(c.hidden_size, c.hidden_size, bias=True)
        self.head_transform = Linear(c.hidden_size, c.hidden_size, bias=True) if c.head_transform else None
        self.head_norm = Norm(c.hidden_size, c) if c.head_transform else None
        has_head = c.head == "language_model"
        self.head = Linear(c.hidden_size, c.vocab_size) if has_head and not c.tie_word_embeddings else None
        self.head_bias = nn.Parameter(torch.empty(c.vocab_size)) if has_head and c.head_bias else None
        self.classifier = Linear(c.hidden_size, len(c.labels), bias=True) if c.head == "classifier" else None
        self.projection = Linear(c.hidden_size, c.projection_size) if c.projection_size else None
        self.compute_dtype = torch.float32
        """dtype of the activations; weights stay as they are and are cast where they are used."""
        self.make_context: Callable[..., Context] = Context
        """Another one stands here where rows are divided among processes."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def set_dropout(self, share: float) -> None:
        """Share of the values that training sets to 0 in the embedding and in what each layer's attention and
        feed-forward network add to the residual stream (Srivastava et al. 2014; where GPT-2 has it outside attention).
        """
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = share

    @property
    def head_weight(self) -> Tensor:
        """(vocab_size, hidden_size)"""
        assert self.config.head == "language_model", "this model has no language-model head"
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
        token_types: Tensor | None = None,
        router_logits: list[Tensor] | None = None,
    ) -> Tensor:
        """Final hidden states.

        Args:
            tokens: (batch, seq) token ids; for a model of images, (batch, channels, image_size, image_size) pixels.
            positions: (batch, seq) or (seq,) positions; default 0, 1, 2, ... Not with a cache, which has its own.
            document_ids: (batch, seq); a token attends only to tokens of its own document. None means one document.
                Padding is a document of its own.
            cache: computed keys and values to attend to; the new ones are appended, lengths are not advanced.
            token_types: (batch, seq) segment of each token, for models with `type_vocab_size`; default 0.
            router_logits: receives the logits (batch * seq, num_experts) of every layer that has experts.

        Returns:
            (batch, seq, hidden_size); for images seq is the class token and then the patches, row by row.
        """
        c = self.config
        x = self._embed_tokens(tokens) if c.image_size is None else self._embed_image(tokens)  # (batch, seq, hidden)
        context = self.make_context(c, x, positions, document_ids, cache, router_logits)
        if c.positions == "learned":
            x = x + self.position_embedding(context.positions).to(x.dtype)
        if c.type_vocab_size:
            types = torch.zeros_like(tokens) if token_types is None else token_types
            x = x + self.type_embedding(types).to(x.dtype)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        x = self.dropout(x)
        if self.training:
            context.prepare()
        for layer in self.layers:
            x = layer(x, context)
        return x if self.norm is None else self.norm(x)

    def _embed_tokens(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).to(self.compute_dtype)
        if self.config.embedding_multiplier != 1.0:
            # The factor is rounded to the activation's dtype, as Gemma was trained.
            x = x * torch.tensor(self.config.embedding_multiplier, dtype=x.dtype)
        return x

    def _embed_image(self, pixels: Tensor) -> Tensor:
        patch = self.config.patch_size or 0
        cut = F.unfold(pixels.to(self.compute_dtype), patch, stride=patch)  # (batch, channels * patch^2, patches)
        patches = self.patch_embedding(cut.transpose(1, 2))
        first = self.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        return torch.cat((first, patches), 1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary, soft-capped if the config says so: (..., hidden_size) -> (..., vocab_size)."""
        c = self.config
        logits = linear(self.before_head(hidden), self.head_weight, self.head_bias)
        if c.output_multiplier != 1.0:
            logits = logits * c.output_multiplier
        return torch.tanh(logits / c.logit_softcap) * c.logit_softcap if c.logit_softcap else logits

    def before_head(self, hidden: Tensor) -> Tensor:
        """What the head's matrix multiplies: the hidden states, transformed first where the config says so."""
        if self.head_transform is None or self.head_norm is None:
            return hidden
        return self.head_norm(elementwise(self.head_transform(hidden), self.config.activation))

    def pooled(self, hidden: Tensor) -> Tensor:
        """The first token's state, through the pooler if there is one: (batch, seq, hidden) -> (batch, hidden)."""
        first = hidden[:, 0]
        if self.pooler is None:
            return first
        return torch.tanh(self.pooler(first)) if self.config.pooler == "tanh" else torch.relu(self.pooler(first))

    def classify(self, hidden: Tensor) -> Tensor:
        """Scores over the labels: (batch, seq, hidden) -> (batch, labels)."""
        assert self.classifier is not None, "this model has no classifier"
        return self.classifier(self.pooled(hidden))

    def project(self, states: Tensor) -> Tensor:
        """(..., hidden_size) -> (..., projection_size)"""
        assert self.projection is not None, "this model has no projection"
        return self.projection(states)

    def num_parameters(self) -> int:
        """Number of distinct weights (a tied head counts once)."""
        return sum(p.numel() for p in self.parameters())


def _embedding(count: int, size: int) -> nn.Embedding:
    # nn.Embedding(...) would draw random weights, for whoever made the model to overwrite; on the meta device that
    # costs seconds of imports.
    return nn.Embedding.from_pretrained(torch.empty(count, size), freeze=False)


class Context:
    """What every layer of one forward pass shares: positions, rotary tables, masks, cache."""

    def __init__(
        self,
        config: ModelConfig,
        x: Tensor,
        positions: Tensor | None,
        document_ids: Tensor | None,
        cache: KVCache | None,
        router_logits: list[Tensor] | None,
    ) -> None:
        batch, seq = x.shape[:2]
        self.config, self.cache, self.dtype = config, cache, x.dtype
        self.document_ids, self.router_logits = document_ids, router_logits
        assert positions is None or cache is None, "a cache has its own positions"
        assert cache is None or config.causal, "only a causal model can use a cache"
        if positions is None:
            positions = torch.arange(seq, device=x.device) if cache is None else cache.positions(batch, seq)
        self.positions = positions
        self.seq = seq
        self._rotary: dict[tuple[float, RopeScaling | None], tuple[Tensor, Tensor]] = {}
        self._masks: dict[int | None, Tensor | Pattern | None] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """What the tokens of this pass see: (batch, heads, seq, head_dim), of their own keys and values of as many."""
        c = self.config
        if self.cache is not None:
            key, value = self.cache.append(layer, key, value, self.positions)
        mask = self.mask(c.window_of_layer(layer))
        return attend(query, key, value, scale, mask, c.causal, c.attention_softcap)

    def prepare(self) -> None:
        """Make all tables and masks beforehand, so that no layer differs from another and all share one compilation."""
        for layer in range(self.config.num_hidden_layers):
            if self.config.positions == "rope":
                self.rotary(layer)
            self.mask(self.config.window_of_layer(layer))

    def rotary(self, layer: int) -> tuple[Tensor, Tensor]:
        """cos and sin tables of a layer; layers with the same base share one."""
        rope = self.config.rope_of_layer(layer)
        if rope not in self._rotary:
            cos, sin = rotary_table(self.positions, self.config, layer)
            self._rotary[rope] = (cos.to(self.dtype), sin.to(self.dtype))
        return self._rotary[rope]

    def mask(self, window: int | None) -> Tensor | Pattern | None:
        """What `attend` takes; None where no mask is needed, or where plain causal attention is exact."""
        if self.cache is None and window is not None and window >= self.seq:
            window = None
        if window not in self._masks:
            self._masks[window] = self._make_mask(window)
        return self._masks[window]

    def _make_mask(self, window: int | None) -> Tensor | Pattern | None:
        if self.cache is None:
            if self.document_ids is None and window is None:
                return None
            return Pattern(self.seq, self.config.causal, window, self.document_ids, self.positions.device)
        query = self.positions  # (batch, seq)
        key = self.cache.key_positions(query, window)  # (batch, keys)
        if query.shape[0] == 1 and window is None and (self.seq == 1 or key.shape[1] == self.seq):
            return None
        query, key = query[:, :, None], key[:, None, :]
        allowed = key <= query  # (batch, seq, keys)
        if window is not None:
            allowed &= (key > query - window) & (key >= 0)
        if self.document_ids is not None:
            allowed = allowed & (self.document_ids[:, :, None] == self.document_ids[:, None, :])
        return allowed.unsqueeze(1)
