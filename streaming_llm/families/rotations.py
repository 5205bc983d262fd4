"""Where a model keeps its rotation, and the rotation of each of its layers.

Most families have one rotary module for all layers. Gemma 3 and OLMo 3 rotate sliding layers otherwise than full
ones (one module with both, in older Transformers a module each); Cohere 2 and SmolLM3 leave some layers without
positions; GPT-J reads a finite table. Under every version of Transformers the frequencies are read off the family's
own module, so that they are rounded as the model's are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..rope_utils import Rotary
from .table import ModelFamily, family_of, text_config

SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
LENGTH_DEPENDENT = "its frequencies depend on the length seen, so that keys stored earlier would have to change"
REFUSED_ROPE_TYPES = {"dynamic": LENGTH_DEPENDENT, "longrope": LENGTH_DEPENDENT, "su": LENGTH_DEPENDENT}

LayerType = str | None
"""A kind of layer with a rotation of its own; ``None`` stands for all that have none."""

UNROTATED = Rotary(torch.empty(0, dtype=torch.float64))
"""The rotation of a layer without positions."""

LOCAL_MODULE = "rotary_emb_local"
"""Gemma 3's second rotary module in older Transformers, for its sliding layers."""


@dataclass(frozen=True)
class RotaryModule:
    """One rotary module of a model and where it is: attribute ``name`` of ``parent``."""

    parent: nn.Module
    name: str
    module: nn.Module
    layer_type: LayerType


def _read(module: nn.Module, family: ModelFamily, layer_type: LayerType = None) -> dict[LayerType, Rotary]:
    """The rotations that a rotary module holds, by the layers that use them."""
    rope_type = getattr(module, "rope_type", "default")
    by_type = rope_type if isinstance(rope_type, dict) else {layer_type: rope_type}
    rotations = {}
    for kind, scaling_type in by_type.items():
        if scaling_type not in SUPPORTED_ROPE_TYPES:
            reason = REFUSED_ROPE_TYPES.get(scaling_type, "it is not known to work")
            raise ValueError(
                f"rotary scaling {scaling_type!r} cannot stream: {reason}. "
                f"Supported: {', '.join(SUPPORTED_ROPE_TYPES)}"
            )
        prefix = f"{kind}_" if isinstance(rope_type, dict) else ""
        inv_freq = getattr(module, f"{prefix}inv_freq").detach().to(torch.float64)
        scaling = float(getattr(module, f"{prefix}attention_scaling", 1.0))
        rotations[kind] = Rotary(inv_freq, family.interleaved, scaling)
    return rotations


def _of_table(config) -> Rotary:
    """GPT-J: the frequencies that its table of sines and cosines is made from."""
    dim = config.rotary_dim or config.n_embd
    inv_freq = 1.0 / (10000 ** (torch.arange(0, dim, 2, dtype=torch.int64) / dim))
    return Rotary(inv_freq.to(torch.float64), interleaved=True)


def _per_layer(config, family: ModelFamily, rotations: dict[LayerType, Rotary]) -> tuple[Rotary, ...]:
    text = text_config(config)
    n_layers = text.num_hidden_layers
    types = getattr(text, "layer_types", None) or [None] * n_layers
    rotated = family.rotated(text) if family.rotated else [True] * n_layers
    default = rotations.get(None)
    return tuple(
        rotations.get(layer_type, default) if turned else UNROTATED
        for layer_type, turned in zip(types, rotated, strict=True)
    )


# From a configuration


def _local_gemma3(config):
    """The configuration of Gemma 3's sliding layers as older Transformers makes it."""
    local = copy.deepcopy(config)
    local.rope_theta, local.rope_scaling = config.rope_local_base_freq, {"rope_type": "default"}
    return local


def _two_modules_gemma3(rotary_class: type[nn.Module], config) -> dict[LayerType, nn.Module]:
    return {None: rotary_class(config), "sliding_attention": rotary_class(_local_gemma3(config))}


