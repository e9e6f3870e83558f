"""The transformer arranged for generating: the arithmetic of `lalia.model.transformer` in few, short operations.

Generating one token is bound by reading the weights and, in a small model, by the cost of starting each operation.
So this form, which needs no gradients,

* works on a flat (rows, hidden) activation in place, with plain tensors instead of modules;
* keeps each weight in the layout that is fastest for the number of rows (see `Linear`);
* writes keys and values into the cache with one operation, and reads no more of it than is filled.

tests/inference/test_decoder.py holds it to the transformer's own forward pass for every switch of the config.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lalia.model.cache import KVCache
from lalia.model.config import ModelConfig
from lalia.model.functions import rotary_table
from lalia.model.transformer import Block, RMSNorm, Transformer

COPY_LIMIT_BYTES = 1 << 30
"""Models with more bytes of weights than this are not copied into other layouts: memory matters more there."""

PADDED_BATCH_TOKENS = 192
"""Up to this many cached tokens in the longest sequence, a batch attends in one padded operation; beyond, sequence by
sequence, which reads no padding but starts an operation for each."""


class Decoder:
    """Forward passes over cached sequences, without gradients.

    The weights are copies: `refresh` takes over changes of the model, as between steps of training.

    Attributes:
        dtype, device: of the activations.
        weight_bytes: what one step reads.
    """

    def __init__(self, model: Transformer) -> None:
        self.model, self.config = model, model.config
        self._versions: list[tuple[int, int]] = []
        self._rotary: dict[float, tuple[Tensor, Tensor]] = {}
        self.refresh()

    def refresh(self) -> bool:
        """Take over the model's weights if they changed since the last call; says whether they had.

        A change is seen by the parameter's version counter or address, so optimizer steps and `load_state_dict` are;
        writing through `parameter.data` is not.
        """
        versions = [(p.data_ptr(), p._version) for p in self.model.parameters()]
        dtype = self.model.compute_dtype
        if self._versions == versions and self.dtype == dtype:
            return False
        c, model = self.config, self.model
        self._versions, self.dtype, self.device = versions, dtype, model.embedding.weight.device
        self.weight_bytes = sum(p.numel() for p in model.parameters()) * dtype.itemsize
        copy = self.weight_bytes <= COPY_LIMIT_BYTES
        with torch.inference_mode():
            self.embedding = model.embedding.weight.detach().to(dtype)
            self.layers = [
                _Layer(cast(Block, block), number, c, dtype, copy) for number, block in enumerate(model.layers)
            ]
            weight = _norm_weight(model.norm, self.embedding, c.hidden_size)
            self.norm = _Norm(weight, c.rms_norm_eps, dtype)
            self.head = Linear(model.head_weight, dtype, copy)
        return True

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Compute tokens behind those in the cache, from slot `cache.first` on, and advance the cache's lengths.

        Args:
            tokens: (batch, seq) ids, with seq = 1 (one token of each of `batch` sequences) or batch = 1 (a piece of
                one sequence).

        Returns:
            Final hidden states (batch * seq, hidden_size).
        """
        c = self.config
        batch, seq = tokens.shape
        assert batch == 1 or seq == 1
        context = _Context(self, cache, batch, seq)
        x = F.embedding(tokens.view(-1), self.embedding)  # (rows, hidden)
        if c.embedding_multiplier != 1.0:
            x.mul_(torch.tensor(c.embedding_multiplier, dtype=x.dtype))
        if c.embedding_norm:
            x = F.rms_norm(x, x.shape[-1:], None, c.rms_norm_eps)
        for layer in self.layers:
            layer(x, context)
        for i, start in enumerate(context.starts):
            cache.lengths[cache.first + i] = start + seq
        return self.norm(x)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary, (rows, hidden_size) -> (rows, vocab_size), float32."""
        logits = self.head(hidden)
        if cap := self.config.logit_softcap:
            logits.div_(cap).tanh_().mul_(cap)
        return logits.float()

    def rotary(self, theta: float, length: int) -> tuple[Tensor, Tensor]:
        """cos and signed sin of the positions 0 .. at least length - 1, (positions, head_dim) each."""
        tables = self._rotary.get(theta)
        if tables is None or tables[0].shape[0] < length or tables[0].dtype != self.dtype:
            positions = torch.arange(min(2 * length, max(length, self.config.max_position_embeddings)))
            cos, sin = rotary_table(positions.to(self.device), self.config.head_dim, theta, self.config.rope_direction)
            tables = self._rotary[theta] = (cos.to(self.dtype), sin.to(self.dtype))
        return tables


class Linear:
    """x W^T from copies of W in two layouts, if there are to be copies.

    For one row the product is read column by column (x is a row, W^T has contiguous rows) where W is not narrow:
    MKL's product with W as it lies takes up to three times as long. For more rows it is oneDNN's, from blocks packed
    for it, up to twice as fast as MKL's.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, copy: bool) -> None:
        weight = weight.detach().to(dtype)
        copy = copy and weight.device.type == "cpu" and dtype == torch.float32
        wide = weight.shape[0] >= weight.shape[1]
        self.columns = weight.t().contiguous() if copy and wide else weight.t()  # (in, out)
        self.packed: Tensor | None = None
        if copy and torch.backends.mkldnn.is_available():
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed is None or x.shape[0] == 1:
            return torch.mm(x, self.columns)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


