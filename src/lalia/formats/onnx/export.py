"""A `Transformer` as an ONNX file that onnxruntime, onnxruntime-web and transformers.js run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lalia.errors import UserError
from lalia.formats.onnx.graph import MAX_INLINE_BYTES, Graph
from lalia.formats.onnx.layers import Step, Writer
from lalia.model.transformer import Transformer

Task = Literal["text-generation", "fill-mask", "feature-extraction", "text-classification"]
Pooling = Literal["mean", "first"]


@dataclass
class Exported:
    """What `export_onnx` wrote.

    Attributes:
        files: the graph, and the file of its weights where they are apart.
        task: what the graph is for.
        inputs, outputs: their names.
        num_bytes: of all files.
    """

    files: list[Path]
    task: str
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)


def export_onnx(
    model: Transformer,
    path: Path | str,
    task: Task | None = None,
    int8: bool = False,
    pooling: Pooling = "mean",
    normalize: bool = True,
    max_inline_bytes: int = MAX_INLINE_BYTES,
) -> Exported:
    """Write a model as an ONNX graph in float32, names as in transformers.js and optimum.

    text-generation: input_ids (batch, seq), attention_mask (batch, past + seq) and past_key_values.N.key and .value
    (batch, key_value_heads, past, head_dim) give logits (batch, seq, vocab) and present.N.key and .value. Positions
    count the ones of the mask, so batches may be padded on the left.
    The others: input_ids and attention_mask (batch, seq), token_type_ids where the model has types, give
    fill-mask: logits (batch, seq, vocab); text-classification: logits (batch, labels); feature-extraction:
    last_hidden_state (batch, seq, hidden), pooler_output where the model has one, and sentence_embedding (batch,
    hidden). Towers of CLIP: last_hidden_state and text_embeds or (from pixel_values) image_embeds.

    Args:
        model: its weights may be in any dtype; the graph's are float32.
        path: ends in .onnx.
        task: what the graph is for; by default what the model's head is.
        int8: 8-bit weights and embedding, activations quantized while running (`layers.Writer`).
        pooling: of sentence_embedding: the mean over the tokens, or the first token's state.
        normalize: whether sentence_embedding has length 1.
        max_inline_bytes: weights of more bytes go into a second file, PATH with "_data" appended.

    Raises:
        UserError: if the package onnx is missing, or the model cannot do the task.
    """
    path = Path(path)
    task = _task(model, task)
    c = model.config
    graph = Graph()
    writer = Writer(graph, c, int8)
    exporter = _Exporter(graph, writer, model, task)
    exporter.write(pooling, normalize)
    files = graph.save(
        path,
        {"family": c.family, "task": task, "weights": "int8" if int8 else "float32", "pooling": pooling},
        max_inline_bytes,
    )
    return Exported(files, task, [v.name for v in graph.inputs], [v.name for v in graph.outputs])


def _task(model: Transformer, task: Task | None) -> Task:
    c = model.config
    possible: list[Task] = []
    if c.head == "language_model":
        possible.append("text-generation" if c.causal else "fill-mask")
    if c.head == "classifier":
        possible.append("text-classification")
    if not c.causal or c.head == "none":
        possible.append("feature-extraction")
    if task is None:
        return possible[0]
    if task not in possible:
        raise UserError(f"task = {task!r} does not fit this {c.family} model; choose one of {', '.join(possible)}")
    return task


class _Exporter:
    """The graph around the layers: inputs, embedding, masks, heads, outputs."""

    def __init__(self, graph: Graph, writer: Writer, model: Transformer, task: Task) -> None:
        self.graph, self.writer, self.model, self.task = graph, writer, model, task
        self.config = model.config
        self.cached = task == "text-generation"

    def write(self, pooling: Pooling, normalize: bool) -> None:
        g, c = self.graph, self.config
        is_image = c.image_size is not None
        x = self._image() if is_image else self._tokens()
        step = self._image_step() if is_image else self._step()
        if c.positions == "learned":
            table = g.weight("position_embedding", self.model.position_embedding.weight)
            x = g.op("Add", x, g.op("Gather", table, step.positions))
        if c.type_vocab_size:
            types = g.input("token_type_ids", "int64", "batch", "seq")
            x = g.op("Add", x, g.op("Gather", g.weight("type_embedding", self.model.type_embedding.weight), types))
        if self.model.embedding_norm is not None:
            x = self.writer.norm("embedding_norm", x, self.model.embedding_norm)
        for i, block in enumerate(self.model.layers):
            x = self.writer.block(f"layers.{i}", x, block, step)  # pyright: ignore[reportArgumentType]
        if self.model.norm is not None:
            x = self.writer.norm("norm", x, self.model.norm)
        if self.task in ("text-generation", "fill-mask"):
            g.output("logits", self._logits(x), "float32", "batch", "seq", c.vocab_size)
        elif self.task == "text-classification":
            g.output("logits", self._classify(x), "float32", "batch", len(c.labels))
        else:
            self._features(x, pooling, normalize)
        if self.cached:
            for i, (key, value) in enumerate(step.present):
                for name, part in (("key", key), ("value", value)):
                    g.output(f"present.{i}.{name}", part, "float32", *self._cache_shape("past + seq"))

    # Inputs

    def _tokens(self) -> str:
        g, c = self.graph, self.config
        x = self.writer.embed(g.input("input_ids", "int64", "batch", "seq"), self.model.embedding.weight)
        g.input("attention_mask", "int64", "batch", "past + seq" if self.cached else "seq")
        return x if c.embedding_multiplier == 1.0 else g.op("Mul", x, float(c.embedding_multiplier))

    def _cache_shape(self, length: str) -> tuple[str | int, ...]:
        return "batch", self.config.num_key_value_heads, length, self.config.head_dim

    def _step(self) -> Step:
        """Positions and masks; token i of the input is number past + i of the sequence."""
        g, c = self.graph, self.config
        past = None
        if self.cached:
            names = [
                tuple(f"past_key_values.{i}.{part}" for part in ("key", "value")) for i in range(c.num_hidden_layers)
            ]
            past = [
                (
                    g.input(key, "float32", *self._cache_shape("past")),
                    g.input(value, "float32", *self._cache_shape("past")),
                )
                for key, value in names
            ]
        end = g.op("Shape", "attention_mask", start=1, end=2)  # (1,)
        begin = g.op("Sub", end, g.op("Shape", "input_ids", start=1, end=2))
        if self.cached:
            counted = g.op("Sub", g.op("CumSum", "attention_mask", 1), 1)
            positions = g.op("Slice", g.op("Max", counted, 0), begin, end, [1])  # (batch, seq)
        else:
            # Encoders number the tokens from the left, padding or not, as ours and transformers do.
            positions = g.op("Unsqueeze", g.op("Range", 0, g.op("Squeeze", end), 1), [0])  # (1, seq)
        key = g.op("Range", 0, g.op("Squeeze", end), 1)
        query = g.op("Unsqueeze", g.op("Range", g.op("Squeeze", begin), g.op("Squeeze", end), 1), [1])
        real = g.op("Unsqueeze", g.op("Cast", "attention_mask", to=9), [1, 2])  # (batch, 1, 1, keys)
        if c.causal:
            real = g.op("And", real, g.op("LessOrEqual", key, query))
        allowed: dict[int | None, str] = {None: real}
        for window in sorted({c.window_of_layer(i) or 0 for i in range(c.num_hidden_layers)} - {0}):
            allowed[window] = g.op("And", real, g.op("Greater", key, g.op("Sub", query, window)))
        return Step(positions, allowed, past, [], {})

    def _image(self) -> str:
        """Patches and the class token in front: (batch, 1 + patches, hidden)."""
        g, c = self.graph, self.config
        patch = c.patch_size or 0
        pixels = g.input("pixel_values", "float32", "batch", c.num_channels, c.image_size or 0, c.image_size or 0)
        weight = self.model.patch_embedding.weight.reshape(c.hidden_size, c.num_channels, patch, patch)
        cut = g.op("Conv", pixels, g.weight("patch_embedding", weight), strides=[patch, patch])
        patches = g.op("Transpose", g.op("Reshape", cut, [0, c.hidden_size, -1]), perm=[0, 2, 1])
        zeros = g.op("Mul", g.op("Slice", patches, [0], [1], [1]), 0.0)  # (batch, 1, hidden)
        first = g.op("Add", zeros, g.weight("class_embedding", self.model.class_embedding))
        return g.op("Concat", first, patches, axis=1)

    def _image_step(self) -> Step:
        g, c = self.graph, self.config
        positions = g.op("Range", 0, c.max_position_embeddings, 1)
        everything = g.op("Cast", g.op("Unsqueeze", g.op("Add", positions, 1), [0, 1, 2]), to=9)
        return Step(g.op("Unsqueeze", positions, [0]), {None: everything}, None, [], {})

    # Outputs

    def _logits(self, x: str) -> str:
        g, c, w, m = self.graph, self.config, self.writer, self.model
        if m.head_transform is not None and m.head_norm is not None:
            x = w.linear("head_transform", x, m.head_transform.weight, m.head_transform.bias)
            x = w.norm("head_norm", w.activate(x, c.activation), m.head_norm)
        x = w.tied_head(x) if m.head is None else w.linear("head", x, m.head.weight)
        if m.head_bias is not None:
            x = g.op("Add", x, g.weight("head_bias", m.head_bias))
        if c.output_multiplier != 1.0:
            x = g.op("Mul", x, float(c.output_multiplier))
        return w.softcap(x, c.logit_softcap) if c.logit_softcap else x

    def _pooled(self, x: str) -> str:
        g, m = self.graph, self.model
        first = g.op("Gather", x, 0, axis=1)
        if m.pooler is None:
            return first
        y = self.writer.linear("pooler", first, m.pooler.weight, m.pooler.bias)
        return g.op("Tanh" if self.config.pooler == "tanh" else "Relu", y)

    def _classify(self, x: str) -> str:
        classifier = self.model.classifier
        assert classifier is not None
        return self.writer.linear("classifier", self._pooled(x), classifier.weight, classifier.bias, quantize=False)

    def _features(self, x: str, pooling: Pooling, normalize: bool) -> None:
        g, c, m = self.graph, self.config, self.model
        g.output("last_hidden_state", x, "float32", "batch", "seq", c.hidden_size)
        if m.projection is not None:
            is_image = c.image_size is not None
            # A text's state is that of its end token, which has the highest id in CLIP's vocabulary.
            state = self._pooled(x) if is_image else self._at_highest_id(x)
            y = self.writer.linear("projection", state, m.projection.weight, quantize=False)
            g.output("image_embeds" if is_image else "text_embeds", y, "float32", "batch", c.projection_size or 0)
        elif c.image_size is None and not c.causal:
            if m.pooler is not None:
                g.output("pooler_output", self._pooled(x), "float32", "batch", c.hidden_size)
            y = g.op("Gather", x, 0, axis=1) if pooling == "first" else self._mean(x)
            if normalize:
                y = g.op("Div", y, g.op("Max", g.op("ReduceL2", y, [-1], keepdims=1), 1e-12))
            g.output("sentence_embedding", y, "float32", "batch", c.hidden_size)

    def _mean(self, x: str) -> str:
        """Mean over the tokens that the mask names: (batch, seq, hidden) -> (batch, hidden)."""
        g = self.graph
        mask = g.op("Unsqueeze", g.op("Cast", "attention_mask", to=1), [-1])
        count = g.op("Max", g.op("ReduceSum", mask, [1], keepdims=0), 1.0)
        return g.op("Div", g.op("ReduceSum", g.op("Mul", x, mask), [1], keepdims=0), count)

    def _at_highest_id(self, x: str) -> str:
        g = self.graph
        index = g.op("Unsqueeze", g.op("ArgMax", "input_ids", axis=1, keepdims=1), [-1])  # (batch, 1, 1)
        index = g.op("Expand", index, [1, 1, self.config.hidden_size])
        return g.op("Squeeze", g.op("GatherElements", x, index, axis=1), [1])
