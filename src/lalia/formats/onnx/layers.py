"""The operations of `lalia.model` as ONNX nodes: products, norms, activations, attention, experts."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lalia.formats.onnx.graph import Graph
from lalia.model.config import ModelConfig, RopeScaling
from lalia.model.experts import FeedForward, MixtureOfExperts
from lalia.model.rotary import rotary_frequencies
from lalia.model.transformer import Attention, Block, Norm

MASKED = -1e30
"""A score that softmax turns into 0; finite, so that a row in which nothing is allowed gives no NaN."""
ZERO_POINT = 128
"""Activations are uint8 around 128, weights int8 around 0: with VNNI twice as fast as uint8 by uint8."""
LARGEST_WEIGHT = 63
"""x86 processors without VNNI add two products with saturation at 2 ** 15. 255 * 63 * 2 stays below it; with weights up
to 127 the results were up to 30 % off there, and right elsewhere."""


@dataclass
class Step:
    """What every layer of one graph shares.

    Attributes:
        positions: (batch or 1, seq) int64.
        allowed: window in tokens (None for none) -> (batch, 1, seq, keys) bool.
        past: of each layer the names of its past keys and values, where the graph has a cache.
        present: filled by the layers with the names of all keys and values.
        rotary: cos and sin tables (batch or 1, 1, seq, rotary_size) by base and scaling, filled on demand.
    """

    positions: str
    allowed: dict[int | None, str]
    past: list[tuple[str, str]] | None
    present: list[tuple[str, str]]
    rotary: dict[tuple[float, RopeScaling | None], tuple[str, str]]


class Writer:
    """Emits the nodes of a model's parts into a graph.

    With `int8` the products take 8-bit weights with one scale per output, and 8-bit activations whose range is found
    while running (dynamic quantization), and the token embedding is stored in 8 bits with one scale per token.
    """

    def __init__(self, graph: Graph, config: ModelConfig, int8: bool) -> None:
        self.graph, self.config, self.int8 = graph, config, int8

    # Products

    def linear(
        self,
        name: str,
        x: str,
        weight: Tensor,
        bias: Tensor | None = None,
        quantize: bool = True,
        may_be_empty: bool = False,
    ) -> str:
        """x weight^T + bias, (..., in) -> (..., out); `weight` is (out, in)."""
        g = self.graph
        if self.int8 and quantize:
            values, scale = quantized(weight)
            stored = g.weight(f"{name}.weight_quantized", values.t())
            y = self.integer_product(x, stored, g.weight(f"{name}.weight_scale", scale), may_be_empty)
        else:
            y = g.op("MatMul", x, g.weight(f"{name}.weight", weight.t()))
        return y if bias is None else g.op("Add", y, g.weight(f"{name}.bias", bias))

    def integer_product(self, x: str, stored: str, scale: str, may_be_empty: bool = False) -> str:
        """x times a matrix (in, out) of int8 with scale (out,).

        x is quantized while running, with a scale for every row: one for all rows, as DynamicQuantizeLinear has, is
        ruined by the first token of a text, whose state is often a hundred times as large as the others'.

        may_be_empty: x (rows, in) may have no rows, of which ReduceMax of onnxruntime-web 1.30 makes a maximum of
        shape (0, in).
        """
        g = self.graph
        if "zero_point" not in g.weights:
            g.weight("zero_point", torch.tensor(ZERO_POINT, dtype=torch.uint8))
        largest = g.op("ReduceMax", g.op("Abs", x), [-1], keepdims=1)
        if may_be_empty:
            largest = g.op("Reshape", largest, [0, 1])
        row_scale = g.op("Max", g.op("Div", largest, 127.0), 1e-30)
        values = g.op("Round", g.op("Div", x, row_scale))
        values = g.op("Cast", g.op("Add", values, float(ZERO_POINT)), to=2)
        product = g.op("MatMulInteger", values, stored, "zero_point")
        product = g.op("Cast", product, to=1)
        return g.op("Mul", g.op("Mul", product, row_scale), scale)

    def embed(self, tokens: str, table: Tensor) -> str:
        """Rows of the token embedding, (batch, seq) -> (batch, seq, hidden)."""
        g = self.graph
        if not self.int8:
            return g.op("Gather", g.weight("embedding", table), tokens)
        values, scale = quantized(table)
        rows = g.op("Cast", g.op("Gather", g.weight("embedding_quantized", values), tokens), to=1)
        scales = g.op("Unsqueeze", g.op("Gather", g.weight("embedding_scale", scale), tokens), [-1])
        return g.op("Mul", rows, scales)

    def tied_head(self, x: str) -> str:
        """x times the transposed embedding, which is in the file once."""
        g = self.graph
        if self.int8:
            return self.integer_product(x, g.op("Transpose", "embedding_quantized", perm=[1, 0]), "embedding_scale")
        return g.op("MatMul", x, g.op("Transpose", "embedding", perm=[1, 0]))

    # Elementwise parts

    def norm(self, name: str, x: str, norm: Norm) -> str:
        """RMSNorm or LayerNorm over the last dimension."""
        g = self.graph
        if norm.kind == "layer":
            weight, bias = norm.weight, norm.bias
            assert weight is not None and bias is not None
            stored = g.weight(f"{name}.weight", weight), g.weight(f"{name}.bias", bias)
            return g.op("LayerNormalization", x, *stored, axis=-1, epsilon=norm.eps)
        mean = g.op("ReduceMean", g.op("Pow", x, 2.0), [-1], keepdims=1)
        y = g.op("Div", x, g.op("Sqrt", g.op("Add", mean, norm.eps)))
        if norm.weight is None:
            return y
        return g.op("Mul", y, g.weight(f"{name}.weight", norm.weight + 1.0 if norm.offset else norm.weight))

    def activate(self, x: str, activation: str) -> str:
        """The activation by its name in `ModelConfig`."""
        g = self.graph
        if activation == "relu_squared":
            y = g.op("Relu", x)
            return g.op("Mul", y, y)
        if activation in ("silu", "quick_gelu"):
            return g.op("Mul", x, g.op("Sigmoid", x if activation == "silu" else g.op("Mul", x, 1.702)))
        if activation == "gelu":
            inner = g.op("Erf", g.op("Div", x, math.sqrt(2.0)))
        else:
            assert activation == "gelu_tanh", activation
            cube = g.op("Mul", g.op("Mul", g.op("Mul", x, x), x), 0.044715)
            inner = g.op("Tanh", g.op("Mul", g.op("Add", x, cube), math.sqrt(2.0 / math.pi)))
        return g.op("Mul", g.op("Mul", x, g.op("Add", inner, 1.0)), 0.5)

    def softcap(self, x: str, cap: float) -> str:
        """cap * tanh(x / cap)"""
        g = self.graph
        return g.op("Mul", g.op("Tanh", g.op("Div", x, cap)), cap)

    # Attention

    def rotary(self, layer: int, step: Step) -> tuple[str, str]:
        """cos and signed sin tables of a layer, as in `lalia.model.rotary.rotary_table`."""
        g, c = self.graph, self.config
        rope = c.rope_of_layer(layer)
        if rope not in step.rotary:
            theta, scaling = rope
            frequencies = rotary_frequencies(c.rotary_size, theta, scaling)
            stored = g.weight(f"rotary_frequencies.{len(step.rotary)}", frequencies)
            positions = g.op("Unsqueeze", g.op("Cast", step.positions, to=1), [1, 3])  # (batch, 1, seq, 1)
            angle = g.op("Mul", positions, stored)
            cos, sin = g.op("Cos", angle), g.op("Sin", angle)
            factor = 1.0 if scaling is None else scaling.attention_factor
            if factor != 1.0:
                cos, sin = g.op("Mul", cos, factor), g.op("Mul", sin, factor)
            if c.rope_direction < 0:
                sin = g.op("Neg", sin)
            step.rotary[rope] = (
                g.op("Concat", cos, cos, axis=-1),
                g.op("Concat", g.op("Neg", sin), sin, axis=-1),
            )
        return step.rotary[rope]

    def rotate(self, x: str, cos: str, sin: str) -> str:
        """Rotary positions of x (batch, heads, seq, head_dim), "halves" convention."""
        g, c = self.graph, self.config
        size, rest = c.rotary_size, c.head_dim - c.rotary_size
        turned, kept = g.ops(2, "Split", x, [size, rest], axis=-1) if rest else (x, None)
        first, second = g.ops(2, "Split", turned, [size // 2, size // 2], axis=-1)
        swapped = g.op("Mul", g.op("Concat", second, first, axis=-1), sin)
        turned = g.op("Add", g.op("Mul", turned, cos), swapped)
        return turned if kept is None else g.op("Concat", turned, kept, axis=-1)

    def attention(self, name: str, x: str, attention: Attention, step: Step) -> str:
        """(batch, seq, hidden) -> (batch, seq, hidden)"""
        g, c = self.graph, self.config
        heads, kv_heads, size = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        qkv = self.linear(f"{name}.qkv", x, attention.qkv.weight, attention.qkv.bias)
        qkv = g.op("Transpose", g.op("Reshape", qkv, [0, 0, heads + 2 * kv_heads, size]), perm=[0, 2, 1, 3])
        query, key, value = g.ops(3, "Split", qkv, [heads, kv_heads, kv_heads], axis=1)  # (batch, heads, seq, head_dim)
        if c.qk_norm == "before_rope":
            query, key = self._qk_norm(name, query, key, attention)
        if c.positions == "rope":
            cos, sin = self.rotary(attention.layer, step)
            query, key = self.rotate(query, cos, sin), self.rotate(key, cos, sin)
        if c.qk_norm == "after_rope":
            query, key = self._qk_norm(name, query, key, attention)
        if step.past is not None:
            past_key, past_value = step.past[attention.layer]
            key = g.op("Concat", past_key, key, axis=2)
            value = g.op("Concat", past_value, value, axis=2)
        step.present.append((key, value))
        # The query heads that share a key head are one long sequence, so keys and values are not repeated.
        grouped = heads != kv_heads
        query = g.op("Mul", query, float(attention.scale))
        query = g.op("Reshape", query, [0, kv_heads, -1, size]) if grouped else query
        scores = g.op("MatMul", query, g.op("Transpose", key, perm=[0, 1, 3, 2]))
        scores = g.op("Reshape", scores, [0, heads, -1, 0]) if grouped else scores  # (batch, heads, seq, keys)
        if c.attention_softcap:
            scores = self.softcap(scores, c.attention_softcap)
        scores = g.op("Where", step.allowed[c.window_of_layer(attention.layer)], scores, MASKED)
        shares = g.op("Softmax", scores, axis=-1)
        shares = g.op("Reshape", shares, [0, kv_heads, -1, 0]) if grouped else shares
        y = g.op("MatMul", shares, value)
        y = g.op("Reshape", y, [0, heads, -1, size]) if grouped else y
        y = g.op("Reshape", g.op("Transpose", y, perm=[0, 2, 1, 3]), [0, 0, heads * size])
        return self.linear(f"{name}.output", y, attention.output.weight, attention.output.bias)

    def _qk_norm(self, name: str, query: str, key: str, attention: Attention) -> tuple[str, str]:
        return (
            self.norm(f"{name}.query_norm", query, attention.query_norm),
            self.norm(f"{name}.key_norm", key, attention.key_norm),
        )

    # Feed-forward networks

    def feed_forward(self, name: str, x: str, part: FeedForward | MixtureOfExperts) -> str:
        """(batch, seq, hidden) -> (batch, seq, hidden)"""
        if isinstance(part, MixtureOfExperts):
            return self.experts(name, x, part)
        h = self._activated(self.linear(f"{name}.up", x, part.up.weight, part.up.bias))
        return self.linear(f"{name}.down", h, part.down.weight, part.down.bias)

    def _activated(self, h: str) -> str:
        c, g = self.config, self.graph
        if not c.gated:
            return self.activate(h, c.activation)
        gate, up = g.ops(2, "Split", h, axis=-1, num_outputs=2)
        return g.op("Mul", self.activate(gate, c.activation), up)

    def experts(self, name: str, x: str, part: MixtureOfExperts) -> str:
        """Every expert computes the rows that chose it, so the work is that of the chosen experts only."""
        g, c = self.graph, self.config
        rows = g.op("Reshape", x, [-1, c.hidden_size])
        logits = self.linear(f"{name}.router", rows, part.router, quantize=False)  # (rows, experts)
        weights, chosen = g.ops(2, "TopK", g.op("Softmax", logits, axis=-1), [part.num_chosen], axis=-1)
        if part.normalize:
            weights = g.op("Div", weights, g.op("ReduceSum", weights, [-1], keepdims=1))
        zeros, ones = g.op("Mul", logits, 0.0), g.op("Add", g.op("Mul", weights, 0.0), 1.0)
        gates = g.op("ScatterElements", zeros, chosen, weights, axis=1)
        is_chosen = g.op("Cast", g.op("ScatterElements", zeros, chosen, ones, axis=1), to=9)  # also with weight 0
        out = g.op("Mul", rows, 0.0)
        for expert in range(part.up.shape[0]):
            flag = g.op("Gather", is_chosen, expert, axis=1)
            index = g.op("Transpose", g.op("NonZero", flag), perm=[1, 0])  # (chosen rows, 1)
            h = g.op("GatherND", rows, index)
            h = self._activated(self.linear(f"{name}.up.{expert}", h, part.up[expert], may_be_empty=True))
            h = self.linear(f"{name}.down.{expert}", h, part.down[expert], may_be_empty=True)
            gate = g.op("Unsqueeze", g.op("GatherND", g.op("Gather", gates, expert, axis=1), index), [-1])
            out = g.op("ScatterND", out, index, g.op("Mul", h, gate), reduction="add")
        return g.op("Reshape", out, g.op("Shape", x))

    def block(self, name: str, x: str, block: Block, step: Step) -> str:
        """One layer, in the order that `lalia.model.transformer.Block` shows."""
        g = self.graph

        def attend(h: str) -> str:
            return self.attention(f"{name}.attention", h, block.attention, step)

        def feed(h: str) -> str:
            return self.feed_forward(f"{name}.feed_forward", h, block.feed_forward)

        def norm(which: str, h: str) -> str:
            return self.norm(f"{name}.{which}", h, getattr(block, which))

        if block.order == "post":
            x = norm("attention_norm", g.op("Add", x, attend(x)))
            return norm("feed_forward_norm", g.op("Add", x, feed(x)))
        normed = norm("attention_norm", x)
        attended = attend(normed)
        if block.order == "parallel":
            return g.op("Add", g.op("Add", x, attended), feed(normed))
        sandwich = block.order == "sandwich"
        x = g.op("Add", x, norm("post_attention_norm", attended) if sandwich else attended)
        fed = feed(norm("feed_forward_norm", x))
        return g.op("Add", x, norm("post_feed_forward_norm", fed) if sandwich else fed)


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric rows of up to LARGEST_WEIGHT steps: values (rows, columns) int8, scale (rows,) float32."""
    weight = weight.detach().float()
    scale = weight.abs().amax(-1).div_(LARGEST_WEIGHT).clamp_(min=torch.finfo(torch.float32).tiny)
    values = (weight / scale[:, None]).round_().clamp_(-LARGEST_WEIGHT, LARGEST_WEIGHT).to(torch.int8)
    return values, scale
