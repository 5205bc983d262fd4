"""Whether a model can stream: its family is recognised by measurement, once for each class and configuration.

And how each of its layers with keys rotates. Under every version of Transformers the frequencies are read off the
model's own modules, so that they are rounded as the model's are.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..rope_utils import ExactRotaryEmbedding, Rotary
from .family import (
    UNROTATED,
    Family,
    MeasuredOtherwiseError,
    Place,
    frequencies,
    held_rotations,
    rotary_modules_of,
)
from .measuring import measure
from .parts import decoder_of
from .small import decoder_class
from .table import ALIBI, REFUSED, table_rotation, text_config

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
    found = _measured(_Question(text, type(text), model_class, json.dumps(facts, sort_keys=True, default=str)))
    if isinstance(found, Family):
        return found
    raise ValueError(
        f"model type {config.model_type!r} cannot stream: {found}. Those that are known to: python -m streaming_llm"
    )


@dataclass(frozen=True)
class _Question:
    """A configuration and a class, told apart by what they say."""

    config: Any = field(compare=False)
    config_class: type
    model_class: type[nn.Module] | None
    facts: str


@functools.lru_cache(maxsize=64)
def _measured(asked: _Question) -> Family | str:
    """What was measured, or why a model cannot stream."""
    config, model_class = asked.config, asked.model_class
    if config.model_type in REFUSED:
        return REFUSED[config.model_type]
    if model_class is None:
        return "it is no decoder that Transformers knows"
    if getattr(config, "alibi", False):
        return ALIBI
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


def family_of_model(model: nn.Module) -> Family:
    """What is measured of a Transformers model's family, by the class that its decoder has.

    Raises:
        ValueError: it cannot stream; says why.
    """
    return family_of(model.config, type(decoder_of(model)))


def _per_layer(family: Family, held: dict[Place, Rotary]) -> tuple[Rotary, ...]:
    made = {x: x.of(held) for x in family.rotations if x is not None}
    return tuple(UNROTATED if x is None else made[x] for x in family.rotations)


def rotaries_from_config(config: Any) -> tuple[Rotary, ...]:
    """The rotation of each layer with keys of a freshly built model of this configuration, on the CPU.

    Raises:
        ValueError: the model cannot stream.
    """
    family = family_of(config)
    return _per_layer(family, family.held)


def rotaries_from_model(model: nn.Module) -> tuple[Rotary, ...]:
    """The rotation of each layer with keys of a loaded model, with the frequencies it holds (rounded too, if cast).

    On the CPU; layers that rotate alike share one object.

    Raises:
        ValueError: the model cannot stream.
    """
    modules = rotary_modules_of(decoder_of(model))
    return _per_layer(family_of_model(model), held_rotations(modules, table_rotation(text_config(model.config))))


def exact_rotations(
    model: nn.Module, stands_in: Callable[[], bool] | None, positions: Callable[[], Tensor | None]
) -> list[tuple[nn.Module, str, ExactRotaryEmbedding]]:
    """What computes the angles of a model's rotary modules exactly, and of which parent each is which attribute.

    None for a family that reads a table. The two functions are those of :class:`ExactRotaryEmbedding`.

    Raises:
        ValueError: the model cannot stream.
    """
    decoder, exact = decoder_of(model), {}
    for path, layout in family_of_model(model).layouts.items():
        module = decoder.get_submodule(path)
        exact[id(module)] = ExactRotaryEmbedding(module, frequencies(module), layout, stands_in, positions)
    return [
        (parent, name, exact[id(child)])
        for parent in decoder.modules()
        for name, child in parent._modules.items()
        if id(child) in exact
    ]
