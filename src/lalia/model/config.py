"""Everything that distinguishes one transformer from another, as data."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from lalia.settings import Settings

FamilyName = Literal[
    "gpt2",
    "llama",
    "mistral",
    "mixtral",
    "grok-1",
    "phi",
    "gemma",
    "gemma2",
    "gemma3_text",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "nanochat",
    "bert",
    "distilbert",
    "clip_text_model",
    "clip_vision_model",
]
LayerType = Literal["full_attention", "sliding_attention"]


class RopeScaling(Settings):
    """How rotary frequencies are changed for contexts longer than those first trained on.

    linear: all divided by `factor` (Chen et al. 2023). llama3: by wavelength, none, a part or all of it (Llama 3.1).
    yarn: likewise by dimension, with cos and sin multiplied by `attention_factor` (Peng et al. 2023). Formulas:
    `lalia.model.rotary`.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float = Field(gt=0)
    original_max_position_embeddings: int = Field(default=0, ge=0)
    """Context in tokens before scaling; llama3 and yarn need it."""
    low_freq_factor: float = Field(default=1.0, gt=0)
    high_freq_factor: float = Field(default=4.0, gt=0)
    beta_fast: float = Field(default=32.0, gt=0)
    beta_slow: float = Field(default=1.0, gt=0)
    attention_factor: float = Field(default=1.0, gt=0)
    truncate: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kind != "linear" and not self.original_max_position_embeddings:
            raise ValueError(f"rope scaling {self.kind!r} needs original_max_position_embeddings")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor = {self.high_freq_factor} must be more than low_freq_factor = {self.low_freq_factor}"
            )
        return self


