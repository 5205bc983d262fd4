"""Which models can stream, where each family keeps its rotation, and what else of it the library has to know."""

from .family import UNROTATED, Family
from .native_cache import native_cache, uses_attention_functions
from .parts import decoder_of, last_logits, lm_head, transformers_model
from .recognition import family_of
from .rotations import (
    RotaryModule,
    family_of_model,
    rotaries_from_config,
    rotaries_from_model,
    rotary_from_model,
    rotary_modules,
)
from .table import module_name, supported_families, text_config, value_of
from .windows import bare_length, bare_refusal, changes_with_length, layer_layouts, layer_windows, scaled_from

__all__ = [
    "UNROTATED",
    "Family",
    "RotaryModule",
    "bare_length",
    "bare_refusal",
    "changes_with_length",
    "decoder_of",
    "family_of",
    "family_of_model",
    "last_logits",
    "layer_layouts",
    "layer_windows",
    "lm_head",
    "module_name",
    "native_cache",
    "rotaries_from_config",
    "rotaries_from_model",
    "rotary_from_model",
    "rotary_modules",
    "scaled_from",
    "supported_families",
    "text_config",
    "transformers_model",
    "uses_attention_functions",
    "value_of",
]
