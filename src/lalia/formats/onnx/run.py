"""Run an exported graph with onnxruntime, and measure how far it is from the model it was made of."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from lalia.errors import UserError
from lalia.model.transformer import Transformer

Arrays = dict[str, np.ndarray]


class OnnxModel:
    """An exported model in onnxruntime, on the CPU.

    Attributes:
        session: onnxruntime's.
        inputs, outputs: names, in the graph's order.
        pooling: how sentence_embedding is made, "mean" or "first".
    """

    def __init__(self, path: Path | str, num_threads: int = 0) -> None:
        """Load a file that `export_onnx` wrote; `num_threads` 0 leaves the choice to onnxruntime.

        Raises:
            UserError: if there is no such file, or it does not load.
        """
        if not Path(path).is_file():
            raise UserError(f"there is no file {path}; lalia convert MODEL --to onnx makes one")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads or torch.get_num_threads()
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # noqa: BLE001 - onnxruntime has a dozen types of its own
            raise UserError(f"{path} does not load in onnxruntime ({str(error).splitlines()[0][:200]})") from None
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.pooling = self.session.get_modelmeta().custom_metadata_map.get("pooling", "mean")
        self._cache = {v.name: v.shape for v in self.session.get_inputs() if v.name.startswith("past_key_values.")}

    def forward(
        self,
        tokens: np.ndarray,
        mask: np.ndarray | None = None,
        past: Arrays | None = None,
        token_types: np.ndarray | None = None,
    ) -> Arrays:
        """All outputs by name.

        Args:
            tokens: (batch, seq) token ids, or (batch, channels, size, size) pixels.
            mask: (batch, past + seq), 1 for tokens and 0 for padding; default no padding.
            past: the outputs of the call before, whose keys and values are taken.
            token_types: (batch, seq); default 0.
        """
        if "pixel_values" in self.inputs:
            return self._run({"pixel_values": tokens.astype(np.float32)})
        batch, seq = tokens.shape
        feed: Arrays = {"input_ids": tokens.astype(np.int64)}
        for name, (_, heads, _, size) in self._cache.items():
            before = None if past is None else past[name.replace("past_key_values", "present")]
            feed[name] = np.zeros((batch, heads, 0, size), np.float32) if before is None else before
        num_past = next((feed[name].shape[2] for name in self._cache), 0)
        feed["attention_mask"] = np.ones((batch, num_past + seq), np.int64) if mask is None else mask.astype(np.int64)
        if "token_type_ids" in self.inputs:
            feed["token_type_ids"] = np.zeros_like(tokens) if token_types is None else token_types.astype(np.int64)
        return self._run(feed)

    def _run(self, feed: Arrays) -> Arrays:
        values: Any = self.session.run(None, feed)
        return dict(zip(self.outputs, values, strict=True))

    def generate(self, tokens: Sequence[int], max_tokens: int, stop_ids: frozenset[int] = frozenset()) -> list[int]:
        """Greedy continuation with the cache: the new ids, a stop id included."""
        ids: list[int] = []
        step, past = list(tokens), None
        while len(ids) < max_tokens and not (ids and ids[-1] in stop_ids):
            past = self.forward(np.array([step], np.int64), past=past)
            step = [int(past["logits"][0, -1].argmax())]
            ids += step
        return ids


def compare(model: Transformer, exported: OnnxModel, sequences: Sequence[Sequence[int]]) -> dict[str, float]:
    """How far the graph is from the model, on token sequences (each by itself).

    Returns:
        max_difference: of the main output, with relative_error, its root mean square over the output's deviation;
        for logits over tokens: top1_agreement (share of positions) and, where the model is causal, bits_per_token and
        bits_per_token_before; for embeddings: cosine (the least one).
    """
    if not sequences:
        raise UserError("nothing to compare on; give a longer text")
    differences, squares, values = 0.0, 0.0, []
    agreement: list[float] = []
    cosines: list[float] = []
    bits = {"bits_per_token": 0.0, "bits_per_token_before": 0.0}
    num_predicted = 0
    for sequence in sequences:
        tokens = torch.tensor([list(sequence)])
        with torch.no_grad():
            hidden = model(tokens)
        out = exported.forward(tokens.numpy())
        name, expected = _expected(model, hidden, tokens, out)
        got = torch.from_numpy(out[name])
        differences = max(differences, (got - expected).abs().max().item())
        squares += (got - expected).pow(2).mean().item()
        values.append(expected.var().item())
        if name == "logits" and got.dim() == 3:
            agreement.append((got.argmax(-1) == expected.argmax(-1)).float().mean().item())
            if model.config.causal:
                for key, logits in (("bits_per_token", got), ("bits_per_token_before", expected)):
                    loss = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="sum")
                    bits[key] += loss.item() / math.log(2)
                num_predicted += tokens.shape[1] - 1
        if "sentence_embedding" in out:
            cosines.append(_cosine(hidden.float(), torch.from_numpy(out["sentence_embedding"]), exported.pooling))
    result = {"max_difference": differences, "relative_error": math.sqrt(squares / max(sum(values), 1e-30))}
    if agreement:
        result["top1_agreement"] = sum(agreement) / len(agreement)
    if cosines:
        result["cosine"] = min(cosines)
    if num_predicted:
        result |= {key: total / num_predicted for key, total in bits.items()}
    return result


def _cosine(hidden: torch.Tensor, embedding: torch.Tensor, pooling: str) -> float:
    vector = hidden[:, 0] if pooling == "first" else hidden.mean(1)
    return torch.cosine_similarity(vector, embedding).item()


def _expected(model: Transformer, hidden: torch.Tensor, tokens: torch.Tensor, out: Arrays) -> tuple[str, torch.Tensor]:
    """Name of the output to compare, and what our model gives for it."""
    with torch.no_grad():
        if "logits" in out:
            is_classifier = model.config.head == "classifier"
            return "logits", (model.classify(hidden) if is_classifier else model.logits(hidden)).float()
        if "text_embeds" in out:
            return "text_embeds", model.project(hidden[:, tokens[0].argmax()]).float()
        if "image_embeds" in out:
            return "image_embeds", model.project(model.pooled(hidden)).float()
        return "last_hidden_state", hidden.float()
