"""Which models can stream, and what of them the library has to know.

A model family outside the table is refused: its positions would otherwise be treated by guess.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
import transformers
from torch import Tensor, nn

TRANSFORMERS_MAJOR = int(transformers.__version__.partition(".")[0])


@dataclass(frozen=True)
class ModelFamily:
    """One family of rotary models in Transformers.

    Args:
        folder: its folder below ``transformers.models``.
        prefix: what its class names begin with.
        interleaved: rotates neighbouring dimensions instead of halves.
        paired_angles: its rotary module gives each angle twice in a row instead of all angles twice.
        rotated: ``config -> [layer is rotated, ...]`` where some layers have no positions at all.
        logits: ``(config, output layer's result) -> logits`` where the model scales or caps them.
        refuses: ``config -> reason`` or ``None``, for configurations of the family that cannot stream.
        rotation_table: ``config -> positions`` of the finite table that it reads its rotations from.
        forces_mask: its model asks for a mask in every forward, though attention is plainly causal.
        since: first major version of Transformers in which its attention can be replaced.
    """

    folder: str
    prefix: str
    interleaved: bool = False
    paired_angles: bool = False
    rotated: Callable[[object], list[bool]] | None = None
    logits: Callable[[object, Tensor], Tensor] | None = None
    refuses: Callable[[object], str | None] | None = None
    rotation_table: Callable[[object], int] | None = None
    forces_mask: bool = False
    since: int = 4

    @property
    def module_name(self) -> str:
        return f"transformers.models.{self.folder}.modeling_{self.folder}"

    @property
    def is_installed(self) -> bool:
        """Whether the installed Transformers has this family, and in a form that can stream."""
        if self.since > TRANSFORMERS_MAJOR:
            return False
        try:
            return importlib.util.find_spec(self.module_name) is not None
        except ModuleNotFoundError:
            return False

    def table_length(self, config) -> int | None:
        """Positions that the unmodified model has rotations for, if its table of them is finite."""
        return self.rotation_table(text_config(config)) if self.rotation_table else None

    def load_module(self) -> ModuleType:
        """The family's model file in the installed Transformers."""
        return importlib.import_module(self.module_name)

    def load_rotary_class(self) -> type[nn.Module] | None:
        """The rotary embedding's class in the installed Transformers; ``None`` if the family has none (GPT-J)."""
        return getattr(self.load_module(), f"{self.prefix}RotaryEmbedding", None)


# What differs between families


def _divided(config, logits: Tensor) -> Tensor:
    return logits / config.logits_scaling


def _multiplied(config, logits: Tensor) -> Tensor:
    return logits * config.logit_scale


def _capped(config, logits: Tensor) -> Tensor:
    cap = config.final_logit_softcapping
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _rotated_where_sliding(config) -> list[bool]:
    return [layer_type == "sliding_attention" for layer_type in config.layer_types]


def _rotated_as_listed(config) -> list[bool]:
    return [bool(rotated) for rotated in config.no_rope_layers]  # despite its name, 1 means rotated


def _no_alibi(config) -> str | None:
    return ALIBI if config.alibi else None


def _causal_only(config) -> str | None:
    return "its attention is bidirectional" if getattr(config, "use_bidirectional_attention", None) else None


def _context_length(config) -> int:
    return config.max_position_embeddings


_GEMMA3 = ModelFamily("gemma3", "Gemma3", logits=_capped, refuses=_causal_only)

FAMILIES: dict[str, ModelFamily] = {
    "cohere": ModelFamily("cohere", "Cohere", interleaved=True, paired_angles=True, logits=_multiplied),
    "cohere2": ModelFamily(
        "cohere2", "Cohere2", interleaved=True, paired_angles=True, logits=_multiplied, rotated=_rotated_where_sliding
    ),
    "falcon": ModelFamily("falcon", "Falcon", refuses=_no_alibi, forces_mask=True),
    "gemma": ModelFamily("gemma", "Gemma", refuses=_causal_only),
    "gemma2": ModelFamily("gemma2", "Gemma2", logits=_capped, refuses=_causal_only),
    "gemma3": _GEMMA3,  # text and images; text streams
    "gemma3_text": _GEMMA3,
    "glm": ModelFamily("glm", "Glm", interleaved=True),
    "glm4": ModelFamily("glm4", "Glm4", interleaved=True),
    "gpt_neox": ModelFamily("gpt_neox", "GPTNeoX"),
    "gptj": ModelFamily("gptj", "GPTJ", interleaved=True, rotation_table=_context_length),
    "granite": ModelFamily("granite", "Granite", logits=_divided),
    "llama": ModelFamily("llama", "Llama"),
    "mistral": ModelFamily("mistral", "Mistral"),
    "mixtral": ModelFamily("mixtral", "Mixtral"),
    "olmo": ModelFamily("olmo", "Olmo"),
    "olmo2": ModelFamily("olmo2", "Olmo2"),
    "olmo3": ModelFamily("olmo3", "Olmo3"),
    "phi": ModelFamily("phi", "Phi"),
    "phi3": ModelFamily("phi3", "Phi3"),
    "qwen2": ModelFamily("qwen2", "Qwen2"),
    "qwen2_moe": ModelFamily("qwen2_moe", "Qwen2Moe", since=5),
    "qwen3": ModelFamily("qwen3", "Qwen3"),
    "qwen3_moe": ModelFamily("qwen3_moe", "Qwen3Moe"),
    "smollm3": ModelFamily("smollm3", "SmolLM3", rotated=_rotated_as_listed),
    "stablelm": ModelFamily("stablelm", "StableLm"),
    "starcoder2": ModelFamily("starcoder2", "Starcoder2"),
}
"""Transformers' ``model_type`` -> family."""

LEARNED = "it has learned absolute positions, which end with its context length"
SINUSOIDAL = "it has sinusoidal absolute positions"
ALIBI = "it has ALiBi position biases instead of rotary positions"
RECURRENT = "it has recurrent layers, whose state holds the whole past"
LATENT = "it caches compressed latents instead of keys"
REFUSED: dict[str, str] = {
    "biogpt": LEARNED,
    "bloom": ALIBI,
    "ctrl": SINUSOIDAL,
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "falcon_h1": RECURRENT,
    "falcon_mamba": RECURRENT,
    "gemma3n": "its layers share their keys and values",
    "gpt2": LEARNED,
    "gpt_bigcode": LEARNED,
    "gpt_neo": LEARNED,
    "gpt_oss": "it has learned sinks of its own in every softmax",
    "jamba": RECURRENT,
    "llama4_text": "its attention is cut into chunks",
    "mamba": RECURRENT,
    "mamba2": RECURRENT,
    "mpt": ALIBI,
    "opt": LEARNED,
    "qwen3_next": RECURRENT,
    "recurrent_gemma": RECURRENT,
    "xglm": SINUSOIDAL,
}
"""Known models that cannot stream -> why."""

LAYER_TYPES = ("full_attention", "sliding_attention")
"""Kinds of attention layers that can stream."""


def text_config(config):
    """The part of a configuration that describes the language model."""
    return config.get_text_config(decoder=True)


def supported_families() -> list[str]:
    """Model types that can stream with the installed Transformers."""
    return sorted(model_type for model_type, family in FAMILIES.items() if family.is_installed)


def family_of(config) -> ModelFamily:
    """The family of a Transformers configuration.

    Raises:
        ValueError: the model has no rotary positions, is not in the table, or is configured as what cannot stream.
    """
    model_type = getattr(config, "model_type", None)
    family = FAMILIES.get(model_type)
    if family is None:
        reason = REFUSED.get(model_type, "it is not in the table of models that are known to work")
    else:
        text = text_config(config)
        reason = f"it needs Transformers {family.since}" if family.since > TRANSFORMERS_MAJOR else None
        reason = reason or (family.refuses(text) if family.refuses else None)
        others = set(getattr(text, "layer_types", None) or ()) - set(LAYER_TYPES)
        reason = reason or (f"it has layers of type {', '.join(sorted(others))}" if others else None)
        if reason is None:
            return family
    raise ValueError(
        f"model type {model_type!r} cannot stream: {reason}. Supported model types: {', '.join(supported_families())}"
    )
