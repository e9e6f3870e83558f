"""Grok-1 from the equations of its release, in the plainest PyTorch: what ours is compared with.

The release is JAX code; its arithmetic, restated: embeddings times a constant; per layer
h += norm1(attention(norm0(h))), h += norm3(experts(norm2(h))); scores 30 * tanh(q k / sqrt(d) / 30) before the mask;
rotation by halves; experts weighted by the softmax over all of them, not renormalised; logits times a constant.
Parameters carry the names of the community's model folder.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class GrokReference(nn.Module):
    """A small Grok-1 of the given sizes."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.settings = {key: value for key, value in settings.items() if key != "attn_implementation"}
        s = settings
        self.heads, self.kv_heads, self.head_dim = s["num_attention_heads"], s["num_key_value_heads"], s["head_dim"]
        self.eps, self.num_experts, self.top = s["rms_norm_eps"], s["num_experts"], s["num_experts_per_tok"]
        self.weights = nn.ParameterDict()
        hidden, ff = s["hidden_size"], s["intermediate_size"]
        self._add("model.embed_tokens.weight", s["vocab_size"], hidden)
        for layer in range(s["num_hidden_layers"]):
            at = f"model.layers.{layer}"
            for norm in ("pre_attn", "post_attn", "pre_moe", "post_moe"):
                self._add(f"{at}.{norm}_norm.scale", hidden)
            for name, heads in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads)):
                self._add(f"{at}.attn.{name}_proj.weight", heads * self.head_dim, hidden)
            self._add(f"{at}.attn.o_proj.weight", hidden, self.heads * self.head_dim)
            self._add(f"{at}.moe_block.gate.weight", self.num_experts, hidden)
            for expert in range(self.num_experts):
                self._add(f"{at}.moe_block.experts.{expert}.linear.weight", ff, hidden)
                self._add(f"{at}.moe_block.experts.{expert}.linear_v.weight", ff, hidden)
                self._add(f"{at}.moe_block.experts.{expert}.linear_1.weight", hidden, ff)
        self._add("model.norm.scale", hidden)

    def _add(self, name: str, *shape: int) -> None:
        self.weights[name.replace(".", "/")] = nn.Parameter(torch.empty(shape))

    def _get(self, name: str) -> Tensor:
        return self.weights[name.replace(".", "/")]

    def num_parameters(self) -> int:
        """Number of weights."""
        return sum(p.numel() for p in self.parameters())

    def save_pretrained(self, folder: Path) -> None:
        """Write config.json and model.safetensors."""
        values = {**self.settings, "model_type": "grok-1", "architectures": ["Grok1ModelForCausalLM"]}
        (Path(folder) / "config.json").write_text(json.dumps(values), encoding="utf-8")
        tensors = {name.replace("/", "."): weight.detach() for name, weight in self.weights.items()}
        save_file(tensors, Path(folder) / "model.safetensors")

    def forward(self, tokens: Tensor) -> SimpleNamespace:
        """(batch, seq) -> logits (batch, seq, vocab)."""
        embedding = self._get("model.embed_tokens.weight")
        h = embedding[tokens] * math.sqrt(self.settings["hidden_size"])
        for layer in range(self.settings["num_hidden_layers"]):
            at = f"model.layers.{layer}"
            attended = self._attention(self._norm(h, f"{at}.pre_attn_norm"), at)
            h = h + self._norm(attended, f"{at}.post_attn_norm")
            h = h + self._norm(self._experts(self._norm(h, f"{at}.pre_moe_norm"), at), f"{at}.post_moe_norm")
        h = self._norm(h, "model.norm")
        return SimpleNamespace(logits=h @ embedding.T / math.sqrt(3.0))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * self._get(f"{name}.scale")

    def _attention(self, x: Tensor, at: str) -> Tensor:
        batch, seq, _ = x.shape

        def heads_of(name: str, count: int) -> Tensor:
            return (x @ self._get(f"{at}.attn.{name}_proj.weight").T).view(batch, seq, count, self.head_dim)

        q, k, v = heads_of("q", self.heads), heads_of("k", self.kv_heads), heads_of("v", self.kv_heads)
        half = self.head_dim // 2
        angle = torch.arange(seq)[:, None] / 10_000 ** (torch.arange(half) / half)  # (seq, half)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        q, k = (torch.cat((t[..., :half] * cos - t[..., half:] * sin, t[..., half:] * cos + t[..., :half] * sin), -1)
                for t in (q, k))  # fmt: skip
        out = torch.empty_like(q)
        for head in range(self.heads):
            group = head // (self.heads // self.kv_heads)
            scores = q[:, :, head] @ k[:, :, group].transpose(1, 2) * self.head_dim**-0.5
            scores = 30.0 * torch.tanh(scores / 30.0)
            scores = scores.masked_fill(torch.ones(seq, seq).triu(1).bool(), -1e30)
            out[:, :, head] = scores.softmax(-1) @ v[:, :, group]
        return out.reshape(batch, seq, -1) @ self._get(f"{at}.attn.o_proj.weight").T

    def _experts(self, x: Tensor, at: str) -> Tensor:
        weights = (x @ self._get(f"{at}.moe_block.gate.weight").T).softmax(-1)
        kept = weights >= weights.topk(self.top, -1).values[..., -1:]
        out = torch.zeros_like(x)
        for expert in range(self.num_experts):
            e = f"{at}.moe_block.experts.{expert}"
            gate = nn.functional.gelu(x @ self._get(f"{e}.linear.weight").T, approximate="tanh")
            y = (gate * (x @ self._get(f"{e}.linear_v.weight").T)) @ self._get(f"{e}.linear_1.weight").T
            out = out + y * (weights * kept)[..., expert, None]
        return out


def load_grok_reference(folder: Path) -> GrokReference:
    """The reference with the config and the weights of a folder, sharded or not; every weight must be there, no more.

    The keys that the equations have as constants must say just these.
    """
    values = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    assert math.isclose(values["embedding_multiplier_scale"], math.sqrt(values["hidden_size"]))
    assert math.isclose(values["output_multiplier_scale"], 3**-0.5)
    assert (values["max_attn_value"], values["rope_theta"]) == (30.0, 10_000.0)
    model = GrokReference(values)
    tensors: dict[str, Tensor] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(path)
    model.weights.load_state_dict({name.replace(".", "/"): tensor for name, tensor in tensors.items()})
    return model.eval()