class ModelConfig(Settings):
    """Shape and switches of a `Transformer`.

    The names are those of Hugging Face configs where they have one. `family` says which file of `model/families`
    maps it to and from a model folder.
    """

    family: FamilyName = "qwen3"
    vocab_size: int = Field(default=0, ge=0)
    """0 only where the input is an image."""
    hidden_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    max_position_embeddings: int = Field(gt=0)
    """Longest sequence in tokens (or patches and the class token)."""
    tie_word_embeddings: bool = True

    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = Field(default=1e-6, gt=0)
    norm_weight: Literal["plain", "offset", "none"] = "plain"
    """How RMSNorm scales: by w, by 1 + w (Gemma), or not at all (nanochat). LayerNorm has a weight and a bias."""
    norm_order: Literal["pre", "sandwich", "post", "parallel"] = "pre"
    """pre: norm before each sublayer. sandwich: before and after (Gemma 2 and 3, Grok-1). post: after the residual sum
    (BERT). parallel: attention and feed-forward read the same norm (Phi)."""
    embedding_norm: bool = False
    """A norm behind the embedding: of the config's kind and weight (without one: nanochat)."""
    embedding_multiplier: float = 1.0
    output_multiplier: float = 1.0
    """Factor on the logits (Grok-1)."""

    qkv_bias: bool = False
    attention_output_bias: bool = False
    feed_forward_bias: bool = False
    qk_norm: Literal["none", "before_rope", "after_rope"] = "none"
    attention_scale: float | None = Field(default=None, gt=0)
    """Factor on query-key products; None means head_dim ** -0.5."""
    attention_softcap: float = Field(default=0.0, ge=0)
    """Scores become cap * tanh(scores / cap) before the mask; 0 leaves them alone."""
    causal: bool = True
    """Whether a token attends to those before it only, or (encoders) to all of its document."""

    positions: Literal["rope", "learned"] = "rope"
    type_vocab_size: int = Field(default=0, ge=0)
    """Segment embeddings (BERT); all tokens are of type 0 unless said."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    rope_theta_local: float | None = Field(default=None, gt=0)
    """Base of the rotary frequencies in sliding-window layers, which then are not scaled; None means rope_theta."""
    rope_fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of head_dim that is rotated (Phi-2: 0.4)."""
    rope_direction: Literal[1, -1] = 1
    """Sense of rotation; nanochat turns the other way."""
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = Field(default=None, gt=0)
    """Tokens a windowed layer attends to, the current one included."""
    layer_types: tuple[LayerType, ...] | None = None
    """Which layers are windowed; None means all of them if there is a sliding_window."""

    activation: Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu_squared"] = "silu"
    gated: bool = True
    num_experts: int = Field(default=0, ge=0)
    """Feed-forward networks per layer among which a router chooses; 0 means one without a router."""
    num_experts_per_token: int = Field(default=0, ge=0)
    expert_size: int | None = Field(default=None, gt=0)
    """Width of an expert; None means intermediate_size."""
    normalize_expert_weights: bool = True
    """Whether the weights of the chosen experts are scaled to sum 1."""
    dense_layers: tuple[int, ...] = ()
    """Layers without experts in a model that has them."""
    router_aux_loss_coef: float = Field(default=0.001, ge=0)
    """Weight of the load-balancing loss in training."""
    router_z_loss_coef: float = Field(default=0.0, ge=0)
    """Weight of the mean squared log-partition of the router in training (Zoph et al. 2022)."""

    head: Literal["language_model", "classifier", "none"] = "language_model"
    head_bias: bool = False
    head_transform: bool = False
    """Dense layer, activation and norm before the head (BERT's masked-token head)."""
    logit_softcap: float = Field(default=0.0, ge=0)
    """Logits become cap * tanh(logits / cap); 0 leaves them alone."""
    pooler: Literal["none", "tanh", "relu"] = "none"
    """Dense layer and activation on the first token: BERT's pooler, DistilBERT's pre-classifier."""
    labels: tuple[str, ...] = ()
    """Names of the classes of a classifier."""
    projection_size: int | None = Field(default=None, gt=0)
    """Width of the shared space that a CLIP tower projects its pooled state to."""

    image_size: int | None = Field(default=None, gt=0)
    """Side of a square image in pixels; not None means the input is an image cut into patches, not tokens."""
    patch_size: int | None = Field(default=None, gt=0)
    num_channels: int = Field(default=3, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _one_way_to_say_it(cls, values: Any) -> Any:
        """Where all layers are of one type, layer_types is None, so that equal models have equal configs."""
        types = values.get("layer_types") if isinstance(values, dict) else None
        if not isinstance(types, list | tuple) or len(types) != values.get("num_hidden_layers"):
            return values
        if all(kind == "full_attention" for kind in types):
            return {**values, "layer_types": None, "sliding_window": None}
        return {**values, "layer_types": None} if all(kind == "sliding_attention" for kind in types) else values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = []
        if self.num_attention_heads % self.num_key_value_heads:
            problems.append(
                f"num_attention_heads = {self.num_attention_heads} must be a multiple of num_key_value_heads = "
                f"{self.num_key_value_heads}"
            )
        if self.positions == "rope" and (self.rotary_size % 2 or self.rotary_size == 0):
            size = f"rope_fraction * head_dim = {self.rotary_size}" if self.rope_fraction < 1 else "head_dim"
            problems.append(f"{size} = {self.head_dim} must be even for rotary positions")
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            problems.append(
                f"layer_types has {len(self.layer_types)} entries, expected num_hidden_layers = "
                f"{self.num_hidden_layers}"
            )
        if "sliding_attention" in (self.layer_types or ()) and self.sliding_window is None:
            problems.append("layer_types with sliding_attention needs sliding_window")
        if self.sliding_window is not None and not self.causal:
            problems.append(f"sliding_window = {self.sliding_window} is implemented for causal attention only")
        if self.num_experts and not 0 < self.num_experts_per_token <= self.num_experts:
            problems.append(
                f"num_experts_per_token = {self.num_experts_per_token} must be 1 to num_experts = {self.num_experts}"
            )
        if self.head == "classifier" and len(self.labels) < 2:
            problems.append(f"a classifier needs at least two labels, got {len(self.labels)}")
        if self.image_size is None and not self.vocab_size:
            problems.append("vocab_size = 0: expected a positive number")
        if self.image_size is not None and (not self.patch_size or self.image_size % self.patch_size):
            problems.append(f"image_size = {self.image_size} must be a multiple of patch_size = {self.patch_size}")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def rotary_size(self) -> int:
        """Dimensions of a head that are rotated; they come first."""
        return int(self.head_dim * self.rope_fraction)

    def window_of_layer(self, layer: int) -> int | None:
        """Sliding window of a layer in tokens, or None where it attends to everything."""
        if self.layer_types is not None and self.layer_types[layer] == "full_attention":
            return None
        return self.sliding_window

    def rope_of_layer(self, layer: int) -> tuple[float, RopeScaling | None]:
        """Base and scaling of the rotary frequencies of a layer."""
        if self.rope_theta_local is not None and self.window_of_layer(layer) is not None:
            return self.rope_theta_local, None
        return self.rope_theta, self.rope_scaling

    def experts_of_layer(self, layer: int) -> int:
        """Number of experts of a layer, 0 where its feed-forward network is an ordinary one."""
        return 0 if layer in self.dense_layers else self.num_experts

    def num_matrix_parameters(self) -> int:
        """Weights that take part in a matrix product for every token, the output head included.

        Of a layer with experts, those of the chosen ones and the router.
        """
        attention = self.hidden_size * (2 * self.query_size + 2 * self.key_value_size)
        matrices = 3 if self.gated else 2
        total = self.num_hidden_layers * attention
        for layer in range(self.num_hidden_layers):
            if num_experts := self.experts_of_layer(layer):
                size = self.num_experts_per_token * (self.expert_size or self.intermediate_size)
                total += self.hidden_size * (size * matrices + num_experts)
            else:
                total += self.hidden_size * self.intermediate_size * matrices
        if self.head_transform:
            total += self.hidden_size**2
        return total + (self.vocab_size * self.hidden_size if self.head == "language_model" else 0)

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
        """Bytes of key-value cache that one token of one sequence occupies, in layers without a window."""
        return self.cache_bytes(1, bytes_per_value)

    def cache_bytes(self, length: int, bytes_per_value: int = 4) -> int:
        """Bytes of key-value cache of one sequence of `length` tokens: a windowed layer keeps only its window."""
        tokens = sum(min(length, self.window_of_layer(layer) or length) for layer in range(self.num_hidden_layers))
        return 2 * self.key_value_size * bytes_per_value * tokens
