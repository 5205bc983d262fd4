"""Which models can stream, where each family keeps its rotation, and what else of it the library has to know."""

from .family import UNROTATED, Family, constant_up_to, queries_scaled_from
from .native_cache import native_cache, uses_attention_functions
from .parts import decoder_of, last_logits, lm_head, transformers_model
from .recognition import exact_rotations, family_of, family_of_model, rotaries_from_config, rotaries_from_model
from .table import module_name, supported_families, text_config, value_of
from .windows import bare_length, bare_refusal, layer_layouts, layer_windows

__all__ = [
    "UNROTATED",
    "Family",
    "bare_length",
    "bare_refusal",
    "constant_up_to",
    "decoder_of",
    "exact_rotations",
    "family_of",
    "family_of_model",
    "last_logits",
    "layer_layouts",
    "layer_windows",
    "lm_head",
    "module_name",
    "native_cache",
    "queries_scaled_from",
    "rotaries_from_config",
    "rotaries_from_model",
    "supported_families",
    "text_config",
    "transformers_model",
    "uses_attention_functions",
    "value_of",
]
