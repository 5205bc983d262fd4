"""The rotation of each layer that stores keys, and the rotary modules of a model.

Under every version of Transformers the frequencies are read off the model's own modules, so that they are rounded as
the model's are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..rope_utils import AngleLayout, Rotary
from .family import UNROTATED, Family, LayerType, Place, frequencies, held_rotations, rotary_modules_of
from .parts import decoder_of
from .recognition import family_of
from .table import table_rotation, text_config


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


@dataclass(frozen=True)
class RotaryModule:
    """A rotary module of a model that its layers use.

    Args:
        parent, name: where it is: attribute ``name`` of ``parent``.
        angles: what it computes angles with, for each kind of layer that it is asked for.
        layout: of what it returns.
    """

    parent: nn.Module
    name: str
    module: Any
    angles: dict[LayerType, Rotary]
    layout: AngleLayout


def rotary_modules(model: nn.Module) -> list[RotaryModule]:
    """Every rotary module that a model uses; none for a family that reads a table.

    Raises:
        ValueError: the model cannot stream.
    """
    decoder, layouts = decoder_of(model), family_of_model(model).layouts
    by_module = {id(decoder.get_submodule(path)): layout for path, layout in layouts.items()}
    return [
        RotaryModule(parent, name, child, frequencies(child), by_module[id(child)])
        for parent in decoder.modules()
        for name, child in parent._modules.items()
        if id(child) in by_module
    ]


def rotary_from_model(model: nn.Module) -> Rotary:
    """The one rotation of all layers, see :func:`rotaries_from_model`.

    Raises:
        ValueError: the model cannot stream, or its layers rotate differently.
    """
    first, *others = rotaries_from_model(model)
    if any(rotary is not first for rotary in others):
        raise ValueError("the layers of this model rotate differently: ask for the rotation of each")
    return first
