"""Tiny random models of every family, each with what sets its family apart."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from streaming_llm.families import supported_families

VOCAB = 64
LENGTH = 330
POSITIONS = 160
"""``max_position_embeddings``: less than half the stream."""

SLIDING = 64
"""Sliding window of the model's own, where a family has one."""

_COMMON = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": POSITIONS, "initializer_range": 0.15,
    "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
GQA = {"num_key_value_heads": 2}
MQA = {"num_key_value_heads": 1}
WIDE = {"head_dim": 12}
BOTH_LAYERS = {"sliding_window": SLIDING, "layer_types": ["sliding_attention", "full_attention"]}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}


def scaled(rope_type: str, **parameters: Any) -> dict[str, Any]:
    """Rotary scaling, by both names that Transformers has had for it."""
    parameters = {"rope_type": rope_type, **parameters}
    return {"rope_scaling": parameters, "rope_theta": 10_000.0}


ORIGINAL = 120
"""Length up to which the frequencies of longrope are constant."""

LONGROPE = scaled("longrope", short_factor=[1.0, 1.5, 2.0, 3.0], long_factor=[2.0] * 4)
if transformers.__version__.startswith("4."):
    LONGROPE["rope_scaling"]["type"] = LONGROPE["rope_scaling"].pop("rope_type")
