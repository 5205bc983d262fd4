"""Whether a model can stream: its family is recognised by measurement, once for each class and configuration."""

from __future__ import annotations

import functools
import json
from typing import Any

from torch import nn

from .family import Family, MeasuredOtherwiseError
from .measuring import measure
from .small import decoder_class
from .table import REFUSED, table_rotation, text_config

UNMEASURED = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
"""Parts of a configuration that say nothing about positions."""


def family_of(config: Any, model_class: type[nn.Module] | None = None) -> Family:
    """What is measured of a model's family.

    Args:
        config: a Transformers configuration.
        model_class: of the decoder; Transformers' own for this configuration when ``None``.

    Raises:
        ValueError: it cannot stream; says why.
    """
    text = text_config(config)
    model_class = decoder_class(text) if model_class is None else model_class
    facts = {name: value for name, value in text.to_dict().items() if name not in UNMEASURED}
    found = _measured(_Question(text, model_class, json.dumps(facts, sort_keys=True, default=str)))
    if isinstance(found, Family):
        return found
    raise ValueError(
        f"model type {config.model_type!r} cannot stream: {found}. Those that are known to: python -m streaming_llm"
    )


class _Question:
    """A configuration and a class, told apart by what they say."""

    def __init__(self, config: Any, model_class: type[nn.Module] | None, facts: str) -> None:
        self.config, self.model_class = config, model_class
        self.key = type(config), model_class, facts

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Question) and self.key == other.key


@functools.lru_cache(maxsize=64)
def _measured(asked: _Question) -> Family | str:
    """What was measured, or why a model cannot stream."""
    config, model_class = asked.config, asked.model_class
    if config.model_type in REFUSED:
        return REFUSED[config.model_type]
    if model_class is None:
        return "it is no decoder that Transformers knows"
    if getattr(config, "alibi", False):
        return "it has ALiBi position biases instead of rotary positions"
    if getattr(config, "use_bidirectional_attention", None) not in (None, False, "vision"):
        return "its attention is bidirectional"
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        return (
            "it has layers of type chunked_attention: a token sees those of its own chunk alone, which begins at a "
            "multiple of the chunk's length and is empty there, and no window of recent tokens is that"
        )
    try:
        return measure(model_class, config, table_rotation(config))
    except MeasuredOtherwiseError as error:
        return str(error)
