"""Tiny models with random weights, as the outside reference of every family: transformers', and for Grok-1, which it
does not have, one written from the published equations."""

from typing import Any

import torch
import transformers
from torch import Tensor

from tests.formats.grok_reference import GrokReference

SEQUENCE_LENGTH = 40  # five times the windows, more than the contexts before scaling

LLAMA_LIKE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not 48 / 4
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,  # not the default, and large enough to be seen
    "attn_implementation": "eager",
}
ENCODER = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "layer_norm_eps": 1e-3,
    "attn_implementation": "eager",
}
DISTIL = {
    "vocab_size": 97,
    "dim": 48,
    "n_layers": 3,
    "n_heads": 4,
    "hidden_dim": 80,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}
NO_IDS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
DEFAULT_HEAD_DIM = {"head_dim": 12}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 4096}

# name -> (model_type, class in transformers, settings)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": (
        "gpt2",
        "GPT2LMHeadModel",
        {
            "vocab_size": 97,
            "n_embd": 48,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 64,
            "layer_norm_epsilon": 1e-3,
            "attn_implementation": "eager",
            **NO_IDS,
        },
    ),
    "llama": (
        "llama",
        "LlamaForCausalLM",
        {**LLAMA_LIKE, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "tie_word_embeddings": True},
    ),
    "llama with biases": (
        "llama",
        "LlamaForCausalLM",
        {**LLAMA_LIKE, "head_dim": 12, "attention_bias": True, "mlp_bias": True},
    ),
    "llama 3.1": ("llama", "LlamaForCausalLM", {**LLAMA_LIKE, "rope_parameters": LLAMA3}),
    "llama, linear scaling": (
        "llama",
        "LlamaForCausalLM",
        {**LLAMA_LIKE, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "llama, YaRN": ("llama", "LlamaForCausalLM", {**LLAMA_LIKE, "rope_parameters": YARN}),
    "mistral": ("mistral", "MistralForCausalLM", {**LLAMA_LIKE, "sliding_window": 8, **NO_IDS}),
    "mixtral": (
        "mixtral",
        "MixtralForCausalLM",
        {**LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2, **NO_IDS},
    ),
    "grok-1": ("grok-1", "", {**LLAMA_LIKE, "num_experts": 4, "num_experts_per_tok": 2}),
    "phi": (
        "phi",
        "PhiForCausalLM",
        {
            **{key: value for key, value in ENCODER.items() if key != "hidden_size"},
            "hidden_size": 80,
            "partial_rotary_factor": 0.4,
            **NO_IDS,
        },
    ),
    "gemma": ("gemma", "GemmaForCausalLM", {**LLAMA_LIKE, **NO_IDS}),
    "gemma2": (
        "gemma2",
        "Gemma2ForCausalLM",
        {**LLAMA_LIKE, "query_pre_attn_scalar": 24, "sliding_window": 8, "attn_logit_softcapping": 5.0, **NO_IDS},
    ),
    "gemma3_text": (
        "gemma3_text",
        "Gemma3ForCausalLM",
        {
            **LLAMA_LIKE,
            "query_pre_attn_scalar": 24,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "final_logit_softcapping": 20.0,
            **NO_IDS,
        },
    ),
    "gemma3_text, scaled": (
        "gemma3_text",
        "Gemma3ForCausalLM",
        {
            **LLAMA_LIKE,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            **NO_IDS,
        },
    ),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", {**LLAMA_LIKE, **DEFAULT_HEAD_DIM, **NO_IDS}),
    "qwen2, windowed": (
        "qwen2",
        "Qwen2ForCausalLM",
        {
            **LLAMA_LIKE,
            **DEFAULT_HEAD_DIM,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
            **NO_IDS,
        },
    ),
    "qwen3": (
        "qwen3",
        "Qwen3ForCausalLM",
        {**LLAMA_LIKE, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": False},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {
            **LLAMA_LIKE,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
            **NO_IDS,
        },
    ),
    "nanochat": ("nanochat", "NanoChatForCausalLM", {**LLAMA_LIKE, **NO_IDS}),
    "bert": ("bert", "BertForMaskedLM", {**ENCODER}),
    "bert, pooled": ("bert", "BertModel", {**ENCODER}),
    "bert, classifier": ("bert", "BertForSequenceClassification", {**ENCODER, "num_labels": 3}),
    "distilbert": ("distilbert", "DistilBertForMaskedLM", DISTIL),
    "distilbert, encoder": ("distilbert", "DistilBertModel", DISTIL),
    "distilbert, classifier": ("distilbert", "DistilBertForSequenceClassification", {**DISTIL, "num_labels": 3}),
    "clip text": (
        "clip_text_model",
        "CLIPTextModelWithProjection",
        {**ENCODER, "projection_dim": 24, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 96},
    ),
    "clip vision": (
        "clip_vision_model",
        "CLIPVisionModelWithProjection",
        {
            **{key: ENCODER[key] for key in ENCODER if key not in ("vocab_size", "max_position_embeddings")},
            "projection_dim": 24,
            "image_size": 24,
            "patch_size": 8,
        },
    ),
}
CAUSAL = [name for name, (_, kind, _) in MODELS.items() if "CausalLM" in kind or "LMHead" in kind or name == "grok-1"]

# Families whose switches a wrong value of `ModelConfig` must betray.
SWITCHES: dict[str, list[dict[str, Any]]] = {
    "gpt2": [{"activation": "gelu"}, {"norm_eps": 1e-5}, {"norm": "rms"}],
    "llama": [
        {"rope_theta": 4e5},
        {"norm_eps": 1e-6},
        {"rope_direction": -1},
        {"activation": "gelu_tanh"},
        {"rope_fraction": 0.5},
    ],
    "llama 3.1": [{"rope_scaling": None}, {"rope_theta": 1e4}],
    "llama, linear scaling": [{"rope_scaling": None}],
    "llama, YaRN": [{"rope_scaling": None}, {"rope_scaling.attention_factor": 1.0}, {"rope_scaling.beta_fast": 16.0}],
    "mistral": [{"sliding_window": 7}, {"sliding_window": 9}, {"sliding_window": None}],
    "mixtral": [{"normalize_expert_weights": False}, {"num_experts_per_token": 1}, {"num_experts_per_token": 3}],
    "grok-1": [
        {"attention_softcap": 0.0},
        {"normalize_expert_weights": True},
        {"output_multiplier": 1.0},
        {"embedding_multiplier": 1.0},
        {"activation": "gelu"},
        {"norm_order": "pre"},
    ],
    "phi": [
        {"rope_fraction": 0.5},
        {"rope_fraction": 1.0},
        {"activation": "gelu"},
        {"norm_eps": 1e-5},
    ],
    "gemma": [{"norm_weight": "plain"}, {"embedding_multiplier": 1.0}, {"activation": "gelu"}],
    "gemma2": [
        {"attention_softcap": 0.0},
        {"logit_softcap": 0.0},
        {"sliding_window": 7},
        {"sliding_window": 9},
        {"layer_types": None},
        {"attention_scale": None},
        {"norm_order": "pre"},
    ],
    "gemma3_text": [
        {"sliding_window": 7},
        {"sliding_window": 9},
        {"layer_types": None},
        {"rope_theta": 1e4},
        {"rope_theta_local": 1e6},
        {"attention_scale": None},
        {"norm_weight": "plain"},
        {"norm_order": "pre"},
        {"embedding_multiplier": 1.0},
        {"qk_norm": "none"},
        {"logit_softcap": 0.0},
        {"activation": "silu"},
        {"norm_eps": 1e-6},
    ],
    "gemma3_text, scaled": [{"rope_scaling": None}, {"rope_theta_local": None}],
    "qwen2": [{"qkv_bias": False}, {"rope_theta": 1e6}],
    "qwen2, windowed": [{"sliding_window": 7}, {"sliding_window": 9}, {"layer_types": None}],
    "qwen3": [
        {"rope_theta": 1e4},
        {"norm_eps": 1e-6},
        {"qk_norm": "none"},
        {"qk_norm": "after_rope"},
        {"rope_direction": -1},
        {"attention_scale": 12**-0.5},
    ],
    "qwen3_moe": [{"normalize_expert_weights": False}, {"num_experts_per_token": 1}],
    "nanochat": [
        {"rope_direction": 1},
        {"qk_norm": "none"},
        {"qk_norm": "before_rope", "rope_theta": 1e3},
        {"embedding_norm": False},
        {"logit_softcap": 0.0},
        {"activation": "silu"},
    ],
    "bert": [
        {"activation": "gelu_tanh"},
        {"norm_eps": 1e-12},
        {"causal": True},
        {"head_transform": False},
        {"head_bias": False},
        {"type_vocab_size": 0},
    ],
    "bert, pooled": [{"pooler": "relu"}, {"pooler": "none"}],
    "distilbert": [{"activation": "gelu_tanh"}, {"norm_eps": 1e-3}, {"causal": True}],
    "distilbert, classifier": [{"pooler": "tanh"}],
    "clip text": [{"activation": "gelu"}, {"causal": False}, {"norm_eps": 1e-5}],
    "clip vision": [{"activation": "gelu"}, {"embedding_norm": False}, {"norm_eps": 1e-5}],
}


def make_reference(name: str, **changes: Any) -> Any:
    """A model in which nothing is at a value that would hide a mistake."""
    model_type, kind, settings = MODELS[name]
    settings = {**settings, **changes}
    if model_type == "grok-1":
        model: Any = GrokReference(settings)
    else:
        config = transformers.AutoConfig.for_model(model_type, **settings)
        model = getattr(transformers, kind)._from_config(
            config, attn_implementation=settings.get("attn_implementation", "eager")
        )
    generator = torch.Generator().manual_seed(3)
    offset = model_type.startswith("gemma")
    with torch.no_grad():
        for parameter, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 1 and parameter.endswith("bias"):
                weight.copy_(0.2 * noise)
            elif weight.dim() == 1 and "class_embedding" not in parameter:
                # Norms scale by about 0.6 in every family; Gemma's by 1 + weight.
                weight.copy_((-0.4 if offset else 0.6) + 0.2 * noise)
            elif any(part in parameter for part in ("embed", "wte", "wpe")):
                weight.copy_(0.2 * noise)
            else:
                fan_in = weight.shape[0] if model_type == "gpt2" else weight[0].numel()
                fan_in = weight.shape[-1] if weight.dim() == 3 else fan_in
                weight.copy_(1.5 * noise * fan_in**-0.5)
    return model.eval()


def make_input(name: str) -> Tensor:
    """(2, SEQUENCE_LENGTH) token ids, or (2, 3, 24, 24) pixels."""
    generator = torch.Generator().manual_seed(5)
    if name == "clip vision":
        return torch.randn(2, 3, 24, 24, generator=generator)
    tokens = torch.randint(0, 96, (2, SEQUENCE_LENGTH), generator=generator)
    if name == "clip text":
        tokens[:, -1] = 96  # the end of the text, whose state is pooled
    return tokens


def their_output(name: str, model: Any, given: Tensor, **more: Tensor) -> Tensor:
    """Logits, pooled states and hidden states, or projected states, as the model has them."""
    with torch.no_grad():
        out = model(given, **more)
    if name == "clip text":
        return out.text_embeds
    if name == "clip vision":
        return out.image_embeds
    if name == "bert, pooled":
        return torch.cat((out.last_hidden_state, out.pooler_output[:, None]), 1)
    if name == "distilbert, encoder":
        return out.last_hidden_state
    return out.logits


def our_output(name: str, model: Any, given: Tensor, **more: Tensor) -> Tensor:
    """The same of ours."""
    with torch.no_grad():
        hidden = model(given, **more)
        if name == "clip text":  # the state at the end of the text, the token with the highest number
            return model.project(hidden[torch.arange(len(given)), given.argmax(1)])
        if name == "clip vision":
            return model.project(model.pooled(hidden))
        if name == "bert, pooled":
            return torch.cat((hidden, model.pooled(hidden)[:, None]), 1)
        if model.config.head == "classifier":
            return model.classify(hidden)
        return hidden if model.config.head == "none" else model.logits(hidden)
