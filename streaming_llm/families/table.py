"""What no measurement finds: the table of rotations of GPT-J, words for refusals, and which families are tested."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING

from ..rope_utils import Rotary

LEARNED = "it has learned absolute positions, which end with its context length"
SINUSOIDAL = "it has sinusoidal absolute positions"
ALIBI = "it has ALiBi position biases instead of rotary positions"
RECURRENT = "it has no attention: its recurrent layers' state holds the whole past, in constant memory already"
REFUSED: dict[str, str] = {
    "biogpt": LEARNED,
    "bloom": ALIBI,
    "ctrl": SINUSOIDAL,
    "falcon_mamba": RECURRENT,
    "gpt2": LEARNED,
    "gpt_bigcode": LEARNED,
    "gpt_neo": LEARNED,
    "mamba": RECURRENT,
    "mamba2": RECURRENT,
    "mpt": ALIBI,
    "opt": LEARNED,
    "xglm": SINUSOIDAL,
}
"""Model types without rotary positions -> why they cannot stream. Measurement would say less."""

STREAMING = (
    "afmoe", "apertus", "arcee", "aria", "aria_text", "axk1", "bamba", "bitnet", "cohere", "cohere2",
    "cohere2_moe", "cwm", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5", "ernie4_5_moe", "exaone4",
    "exaone_moe", "falcon", "falcon_h1", "flex_olmo", "flint", "gemma", "gemma2", "gemma3", "gemma3_text",
    "gemma3n", "gemma3n_text", "gemma4_text", "gemma4_unified_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite",
    "gpt_neox", "gpt_oss", "gptj", "granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoehybrid",
    "granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hyperclovax", "jais2", "jamba",
    "kolibri1", "laguna", "lfm2", "lfm2_moe", "lfm3", "llama", "mellum", "mimo_v2_flash", "minicpm3", "minimax",
    "minimax_m2", "minimax_m3_vl_text", "ministral", "ministral3", "mistral", "mixtral", "modernbert-decoder",
    "moshi", "nanochat", "nemotron", "nemotron_h", "olmo", "olmo2", "olmo3", "olmo_hybrid", "olmoe", "persimmon",
    "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text",
    "qwen3_5_text", "qwen3_moe", "qwen3_next", "qwen3_vl", "seed_oss", "smollm3", "solar_open", "stablelm",
    "starcoder2", "vaultgemma", "youtu",
)  # fmt: skip
"""Model types that the tests show to stream. Others are measured when they are used, and stream if they agree."""

REWRITTEN_TYPES = ("falcon", "gptj", "stablelm")
"""Families whose attention layers this library can make go through Transformers' attention functions."""

LAYER_TYPES = ("full_attention", "sliding_attention", "attention", "hybrid")
"""Kinds of layers with attention that can stream."""


def text_config(config: Any) -> Any:
    """The part of a configuration that describes the language model."""
    return config.get_text_config(decoder=True)


def value_of(config: Any, name: str) -> Any:
    """A value in a configuration; ``None`` where it has none, or one for each layer (Gemma 4)."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return None


def module_name(config_class: type) -> str:
    """The name of the model file that belongs to a class of configurations."""
    package, _, name = config_class.__module__.rpartition(".")
    return f"{package}.{name.replace('configuration_', 'modeling_', 1)}"


def supported_families() -> list[str]:
    """Model types that are known to stream with the installed Transformers."""
    return [name for name in STREAMING if name in CONFIG_MAPPING and _can_be_attached(name)]


def _can_be_attached(model_type: str) -> bool:
    """Whether a model file goes through Transformers' attention functions; read, not imported."""
    if model_type in REWRITTEN_TYPES:
        return True
    spec = importlib.util.find_spec(module_name(CONFIG_MAPPING[model_type]))
    if spec is None or spec.origin is None:
        return False
    return model_type in OUTER or "ALL_ATTENTION_FUNCTIONS" in Path(spec.origin).read_text(encoding="utf-8")


OUTER = ("aria", "gemma3", "gemma3n", "qwen3_5", "qwen3_5_moe", "qwen3_vl")
"""Those of :data:`STREAMING` that hold a language model beside others."""


# GPT-J


def table_length(config: Any) -> int | None:
    """Positions that the model has rotations for, if its table of them is finite."""
    return config.max_position_embeddings if config.model_type == "gptj" else None


def table_rotation(config: Any) -> Rotary | None:
    """The frequencies that GPT-J's table of sines and cosines is made from."""
    if config.model_type != "gptj":
        return None
    dim = config.rotary_dim or config.n_embd
    inv_freq = 1.0 / (10000 ** (torch.arange(0, dim, 2, dtype=torch.int64) / dim))
    return Rotary(inv_freq.to(torch.float64), interleaved=True)
