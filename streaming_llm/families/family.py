"""What is known of a model's family: the layers with keys and their rotations, and where a model keeps them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..rope_utils import AngleLayout, Rotary
from .table import text_config

LENGTH_DEPENDENT = ("dynamic", "longrope", "su")
"""Kinds of rotary scaling whose frequencies change once a model's original length is passed."""

LayerType = str | None
"""A kind of layer with a rotation of its own; ``None`` stands for all that have none."""


UNROTATED = Rotary(torch.empty(0, dtype=torch.float64))
"""The rotation of a layer without positions."""


class MeasuredOtherwiseError(ValueError):
    """A model does something with positions that a stream cannot go on with."""


Place = tuple[str, LayerType]
"""Where below a decoder a rotary module is, and the kind of layer that it is asked for."""


@dataclass(frozen=True)
class LayerRotation:
    """How a layer rotates keys and queries.

    Args:
        place: of the rotary module.
        interleaved, offset: as of :class:`Rotary`.
        sign: -1 where it turns the other way (nanochat).
    """

    place: Place
    interleaved: bool
    offset: int
    sign: int = 1

    def of(self, held: dict[Place, Rotary]) -> Rotary:
        """The rotation itself, with the frequencies that the rotary modules hold."""
        rotary = held[self.place]
        return replace(rotary, inv_freq=self.sign * rotary.inv_freq, interleaved=self.interleaved, offset=self.offset)


@dataclass(frozen=True)
class Family:
    """What was found of a decoder's class and configuration.

    Args:
        stores: number of each layer that stores keys, in the order in which they do.
        rotations: of each of them; ``None``: none.
        held: the rotations that the rotary modules of a freshly built model hold.
        sources: layers that attend to keys that another one stores -> that one.
        layouts: of what each rotary module returns, by its place below the decoder.
        has_state: whether layers keep a state of their own, which is no keys and values.
        latents: whether the cache is given latents and rotated parts, of which keys and values are made when they are
            attended to (DeepSeek in newer Transformers). ``rotations`` are then those of the keys; the parts are
            rotated from their first dimension on.
        blocks_continue: whether their state takes a block of several tokens after others.
    """

    stores: tuple[int, ...]
    rotations: tuple[LayerRotation | None, ...]
    held: dict[Place, Rotary] = field(default_factory=dict)
    sources: dict[int, int] = field(default_factory=dict)
    layouts: dict[str, AngleLayout] = field(default_factory=dict)
    has_state: bool = False
    latents: bool = False
    blocks_continue: bool = True


def rotary_modules_of(decoder: nn.Module) -> dict[str, nn.Module]:
    """The rotary modules of a decoder by their place below it; of an attached one, those that are stood in for."""
    found: dict[str, nn.Module] = {}
    for path, module in decoder.named_modules():
        module = getattr(module, "replaced", module)
        if "Rotary" in type(module).__name__ and not any(path.startswith(f"{other}.") for other in found):
            found[path] = module
    return found


def frequencies(module: Any) -> dict[LayerType, Rotary]:
    """The rotations that a rotary module holds, by the layers that use them.

    Raises:
        MeasuredOtherwiseError: it holds no frequencies.
    """
    rope_type = getattr(module, "rope_type", "default")
    kinds = rope_type if isinstance(rope_type, dict) else [None]
    rotations = {}
    for kind in kinds:
        prefix = "" if kind is None else f"{kind}_"
        inv_freq = getattr(module, f"{prefix}inv_freq", None)
        if (rope_type[kind] if kind else rope_type) in LENGTH_DEPENDENT:  # whatever length the model has seen last
            inv_freq = getattr(module, f"{prefix}original_inv_freq")
        if inv_freq is None:
            raise MeasuredOtherwiseError(f"its {type(module).__name__} has no frequencies (inv_freq)")
        scaling = getattr(module, f"{prefix}attention_scaling", None)
        rotations[kind] = Rotary(inv_freq.detach().to("cpu", torch.float64), False, float(scaling or 1.0))
    return rotations


def held_rotations(modules: dict[str, nn.Module], table: Rotary | None) -> dict[Place, Rotary]:
    """The rotations of a model by their place: those of its rotary modules, and of a table (GPT-J)."""
    held = {(path, kind): rotary for path, x in modules.items() for kind, rotary in frequencies(x).items()}
    return held if table is None else held | {("", None): table}


def constant_up_to(config: Any) -> int | None:
    """The length up to which a model's frequencies are constant, where they depend on it at all."""
    text, names = text_config(config), ("original_max_position_embeddings", "max_position_embeddings")
    lengths = [
        length
        for given in rope_parameters(text)
        if given.get("rope_type", given.get("type")) in LENGTH_DEPENDENT
        for length in (given.get(names[0]), *(getattr(text, name, None) for name in names))
    ]
    return min(filter(None, lengths), default=None)


def queries_scaled_from(config: Any) -> int | None:
    """The position from which on a model scales its queries by their position (Llama 4, Ministral 3)."""
    config = text_config(config)
    if getattr(config, "attn_temperature_tuning", False):
        return config.floor_scale
    scaled = [x for x in rope_parameters(config) if x.get("llama_4_scaling_beta")]
    return scaled[0]["original_max_position_embeddings"] if scaled else None


def rope_parameters(config: Any) -> list[dict[str, Any]]:
    """The rotary parameters in a configuration, one for each kind of layer that has its own."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [value for value in given.values() if isinstance(value, dict)]
    return nested or [given]
