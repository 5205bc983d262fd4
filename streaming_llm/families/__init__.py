"""Which models can stream, where each family keeps its rotation, and what else of it the library has to know."""

from .rotations import (
    RotaryModule,
    module_angles,
    rotaries_from_config,
    rotaries_from_model,
    rotary_from_config,
    rotary_from_model,
    rotary_modules,
)
from .table import (
    FAMILIES,
    ModelFamily,
    bare_refusal,
    decoder_of,
    family_of,
    layer_windows,
    lm_head,
    require_window_fits,
    supported_families,
    text_config,
)

__all__ = [
    "FAMILIES",
    "ModelFamily",
    "RotaryModule",
    "bare_refusal",
    "decoder_of",
    "family_of",
    "layer_windows",
    "lm_head",
    "module_angles",
    "require_window_fits",
    "rotaries_from_config",
    "rotaries_from_model",
    "rotary_from_config",
    "rotary_from_model",
    "rotary_modules",
    "supported_families",
    "text_config",
]