class _Norm:
    """RMSNorm over the last dimension as x / hypot(norm(x), sqrt(size * eps)) * (weight * sqrt(size)).

    Two tiny operations fewer than mean, root and product, and float32 where the mean of squares needs it.
    """

    def __init__(self, weight: Tensor, eps: float, dtype: torch.dtype) -> None:
        size = weight.shape[-1]
        self.weight = (weight * size**0.5).to(dtype)
        self.floor = torch.tensor((size * eps) ** 0.5, device=weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.div(x, self.length(x)).mul_(self.weight)

    def in_place(self, x: Tensor) -> None:
        x.div_(self.length(x)).mul_(self.weight)

    def length(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, 2.0, (-1,), True, dtype=torch.float32).hypot_(self.floor)
        return length if x.dtype == torch.float32 else length.to(x.dtype)


def _norm_weight(norm: RMSNorm, like: Tensor, size: int) -> Tensor:
    """The factor of a norm in float32, whatever the config's way to write it."""
    if norm.weight is None:
        return torch.ones(size, device=like.device)
    return norm.weight.detach().float() + float(norm.offset)


class _Layer:
    """One block: x += attention(norm(x)); x += feed_forward(norm(x)), in place."""

    def __init__(self, block: Block, number: int, c: ModelConfig, dtype: torch.dtype, copy: bool) -> None:
        attention, like = block.attention, block.attention.qkv.weight

        def norm(module: RMSNorm) -> _Norm:
            return _Norm(_norm_weight(module, like, c.hidden_size), c.rms_norm_eps, dtype)

        self.number, self.config, self.window = number, c, c.window_of_layer(number)
        local = self.window is not None and c.rope_theta_local is not None
        self.rope_theta: float = c.rope_theta_local if local and c.rope_theta_local else c.rope_theta
        self.scale: float = attention.scale
        self.attention_norm, self.feed_forward_norm = norm(block.attention_norm), norm(block.feed_forward_norm)
        self.qkv = Linear(attention.qkv.weight, dtype, copy)
        self.output = Linear(attention.output.weight, dtype, copy)
        self.up = Linear(block.feed_forward.up.weight, dtype, copy)
        self.down = Linear(block.feed_forward.down.weight, dtype, copy)
        self.activation = _activation(c)
        self.qk_norm: _Norm | None = None
        if c.qk_norm != "none":  # one norm over the heads of queries and keys together
            query = _norm_weight(attention.query_norm, like, c.head_dim).expand(c.num_attention_heads, -1)
            key = _norm_weight(attention.key_norm, like, c.head_dim).expand(c.num_key_value_heads, -1)
            self.qk_norm = _Norm(torch.cat((query, key)), c.rms_norm_eps, dtype)
        self.post_attention_norm = norm(block.post_attention_norm) if c.norm_order == "sandwich" else None
        self.post_feed_forward_norm = norm(block.post_feed_forward_norm) if c.norm_order == "sandwich" else None

    def __call__(self, x: Tensor, context: "_Context") -> None:  # x (rows, hidden)
        attended = self.output(self._attend(self.attention_norm(x), context))
        if self.post_attention_norm is not None:
            self.post_attention_norm.in_place(attended)
        x.add_(attended)
        fed = self.down(self.activation(self.up(self.feed_forward_norm(x))))
        if self.post_feed_forward_norm is not None:
            self.post_feed_forward_norm.in_place(fed)
        x.add_(fed)

    def _attend(self, x: Tensor, context: "_Context") -> Tensor:
        c = self.config
        heads, kv_heads, head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        # narrow and split instead of slices: these views are taken for every token, and slicing costs twice as much.
        qkv = self.qkv(x).view(-1, heads + 2 * kv_heads, head_dim)  # (rows, heads, head_dim)
        rotated = qkv.narrow(1, 0, heads + kv_heads)  # queries and keys
        if self.qk_norm is not None and c.qk_norm == "before_rope":
            self.qk_norm.in_place(rotated)
        cos, sin = context.rotary(self.rope_theta)
        swapped = rotated.roll(head_dim // 2, -1)
        rotated.mul_(cos).addcmul_(swapped, sin)
        if self.qk_norm is not None and c.qk_norm == "after_rope":
            self.qk_norm.in_place(rotated)
        query, kv = qkv.split((heads, 2 * kv_heads), 1)
        keys, values = context.write(self.number, kv).split(kv_heads, 1)
        return context.attend(query, keys, values, self.window, self.scale)


def _activation(c: ModelConfig) -> Callable[[Tensor], Tensor]:
    """(rows, size or 2 * size if gated) -> (rows, size)"""
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": F.silu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "relu_squared": lambda x: torch.relu(x).square_(),
    }
    function = functions[c.activation]

    def gated(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return function(gate).mul_(up)

    return gated if c.gated else function


class _Context:
    """What the layers of one forward pass share: positions, rotary tables, masks, and the cache they write."""

    def __init__(self, decoder: Decoder, cache: KVCache, batch: int, seq: int) -> None:
        self.decoder, self.cache, self.batch, self.seq = decoder, cache, batch, seq
        self.first = cache.first
        self.starts = cache.lengths[self.first : self.first + batch]
        self.end = max(self.starts) + seq
        cache.reserve(self.first + batch, self.end)
        self.padded = batch > 1 and self.end <= PADDED_BATCH_TOKENS
        if batch > 1:
            self.slots = torch.arange(self.first, self.first + batch, device=decoder.device)
            self.positions = torch.tensor(self.starts, device=decoder.device)  # (batch,)
        self._rotary: dict[float, tuple[Tensor, Tensor]] = {}
        self._masks: dict[int | None, Tensor | None] = {}

    def rotary(self, theta: float) -> tuple[Tensor, Tensor]:
        """cos and signed sin, (rows, 1, head_dim) each."""
        if theta not in self._rotary:
            cos, sin = self.decoder.rotary(theta, self.end)
            rows = self.positions if self.batch > 1 else slice(self.starts[0], self.end)
            self._rotary[theta] = (cos[rows].unsqueeze(1), sin[rows].unsqueeze(1))
        return self._rotary[theta]

    def write(self, layer: int, kv: Tensor) -> Tensor:
        """Put the keys and values (rows, 2 * key_value_heads, head_dim) of new tokens into the cache.

        Returns:
            The slots of this pass, (batch, 2 * key_value_heads, tokens, head_dim), longer than what is filled.
        """
        block, first = self.cache.layers[layer], self.first
        if self.batch > 1:
            block[self.slots, :, self.positions] = kv
        else:
            block.select(0, first).narrow(1, self.starts[0], self.seq).copy_(kv.transpose(0, 1))
        return block.narrow(0, first, self.batch)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, window: int | None, scale: float) -> Tensor:
        """softmax(query keys^T * scale) values over the cached tokens that each row may see.

        Args:
            query: (rows, heads, head_dim)
            keys, values: (batch, key_value_heads, tokens, head_dim)

        Returns:
            (rows, heads * head_dim)
        """
        rows, heads, head_dim = query.shape
        kv_heads = keys.shape[1]
        if self.seq > 1:
            keys, values = keys[:, :, : self.end], values[:, :, : self.end]
            out = F.scaled_dot_product_attention(
                query.transpose(0, 1).unsqueeze(0),  # (1, heads, seq, head_dim)
                keys,
                values,
                attn_mask=self._piece_mask(window),
                is_causal=self._plain(window),
                scale=scale,
                enable_gqa=heads != kv_heads,
            )
            return out[0].transpose(0, 1).reshape(rows, heads * head_dim)
        # The queries that share a key-value head stand where a sequence would: no mask among them, and no copies.
        grouped = query.view(rows, kv_heads, heads // kv_heads, head_dim)
        if self.padded:
            keys, values = keys.narrow(2, 0, self.end), values.narrow(2, 0, self.end)
            mask = self._padding_mask(window)
            out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
            return out.reshape(rows, heads * head_dim)
        pieces = []
        for i, (q, start) in enumerate(zip(grouped.split(1), self.starts, strict=True)):
            begin = 0 if window is None else max(0, start + 1 - window)
            k, v = (t.narrow(0, i, 1).narrow(2, begin, start + 1 - begin) for t in (keys, values))
            pieces.append(F.scaled_dot_product_attention(q, k, v, scale=scale))
        out = pieces[0] if rows == 1 else torch.cat(pieces)
        return out.view(rows, heads * head_dim)

    def _plain(self, window: int | None) -> bool:
        """Whether a piece of a sequence is its beginning and no window cuts it, so that is_causal says it all."""
        return self.starts[0] == 0 and (window is None or window >= self.end)

    def _piece_mask(self, window: int | None) -> Tensor | None:
        """For seq tokens of one sequence: additive mask (seq, end), or None where plain causal attention is exact."""
        if self._plain(window):
            return None
        if window not in self._masks:
            query = torch.arange(self.starts[0], self.end, device=self.decoder.device)
            self._masks[window] = self._additive(query, window)
        return self._masks[window]

    def _padding_mask(self, window: int | None) -> Tensor | None:
        """For one token of each sequence: additive mask (batch, 1, 1, end)."""
        if window not in self._masks:
            self._masks[window] = self._additive(self.positions, window)[:, None, None]
        return self._masks[window]

    def _additive(self, query: Tensor, window: int | None) -> Tensor:
        key = torch.arange(self.end, device=query.device)
        hidden = key > query[:, None]
        if window is not None:
            hidden |= key <= query[:, None] - window
        return torch.zeros(hidden.shape, dtype=self.decoder.dtype, device=query.device).masked_fill_(
            hidden, float("-inf")
        )
