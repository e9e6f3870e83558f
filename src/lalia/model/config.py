"""Everything that distinguishes one transformer from another, as data."""

from typing import Literal, Self

from pydantic import Field, model_validator

from lalia.settings import Settings


class ModelConfig(Settings):
    """Shape and switches of a `Transformer`.

    The names are those of Hugging Face configs where they have one. `family` says which file of `model/families`
    maps it to and from a model folder.
    """

    family: Literal["llama", "qwen3", "gemma3_text", "nanochat"] = "qwen3"
    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    max_position_embeddings: int = Field(gt=0)
    tie_word_embeddings: bool = True

    rms_norm_eps: float = Field(default=1e-6, gt=0)
    norm_weight: Literal["plain", "offset", "none"] = "plain"
    """How RMSNorm scales: by w, by 1 + w (Gemma), or not at all (nanochat)."""
    norm_order: Literal["pre", "sandwich"] = "pre"
    """Norm before each sublayer, or before and after it (Gemma 3)."""
    embedding_norm: bool = False
    embedding_multiplier: float = 1.0

    qk_norm: Literal["none", "before_rope", "after_rope"] = "none"
    attention_scale: float | None = Field(default=None, gt=0)
    """Factor on query-key products; None means head_dim ** -0.5."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    rope_theta_local: float | None = Field(default=None, gt=0)
    """Base of the rotary frequencies in sliding-window layers; None means rope_theta."""
    rope_direction: Literal[1, -1] = 1
    """Sense of rotation; nanochat turns the other way."""
    sliding_window: int | None = Field(default=None, gt=0)
    """Tokens a windowed layer attends to, the current one included."""
    full_attention_every: int = Field(default=1, gt=0)
    """Every k-th layer attends to everything, the others to the sliding window; 1 means all layers do."""

    activation: Literal["silu", "gelu_tanh", "relu_squared"] = "silu"
    gated: bool = True
    logit_softcap: float = Field(default=0.0, ge=0)
    """Logits become cap * tanh(logits / cap); 0 leaves them alone."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} must be a multiple of num_key_value_heads = "
                f"{self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} must be even for rotary positions")
        if self.full_attention_every > 1 and self.sliding_window is None:
            raise ValueError("full_attention_every > 1 needs sliding_window")
        return self

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        return self.num_key_value_heads * self.head_dim

    def window_of_layer(self, layer: int) -> int | None:
        """Sliding window of a layer in tokens, or None where it attends to everything."""
        return None if (layer + 1) % self.full_attention_every == 0 else self.sliding_window

    def num_matrix_parameters(self) -> int:
        """Weights that take part in a matrix product for every token, the output head included."""
        attention = self.hidden_size * (2 * self.query_size + 2 * self.key_value_size)
        feed_forward = self.hidden_size * self.intermediate_size * (3 if self.gated else 2)
        return self.num_hidden_layers * (attention + feed_forward) + self.vocab_size * self.hidden_size

    def flops_per_token(self, sequence_length: int) -> float:
        """Floating-point operations of one trained token, forward and backward.

        6 per matrix weight, plus 12 * heads * head_dim * (attended length) per layer, without halving for
        causality (Chowdhery et al. 2022, appendix B; Kaplan et al. 2020).
        """
        attended = sum(
            min(self.window_of_layer(layer) or sequence_length, sequence_length)
            for layer in range(self.num_hidden_layers)
        )
        return 6.0 * self.num_matrix_parameters() + 12.0 * self.query_size * attended

    def cache_bytes_per_token(self, bytes_per_value: int = 4) -> int:
        """Bytes of key-value cache that one token of one sequence occupies."""
        return 2 * self.num_hidden_layers * self.key_value_size * bytes_per_value