LLAMA3 = scaled("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=40)
YARN = scaled("yarn", factor=4.0, original_max_position_embeddings=40)

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_neox": ("GPTNeoX", {"rotary_pct": 0.5, "use_parallel_residual": True}),
    "gpt_neox-sequential": ("GPTNeoX", {"rotary_pct": 1.0, "use_parallel_residual": False}),
    "llama": ("Llama", GQA),
    "llama-mqa-bias": ("Llama", {**MQA, "attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("Llama", {**GQA, **scaled("linear", factor=4.0)}),
    "llama-llama3": ("Llama", {**GQA, **LLAMA3}),
    "llama-yarn": ("Llama", {**GQA, **YARN}),
    "llama-dynamic": ("Llama", {**GQA, **scaled("dynamic", factor=2.0)}),
    "mistral": ("Mistral", {**GQA, "sliding_window": SLIDING}),
    "qwen2": ("Qwen2", GQA),
    "qwen2-sliding": ("Qwen2", {**GQA, "use_sliding_window": True, "sliding_window": SLIDING, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {**GQA, **WIDE}),
    "olmo": ("Olmo", GQA),
    "olmo2": ("Olmo2", GQA),
    "olmo3": ("Olmo3", {**GQA, **BOTH_LAYERS}),
    "olmo3-yarn": ("Olmo3", {**GQA, **BOTH_LAYERS, **YARN}),
    "smollm3": ("SmolLM3", {**GQA, "no_rope_layers": [1, 0]}),
    "granite": (
        "Granite",
        {**GQA, "attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.7}
        | {"logits_scaling": 2.5},
    ),
    "stablelm": ("StableLm", {**GQA, "use_qkv_bias": True}),
    "stablelm-parallel": ("StableLm", {**GQA, "use_parallel_residual": True, "qk_layernorm": True}),
    "phi": ("Phi", {**GQA, "partial_rotary_factor": 0.5, "hidden_act": "gelu_new"}),
    "phi-normed": ("Phi", {"qk_layernorm": True, "partial_rotary_factor": 0.5, "hidden_act": "gelu_new"}),
    "phi3": ("Phi3", {**GQA, "sliding_window": SLIDING}),
    "phi3-longrope": (
        "Phi3",
        {**GQA, "sliding_window": None, "original_max_position_embeddings": ORIGINAL, **LONGROPE},
    ),
    "gemma": ("Gemma", {**MQA, **WIDE}),
    "gemma2": (
        "Gemma2",
        {**GQA, **WIDE, **BOTH_LAYERS, "query_pre_attn_scalar": 20}
        | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma2-uncapped": ("Gemma2", {**GQA, **WIDE, **BOTH_LAYERS, "attn_logit_softcapping": None}),
    "gemma3": ("Gemma3", {**GQA, **WIDE, **BOTH_LAYERS, "query_pre_attn_scalar": 20, "initializer_range": 0.1}),
    "gptj": (
        "GPTJ",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "rotary_dim": 4, "n_positions": POSITIONS},
    ),
    "falcon": ("Falcon", {"multi_query": True, "parallel_attn": True, "bias": False}),
    "falcon-new": (
        "Falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "parallel_attn": True, "bias": True},
    ),
    "falcon-sequential": ("Falcon", {"multi_query": False, "parallel_attn": False, "bias": True}),
    "cohere": ("Cohere", {**GQA, "logit_scale": 0.3}),
    "cohere-normed": ("Cohere", {**GQA, "use_qk_norm": True}),
    "cohere2": ("Cohere2", {**GQA, **BOTH_LAYERS, "logit_scale": 0.3}),
    "glm": ("Glm", {**GQA, "head_dim": 8, "partial_rotary_factor": 0.5, "attention_bias": True}),
    "glm4": ("Glm4", {**GQA, "head_dim": 8, "partial_rotary_factor": 0.5, "attention_bias": True}),
    "starcoder2": ("Starcoder2", {**GQA, "sliding_window": SLIDING, "use_bias": True}),
    "mixtral": ("Mixtral", {**GQA, **MOE, "num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2Moe",
        {**GQA, **MOE, "num_experts": 4, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1},
    ),
    "qwen3_moe": ("Qwen3Moe", {**GQA, **MOE, "num_experts": 4, "decoder_sparse_step": 1, "norm_topk_prob": True}),
}
"""Name -> prefix of the classes, and what differs from ``_COMMON``."""

TEXT_CONFIGS = {"Gemma3": "Gemma3TextConfig"}
SIZES = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"]
"""What GPT-J has by other names."""


def make_config(case: str, attention: str = "sdpa", **changes: Any):
    """The configuration of a case."""
    prefix, differences = CASES[case]
    common = {k: v for k, v in _COMMON.items() if prefix != "GPTJ" or k not in SIZES}
    config_class = getattr(transformers, TEXT_CONFIGS.get(prefix, f"{prefix}Config"))
    config = config_class(**{**common, **differences, **changes})
    config._attn_implementation = attention if takes_sdpa(case) else "eager"
    config._experts_implementation = "eager"  # newer Transformers' default takes no float64
    return config


@functools.cache
def _weights(case: str, **sizes: int) -> dict[str, torch.Tensor]:
    """Random weights, norms and biases too, with logits of a standard deviation of 1."""
    torch.manual_seed(0)
    model = getattr(transformers, f"{CASES[case][0]}ForCausalLM")(make_config(case, **sizes)).eval()
    torch.manual_seed(0)  # versions differ in what they draw, and in which order
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.dim() == 1 or "norm" in name:
                parameter.normal_(0.0 if CASES[case][0].startswith("Gemma") else 1.0, 0.2)  # Gemma's add one
            else:
                parameter.normal_(std=model.config.initializer_range)
        logits = model(torch.randint(VOCAB, (1, 40))).logits
        model.get_output_embeddings().weight.div_(logits.std())
    return model.state_dict()


def make_family(
    case: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa", **changes: Any
) -> PreTrainedModel:
    """A model of a case, always with the same weights."""
    sizes = {name: changes[name] for name in changes.keys() & {"intermediate_size", "head_dim"}}
    model = getattr(transformers, f"{CASES[case][0]}ForCausalLM")(make_config(case, attention, **changes)).eval()
    model.load_state_dict(_weights(case, **sizes))
    return to_dtype(model, dtype)


def to_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Cast weights; buffers of rotary frequencies stay in float32, as when a checkpoint is loaded with a dtype."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def available(case: str) -> bool:
    """Whether the installed Transformers has the family of a case."""
    if case == "stablelm-parallel" and transformers.__version__.startswith("4."):
        return False  # cannot initialise the norms of queries and keys
    return hasattr(transformers, f"{CASES[case][0]}ForCausalLM")


def takes_sdpa(case: str) -> bool:
    """Whether Transformers offers the family of a case with SDPA: GPT-J never, Gemma 2 no longer."""
    return getattr(transformers, f"{CASES[case][0]}ForCausalLM")._supports_sdpa


HERE = [case for case in CASES if available(case) and make_config(case).model_type in supported_families()]
"""Cases that the installed Transformers has, in a form that streams."""
