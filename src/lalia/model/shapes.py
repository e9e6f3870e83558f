"""Default shapes: from a width and a depth to a whole ModelConfig, per family."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from lalia.errors import UserError
from lalia.model.config import ModelConfig
from lalia.settings import Settings


class ArchitectureConfig(Settings):
    """Which transformer to build; whatever is None is planned."""

    family: Literal["llama", "qwen3", "qwen3_moe", "gemma3_text", "nanochat"] = "qwen3"
    hidden_size: int | None = Field(default=None, ge=32, multiple_of=32)
    num_hidden_layers: int | None = Field(default=None, gt=0)
    head_dim: int | None = Field(default=None, ge=8, multiple_of=2)
    num_key_value_heads: int | None = Field(default=None, gt=0)
    intermediate_size: int | None = Field(default=None, gt=0)
    num_experts: int | None = Field(default=None, ge=2)
    """Feed-forward networks per layer among which a router chooses, in a family that has them; None means 8 there."""
    num_experts_per_token: int | None = Field(default=None, gt=0)
    """None means 2."""
    expert_size: int | None = Field(default=None, gt=0)
    """Width of an expert; None means that those of a token are together as wide as intermediate_size."""
    max_position_embeddings: int | None = Field(default=None, gt=0)
    """Longest context in tokens; None means the training sequence length."""
    tie_word_embeddings: bool | None = None

    @model_validator(mode="after")
    def _buildable(self) -> Self:
        experts = (self.num_experts, self.num_experts_per_token, self.expert_size)
        if self.family != "qwen3_moe" and experts != (None, None, None):
            raise ValueError(f"model.family = {self.family!r} has no experts; set it to 'qwen3_moe'")
        if self.hidden_size:  # what does not fit together shows before any stage has run
            self.build(vocab_size=1, context=1, num_layers=1)
        return self

    def build(
        self, vocab_size: int, context: int, hidden_size: int | None = None, num_layers: int | None = None
    ) -> ModelConfig:
        """The whole configuration, with a width and depth for those the settings leave open.

        The feed-forward width is 8/3 of the hidden size where it is gated and 4 times where it is not, which costs
        the same (Shazeer 2020), rounded to a multiple of 64. Experts divide it, so a token costs no more with them.
        """
        hidden = self.hidden_size or hidden_size
        layers = self.num_hidden_layers or num_layers
        if hidden is None or layers is None:
            raise ValueError("hidden_size and num_hidden_layers must be set or planned")
        head_dim = self.head_dim or (64 if hidden % 64 == 0 else 32)
        if hidden % head_dim:
            raise UserError(f"model.hidden_size = {hidden} must be a multiple of model.head_dim = {head_dim}")
        heads = hidden // head_dim
        switches = _SWITCHES[self.family](hidden)
        gated = switches.get("gated", True)
        values: dict[str, Any] = {
            "family": self.family,
            "vocab_size": vocab_size,
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": self.num_key_value_heads or heads,
            "head_dim": head_dim,
            "intermediate_size": self.intermediate_size or (round(hidden * 8 / 3 / 64) * 64 if gated else 4 * hidden),
            "max_position_embeddings": self.max_position_embeddings or context,
            # An embedding of its own costs memory but no time, and learns more per token (docs/decisions/002).
            "tie_word_embeddings": False,
            **switches,
        }
        if self.family == "qwen3_moe":
            chosen = self.num_experts_per_token or 2
            values |= {
                "num_experts": self.num_experts or 8,
                "num_experts_per_token": chosen,
                "expert_size": self.expert_size or max(1, round(values["intermediate_size"] / chosen / 16)) * 16,
            }
        if self.tie_word_embeddings is not None:
            values["tie_word_embeddings"] = self.tie_word_embeddings
        return ModelConfig.parse(values, "model")


_SWITCHES: dict[str, Any] = {
    "llama": lambda hidden: {"norm_eps": 1e-5},
    "qwen3": lambda hidden: {"qk_norm": "before_rope"},
    "qwen3_moe": lambda hidden: {"qk_norm": "before_rope"},
    "gemma3_text": lambda hidden: {
        "qk_norm": "before_rope",
        "norm_order": "sandwich",
        "norm_weight": "offset",
        "activation": "gelu_tanh",
        "embedding_multiplier": hidden**0.5,
    },
    "nanochat": lambda hidden: {
        "qk_norm": "after_rope",
        "norm_weight": "none",
        "embedding_norm": True,
        "activation": "relu_squared",
        "gated": False,
        "logit_softcap": 15.0,
        "rope_direction": -1,
    },
}
