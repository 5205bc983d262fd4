"""Tiny random models of every model type that the installed Transformers has."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from streaming_llm.families import module_name

VOCAB = 64
LARGEST = 10_000_000
WINDOW = 24
"""Sliding window of the model's own, where it has one."""

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "sliding_window": WINDOW,
    "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "num_experts": 4,
    "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}  # fmt: skip
MLA = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
FIRST_EXPERTS = 4 if transformers.__version__.startswith("4.") else 1  # DeepSeek's take no float64 there
MLA |= {"v_head_dim": 10, "n_group": 1, "topk_group": 1, "first_k_dense_replace": FIRST_EXPERTS, "head_dim": 4}
HEAD = {"head_dim": 8}
MAMBA = {"mamba_d_state": 8, "mamba_expand": 2, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1}
MAMBA |= {"mamba_chunk_size": 16, "mamba_d_conv": 4}
MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
LINEAR |= {"layer_types": ["linear_attention", "full_attention"] * 2, **HEAD}
CONV = {"layer_types": ["conv", "full_attention"] * 2, "conv_L_cache": 3, "block_multiple_of": 8}
SCALED_QUERIES = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 24}
SCALED_QUERIES |= {"llama_4_scaling_beta": 0.5, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0}
SCALED_QUERIES |= {"mscale_all_dim": 1.0}
VOCAB_PER_LAYER = {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8}

DIFFERENCES: dict[str, dict[str, Any]] = {
    "afmoe": HEAD | MIXED,
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2},
    "axk1": MLA,
    "axk2": MLA,
    "bamba": MAMBA | {"attn_layer_indices": [1, 3], "intermediate_size": 48},
    "cohere2": MIXED,
    "cohere2_moe": MIXED | HEAD,
    "deepseek_v2": MLA | {"topk_method": "greedy"},
    "deepseek_v3": MLA,
    "diffllama": HEAD,
    "dots1": HEAD | {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1},
    "exaone4": MIXED,
    "exaone_moe": MIXED | HEAD | {"n_group": 1, "topk_group": 1, "is_moe_layer": [False, True] * 2},
    "falcon_h1": MAMBA | HEAD | {"mamba_d_ssm": 64, "mamba_chunk_size": 128},
    "gemma": HEAD,
    "gemma2": HEAD | MIXED,
    "gemma3_text": HEAD | MIXED,
    "gemma3n_text": HEAD
    | VOCAB_PER_LAYER
    | {"num_hidden_layers": 6, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 3}
    | {"laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 6, "intermediate_size": [48] * 6},
    "gemma4_text": HEAD
    | VOCAB_PER_LAYER
    | {"num_hidden_layers": 6, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 3}
    | {"global_head_dim": 16},
    "glm": HEAD,
    "glm4": HEAD,
    "glm4_moe": HEAD | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "glm4_moe_lite": MLA,
    "gpt_oss": HEAD | MIXED,
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"] * 2, "position_embedding_type": "rope"},
    "hunyuan_v1_dense": HEAD,
    "hunyuan_v1_moe": HEAD | {"moe_topk": 2},
    "jamba": {"mamba_d_state": 8, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1}
    | {"expert_layer_period": 2, "use_mamba_kernels": False},
    "lfm2": CONV,
    "lfm2_moe": CONV | {"num_dense_layers": 2},
    "llama4_text": {"no_rope_layers": [1, 0, 1, 0], "intermediate_size_mlp": 48, **HEAD},
    "gptj": {"n_embd": 32, "n_layer": 4, "n_head": 4, "rotary_dim": 4, "n_positions": 512, "n_inner": 48},
    "helium": HEAD,
    "minicpm3": MLA,
    "minimax": HEAD | {"layer_types": ["linear_attention", "full_attention"] * 2, "block_size": 16},
    "minimax_m2": HEAD | {"rotary_dim": 4},
    "ministral": HEAD | MIXED,
    "ministral3": HEAD | {"rope_parameters": SCALED_QUERIES},
    "mistral": {"sliding_window": None, **HEAD},
    "nanochat": {},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mamba", "attention"], "mamba_num_heads": 8}
    | {"mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 128, "time_step_min": 1e-6, **HEAD},
    "olmo3": MIXED,
    "olmo_hybrid": LINEAR,
    "phi": {"num_key_value_heads": 4},
    "phi3": {"sliding_window": None},
    "qwen2": {"sliding_window": None},
    "qwen3_5_moe_text": LINEAR,
    "qwen3_5_text": LINEAR,
    "qwen3_next": LINEAR | {"decoder_sparse_step": 1},
    "smollm3": {"no_rope_layers": [1, 0, 1, 1]},
    "solar_open": HEAD | {"n_group": 1, "topk_group": 1},
    "starcoder2": {"sliding_window": None},
    "vaultgemma": HEAD | MIXED,
    "recurrent_gemma": {"lru_width": 32, "head_dim": 8, "block_types": ["recurrent", "attention"] * 2},
    "youtu": MLA,
    "zaya": {"num_experts_per_tok": 1},
}
"""Model type -> what its configuration needs beside ``COMMON``."""


def tiny_config(model_type: str, **changes: Any):
    """A small configuration of a model type."""
    config_class = CONFIG_MAPPING[model_type]
    known = set(inspect.signature(config_class.__init__).parameters) | set(config_class.attribute_map)
    known |= set(getattr(config_class, "__dataclass_fields__", ()))
    aliases = set(config_class.attribute_map.values())
    wanted = {name: value for name, value in COMMON.items() if name in known - aliases or name not in aliases & known}
    wanted = {name: value for name, value in wanted.items() if name in known}
    config = config_class(**(wanted | DIFFERENCES.get(model_type, {}) | changes))
    config._experts_implementation = "eager"  # newer Transformers' default takes no float64
    return config


def tiny_model(model_type: str, **changes: Any) -> PreTrainedModel:
    """A causal language model of a model type, always with the same weights, in float32."""
    config = tiny_config(model_type, **changes)
    with torch.device("meta"):
        size = sum(x.numel() for x in MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).parameters())
    if size > LARGEST:
        raise ValueError(f"the tests know no small model of this type: {size} parameters")
    torch.manual_seed(0)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval().float()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() >= 2 and "conv" not in name and not name.endswith(("A_log", "slope_rate")):
                parameter.normal_(std=0.15)
            elif name.endswith(("sinks", "bias")) and "dt_bias" not in name:
                parameter.normal_(std=0.3)
        head = model.get_output_embeddings()
        if head is not None:
            logits = model(torch.randint(VOCAB, (1, 24))).logits
            head.weight.div_(logits.std())
    return model


def model_types() -> list[str]:
    """Model types of the installed Transformers that have a causal language model and rotary positions, or none."""
    return sorted(
        name
        for name, kind in CONFIG_MAPPING.items()
        if kind in MODEL_FOR_CAUSAL_LM_MAPPING and (name in WITHOUT_POSITIONS or _has_rotary_module(kind))
    )


WITHOUT_POSITIONS = ("gptj", "jamba", "nemotron_h")
"""Model types to look at whose file has no rotary module: GPT-J's table, and hybrids that need no positions."""


def _has_rotary_module(config_class: type) -> bool:
    spec = importlib.util.find_spec(module_name(config_class))
    return spec is not None and "RotaryEmbedding" in Path(spec.origin).read_text(encoding="utf-8")


TRANSFORMERS = transformers.__version__
