"""The transformer arranged for generating: the arithmetic of `lalia.model.transformer` in few, short operations.

Generating one token is bound by reading the weights and, in a small model, by the cost of starting each operation.
So this form, which needs no gradients,

* works on a flat (rows, hidden) activation in place, with plain tensors instead of modules;
* keeps each weight in the layout that is fastest for the number of rows (see `Linear`);
* writes keys and values into the cache with one operation, and reads no more of it than is filled;
* attends from a piece of a long prompt without a mask over all its keys, in memory that does not grow with them.

tests/inference/test_decoder.py holds it to the transformer's own forward pass for every switch of the config.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lalia.errors import UserError
from lalia.inference.context import ROTARY_TABLE_POSITIONS, Context, Rope
from lalia.inference.quantization import QuantizedWeight, weight_bytes
from lalia.model.cache import KVCache
from lalia.model.config import ModelConfig
from lalia.model.experts import Linear as ModelLinear
from lalia.model.experts import MixtureOfExperts, choose_experts, elementwise
from lalia.model.rotary import rotary_table
from lalia.model.transformer import Block, Norm, Transformer

COPY_LIMIT_BYTES = 1 << 30
"""Models with more bytes of weights than this are not copied into other layouts: memory matters more there."""


class Decoder:
    """Forward passes over cached sequences, without gradients.

    The weights are copies: `refresh` takes over changes of the model, as between steps of training.

    Attributes:
        dtype, device: of the activations.
        weight_bytes: what one step reads.
    """

    def __init__(self, model: Transformer) -> None:
        """Raises UserError for a model that cannot generate, such as an encoder."""
        c = model.config
        if not c.causal or c.head != "language_model" or c.norm_order == "post":
            raise UserError(
                f"a model of family {c.family!r} with head {c.head!r} does not generate text; use a causal language "
                "model, or this one for embeddings"
            )
        self.model, self.config = model, c
        self._versions: list[tuple[int, int]] = []
        self._rotary: dict[Rope, tuple[Tensor, Tensor]] = {}
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
        self.weight_bytes = weight_bytes(model, dtype)
        copy = self.weight_bytes <= COPY_LIMIT_BYTES
        with torch.inference_mode():
            self.embedding = model.embedding.weight.detach().to(dtype)  # a quantised one stays as it is
            learned = c.positions == "learned"
            self.position_embedding = model.position_embedding.weight.detach().to(dtype) if learned else None
            self.embedding_norm = _norm(model.embedding_norm, c.hidden_size, c, dtype, self.device)
            self.layers = [
                _Layer(cast(Block, block), number, c, dtype, copy) for number, block in enumerate(model.layers)
            ]
            self.norm = _norm(model.norm, c.hidden_size, c, dtype, self.device)
            self.head = Linear(model.head_weight, model.head_bias, dtype, copy)
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
        context = Context(self, cache, batch, seq)
        x = F.embedding(tokens.view(-1), self.embedding).to(self.dtype)  # (rows, hidden)
        if c.embedding_multiplier != 1.0:
            x.mul_(torch.tensor(c.embedding_multiplier, dtype=x.dtype))
        if self.position_embedding is not None:
            x.add_(self.position_embedding[context.rows_positions()])
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        for layer in self.layers:
            layer(x, context)
        for i, start in enumerate(context.starts):
            cache.lengths[cache.first + i] = start + seq
        return x if self.norm is None else self.norm(x)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary, (rows, hidden_size) -> (rows, vocab_size), float32."""
        logits = self.head(self.model.before_head(hidden))
        if self.config.output_multiplier != 1.0:
            logits.mul_(self.config.output_multiplier)
        if cap := self.config.logit_softcap:
            logits.div_(cap).tanh_().mul_(cap)
        return logits.float()

    def rotary(self, rope: Rope, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """cos and signed sin of the positions 0 .. at least length - 1, (positions, rotary_size) each."""
        tables = self._rotary.get(rope)
        if tables is None or tables[0].shape[0] < length or tables[0].dtype != self.dtype:
            limit = max(length, min(self.config.max_position_embeddings, ROTARY_TABLE_POSITIONS))
            positions = torch.arange(min(2 * length, limit), device=self.device)
            tables = self._rotary[rope] = self.rotary_of(positions, layer)
        return tables

    def rotary_of(self, positions: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """cos and signed sin, (positions, rotary_size) each."""
        cos, sin = rotary_table(positions, self.config, layer)
        return cos.to(self.dtype), sin.to(self.dtype)


class Linear:
    """x W^T + b from copies of W in two layouts, if there are to be copies.

    For one row the product is read column by column (x is a row, W^T has contiguous rows) where W is not narrow:
    MKL's product with W as it lies takes up to three times as long. For more rows it is oneDNN's, from blocks packed
    for it, up to twice as fast as MKL's. A quantised W has a kernel of its own.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, copy: bool) -> None:
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.quantized = weight.kernel if isinstance(weight, QuantizedWeight) else None
        if self.quantized is not None:
            return
        weight = weight.detach().to(dtype)
        copy = copy and weight.device.type == "cpu" and dtype == torch.float32
        wide = weight.shape[0] >= weight.shape[1]
        self.columns = weight.t().contiguous() if copy and wide else weight.t()  # (in, out)
        self.packed: Tensor | None = None
        if copy and torch.backends.mkldnn.is_available():
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)

    def __call__(self, x: Tensor) -> Tensor:
        if self.quantized is not None:
            return self.quantized(x, self.bias)
        if self.packed is None or x.shape[0] == 1:
            return torch.mm(x, self.columns) if self.bias is None else torch.addmm(self.bias, x, self.columns)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


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


class _LayerNorm:
    """LayerNorm over the last dimension."""

    def __init__(self, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> None:
        self.weight, self.bias, self.eps = weight.detach().to(dtype), bias.detach().to(dtype), eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)

    def in_place(self, x: Tensor) -> None:
        x.copy_(self(x))


def _norm(
    norm: Norm | None, size: int, c: ModelConfig, dtype: torch.dtype, device: torch.device
) -> _Norm | _LayerNorm | None:
    if norm is None:
        return None
    if norm.kind == "layer" and norm.weight is not None and norm.bias is not None:
        return _LayerNorm(norm.weight, norm.bias, c.norm_eps, dtype)
    return _Norm(_norm_weight(norm, device, size), c.norm_eps, dtype)


def _norm_weight(norm: Norm, device: torch.device, size: int) -> Tensor:
    """The factor of an RMSNorm in float32, whatever the config's way to write it."""
    if norm.weight is None:
        return torch.ones(size, device=device)
    return norm.weight.detach().float() + float(norm.offset)


class _Layer:
    """One block (see `lalia.model.transformer.Block`), changing the residual stream in place."""

    def __init__(self, block: Block, number: int, c: ModelConfig, dtype: torch.dtype, copy: bool) -> None:
        attention, device = block.attention, block.attention.qkv.weight.device
        sandwich, self.parallel = c.norm_order == "sandwich", c.norm_order == "parallel"

        def norm(module: Norm | None) -> _Norm | _LayerNorm | None:
            return _norm(module, c.hidden_size, c, dtype, device)

        def linear(module: ModelLinear) -> Linear:
            return Linear(module.weight, module.bias, dtype, copy)

        self.number, self.config, self.window = number, c, c.window_of_layer(number)
        self.rope = c.rope_of_layer(number)
        self.scale: float = attention.scale
        self.attention_norm = cast(_Norm, norm(block.attention_norm))
        self.feed_forward_norm = None if self.parallel else norm(block.feed_forward_norm)
        self.qkv, self.output = linear(attention.qkv), linear(attention.output)
        if isinstance(block.feed_forward, MixtureOfExperts):
            self.feed: Callable[[Tensor], Tensor] = _Experts(block.feed_forward, c, dtype, copy)
        else:
            self.feed = _Feed(linear(block.feed_forward.up), linear(block.feed_forward.down), _activation(c))
        self.qk_norm: _Norm | None = None
        if c.qk_norm != "none":  # one norm over the heads of queries and keys together
            query = _norm_weight(attention.query_norm, device, c.head_dim).expand(c.num_attention_heads, -1)
            key = _norm_weight(attention.key_norm, device, c.head_dim).expand(c.num_key_value_heads, -1)
            self.qk_norm = _Norm(torch.cat((query, key)), c.norm_eps, dtype)
        self.post_attention_norm = norm(block.post_attention_norm) if sandwich else None
        self.post_feed_forward_norm = norm(block.post_feed_forward_norm) if sandwich else None

    def __call__(self, x: Tensor, context: "Context") -> None:  # x (rows, hidden)
        normed = self.attention_norm(x)
        attended = self.output(self._attend(normed, context))
        if self.post_attention_norm is not None:
            self.post_attention_norm.in_place(attended)
        x.add_(attended)
        fed = self.feed(normed if self.feed_forward_norm is None else self.feed_forward_norm(x))
        if self.post_feed_forward_norm is not None:
            self.post_feed_forward_norm.in_place(fed)
        x.add_(fed)

    def _attend(self, x: Tensor, context: "Context") -> Tensor:
        c = self.config
        heads, kv_heads, head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        # narrow and split instead of slices: these views are taken for every token, and slicing costs twice as much.
        qkv = self.qkv(x).view(-1, heads + 2 * kv_heads, head_dim)  # (rows, heads, head_dim)
        rotated = qkv.narrow(1, 0, heads + kv_heads)  # queries and keys
        if self.qk_norm is not None and c.qk_norm == "before_rope":
            self.qk_norm.in_place(rotated)
        if c.positions == "rope":
            cos, sin = context.rotary(self.rope, self.number)
            size = c.rotary_size
            turned = rotated if size == head_dim else rotated.narrow(2, 0, size)
            swapped = turned.roll(size // 2, -1)
            turned.mul_(cos).addcmul_(swapped, sin)
        if self.qk_norm is not None and c.qk_norm == "after_rope":
            self.qk_norm.in_place(rotated)
        if context.seq == 1 and context.batch == 1 and not c.attention_softcap:
            return context.attend_one(self.number, qkv, self.window, self.scale)
        query, kv = qkv.split((heads, 2 * kv_heads), 1)
        keys, values = context.write(self.number, kv, self.window).split(kv_heads, 1)
        return context.attend(query, keys, values, self.window, self.scale)


class _Feed:
    """down(activation(up(x)))"""

    def __init__(self, up: Linear, down: Linear, activation: Callable[[Tensor], Tensor]) -> None:
        self.up, self.down, self.activation = up, down, activation

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class _Experts:
    """Each row through the experts its router chooses; only those are read."""

    def __init__(self, module: MixtureOfExperts, c: ModelConfig, dtype: torch.dtype, copy: bool) -> None:
        self.router = module.router.detach().float()
        self.num_chosen, self.normalize = module.num_chosen, module.normalize
        activation = _activation(c)
        self.experts = [
            _Feed(Linear(up, None, dtype, copy), Linear(down, None, dtype, copy), activation)
            for up, down in zip(module.up, module.down, strict=True)
        ]

    def __call__(self, x: Tensor) -> Tensor:  # x (rows, hidden)
        weights, chosen = choose_experts(F.linear(x.float(), self.router), self.num_chosen, self.normalize)
        weights, out = weights.to(x.dtype), torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            row, rank = (chosen == expert).nonzero(as_tuple=True)
            out.index_add_(0, row, self.experts[expert](x[row]).mul_(weights[row, rank, None]))
        return out


def _activation(c: ModelConfig) -> Callable[[Tensor], Tensor]:
    """(rows, size or 2 * size if gated) -> (rows, size)"""

    def plain(x: Tensor) -> Tensor:
        return elementwise(x, c.activation)

    def gated(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return elementwise(gate, c.activation).mul_(up)

    return gated if c.gated else plain