def _two_modules_olmo3(rotary_class: type[nn.Module], config) -> dict[LayerType, nn.Module]:
    return {None: rotary_class(config), "sliding_attention": rotary_class(config, rope_type="default")}


TWO_MODULES: dict[str, Callable[[type[nn.Module], object], dict[LayerType, nn.Module]]] = {
    "gemma3": _two_modules_gemma3,
    "olmo3": _two_modules_olmo3,
}
"""Families that before Transformers 5.0 had a rotary module for each kind of layer -> how they were built."""


def _built(family: ModelFamily, config) -> dict[LayerType, nn.Module]:
    """The rotary modules of a freshly built model."""
    rotary_class = family.load_rotary_class()
    if family.folder in TWO_MODULES and not hasattr(config, "rope_parameters"):
        return TWO_MODULES[family.folder](rotary_class, config)
    return {None: rotary_class(config)}


def rotaries_from_config(config) -> tuple[Rotary, ...]:
    """The rotation of each layer of a freshly built model of this configuration, on the CPU.

    Raises:
        ValueError: the model cannot stream.
    """
    family, text = family_of(config), text_config(config)
    if family.load_rotary_class() is None:
        return _per_layer(config, family, {None: _of_table(text)})
    rotations = {}
    for layer_type, module in _built(family, text).items():
        rotations |= _read(module, family, layer_type)
    return _per_layer(config, family, rotations)


# From a model


def rotary_modules(model: nn.Module) -> list[RotaryModule]:
    """Every rotary module of a model; none for a family that reads a table.

    Raises:
        ValueError: the model cannot stream.
    """
    rotary_class = family_of(model.config).load_rotary_class()
    if rotary_class is None:
        return []
    found = [
        RotaryModule(parent, name, child, _layer_type_in(f"{path}.{name}"))
        for path, parent in model.named_modules()
        for name, child in parent.named_children()
        if isinstance(child, rotary_class)
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no {rotary_class.__name__}: it cannot stream")
    return found


def _layer_type_in(path: str) -> LayerType:
    parts = path.split(".")
    return "sliding_attention" if LOCAL_MODULE in parts or "sliding_attention" in parts else None


def rotaries_from_model(model: nn.Module) -> tuple[Rotary, ...]:
    """The rotation of each layer of a loaded model, with the frequencies it holds (rounded too, if cast to half).

    On the CPU; layers that rotate alike share one object.
    """
    family = family_of(model.config)
    rotations = {}
    for found in rotary_modules(model):
        rotations |= _read(found.module, family, found.layer_type)
    rotations = {kind: rotary.to(torch.device("cpu")) for kind, rotary in rotations.items()}
    return _per_layer(model.config, family, rotations or {None: _of_table(text_config(model.config))})


def module_angles(found: RotaryModule, family: ModelFamily) -> dict[LayerType, Rotary]:
    """What a stand-in for a rotary module computes angles with, in the layout that the module gives them."""
    rotations = _read(found.module, family)
    return {kind: replace(rotary, interleaved=family.paired_angles) for kind, rotary in rotations.items()}


def _the_one(rotaries: tuple[Rotary, ...]) -> Rotary:
    if any(rotary is not rotaries[0] for rotary in rotaries):
        raise ValueError("the layers of this model rotate differently: ask for the rotation of each")
    return rotaries[0]


def rotary_from_config(config) -> Rotary:
    """The one rotation of all layers, see :func:`rotaries_from_config`.

    Raises:
        ValueError: the model cannot stream, or its layers rotate differently.
    """
    return _the_one(rotaries_from_config(config))


def rotary_from_model(model: nn.Module) -> Rotary:
    """The one rotation of all layers, see :func:`rotaries_from_model`.

    Raises:
        ValueError: the model cannot stream, or its layers rotate differently.
    """
    return _the_one(rotaries_from_model(model))
