"""Which models can stream, where each family keeps its rotation, and what else of it the library has to know."""

from .parts import decoder_of, last_logits, lm_head, transformers_model
from .rotations import (
    RotaryModule,
    module_angles,
    rotaries_from_config,
    rotaries_from_model,
    rotary_from_config,
    rotary_from_model,
    rotary_modules,
)
from .table import FAMILIES, ModelFamily, family_of, supported_families, text_config
from .windows import bare_refusal, layer_layouts, layer_windows

__all__ = [
    "FAMILIES",
    "ModelFamily",
    "RotaryModule",
    "bare_refusal",
    "decoder_of",
    "family_of",
    "last_logits",
    "layer_layouts",
    "layer_windows",
    "lm_head",
    "module_angles",
    "rotaries_from_config",
    "rotaries_from_model",
    "rotary_from_config",
    "rotary_from_model",
    "rotary_modules",
    "supported_families",
    "text_config",
    "transformers_model",
]
