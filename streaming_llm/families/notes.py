"""What one forward of a small model showed, and whether a rotation agrees with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ..rope_utils import AngleLayout, Rotary, rotate
from .family import UNROTATED, LayerRotation, LayerType, MeasuredOtherwiseError, Place

TOLERANCE = 5e-5
"""Of a pair of dimensions, relative to its length; the float32 rounding of a larger angle comes on top."""

KNOWN_ARGUMENTS = ("s_aux", "position_ids", "cache_position")
"""Tensors that attention may be given beside queries, keys and values."""


class Notes:
    """What one forward of the small model showed.

    Attributes:
        keys, queries: number of layer -> ``[positions, heads, head_dim]``, float64.
        parts: likewise, what the cache was given where keys are made of it: latents, and rotated parts.
        sources: see :class:`Family`.
        returned: place of a rotary module, kind of layer -> positions that it was given, and what it returned.
    """

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}
        self.queries: dict[int, Tensor] = {}
        self.sources: dict[int, int] = {}
        self.returned: dict[tuple[str, LayerType], tuple[Tensor, Any]] = {}
        self.parts: dict[int, tuple[Tensor, Tensor]] = {}
        self._given: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}

    def store(self, key: Tensor, value: Tensor, layer_idx: int, *unused: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """In place of a cache's ``update``."""
        self.keys[layer_idx], self._given[layer_idx] = key[:, :, 0].double(), key
        self._values[layer_idx] = value[:, :, 0].double()
        return key, value

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **given: Any
    ) -> tuple[Any, ...]:
        """In place of a model's attention: with one token in each row, the result is its value."""
        layer_idx = module.layer_idx
        if attention_mask is not None:
            raise MeasuredOtherwiseError("its attention layers make masks of their own, and a stream has none")
        self.queries[layer_idx] = query[:, :, 0].double()
        source = next((i for i, stored in self._given.items() if stored is key), None)
        if source is None and layer_idx in self._given and layer_idx not in self.parts:
            self.parts[layer_idx] = self.keys[layer_idx], self._values[layer_idx]
            self.keys[layer_idx], source = key[:, :, 0].double(), layer_idx
        if source is None:
            raise MeasuredOtherwiseError(f"layer {layer_idx} attends to other keys than its cache holds")
        if source != layer_idx:
            self.sources[layer_idx] = source
        unknown = [name for name, x in given.items() if isinstance(x, Tensor) and name not in KNOWN_ARGUMENTS]
        if unknown:
            raise MeasuredOtherwiseError(f"its attention is given {', '.join(unknown)}, which a stream does not know")
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2).contiguous(), None

    def noting(self, path: str) -> Any:
        """A hook for the rotary module at ``path``."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = dict(zip(("x", "position_ids", "layer_type"), args, strict=False)) | kwargs
            key = path, given.get("layer_type")
            self.returned.setdefault(key, (given["position_ids"], output))

        return hook


def _error(x: Tensor, rotary: Rotary, positions: Tensor) -> float:
    """How far ``x`` ``[positions, heads, head_dim]`` is from its first row rotated; 1 is what rounding explains."""
    cos, sin = (part[:, None] for part in rotary.cos_sin(positions))
    expected = rotate(x[:1].expand_as(x), cos, sin, rotary)
    size = x.pow(2).mean((1, 2), keepdim=True).sqrt().clamp(min=1e-6)
    largest = positions.double() * (rotary.inv_freq.max() if rotary.rotary_dim else 0)
    allowed = TOLERANCE + 3e-7 * largest
    return (((x - expected) / size).abs().amax((1, 2)) / allowed).max().item()


def _candidates(held: dict[Place, Rotary], layer_type: LayerType, head_dim: int) -> Iterator[LayerRotation]:
    """Every rotation that could be a layer's, the one of its own kind first, and the usual way to turn."""
    places = sorted(held, key=lambda place: place[1] != layer_type)
    for sign, place in product((1, -1), places):
        rotary_dim = held[place].rotary_dim
        if rotary_dim <= head_dim:
            for offset, interleaved in product(dict.fromkeys((0, head_dim - rotary_dim)), (False, True)):
                yield LayerRotation(place, interleaved, offset, sign)


def rotation_of(
    index: int, notes: Notes, held: dict[Place, Rotary], layer_type: LayerType, positions: Tensor
) -> LayerRotation | None:
    keys, queries = notes.keys[index], notes.queries.get(index)
    if _error(keys, UNROTATED, positions) <= 1:
        require_turned(index, queries, None, held, positions)
        return None
    errors: dict[float, LayerRotation] = {}
    for found in _candidates(held, layer_type, keys.shape[-1]):
        error = _error(keys, found.of(held), positions)
        if error <= 1:
            require_turned(index, queries, found, held, positions)
            return found
        errors[error] = found
    if not errors:
        raise MeasuredOtherwiseError(f"layer {index} stores keys that depend on positions, and has no rotary module")
    nearest = errors[min(errors)]
    how = "neighbouring dimensions" if nearest.interleaved else "halves"
    raise MeasuredOtherwiseError(
        f"layer {index} rotates its keys otherwise than the frequencies of its rotary module say: measured at "
        f"positions {', '.join(map(str, positions.tolist()))}, the nearest rotation ({how} from dimension "
        f"{nearest.offset} on) is off by {min(errors) * TOLERANCE:.1e} of a key's size"
    )


def require_turned(
    index: int, queries: Tensor | None, found: LayerRotation | None, held: dict[Place, Rotary], positions: Tensor
) -> None:
    """Raise :class:`MeasuredOtherwiseError` where a layer's queries are not rotated as its keys are."""
    if queries is None:  # its attention function is not Transformers' own: the layer will be rewritten or refused
        return
    error = _error(queries, UNROTATED if found is None else found.of(held), positions)
    if error > 1:
        raise MeasuredOtherwiseError(
            f"layer {index} rotates its queries otherwise than its keys: they are off by {error * TOLERANCE:.1e} of a "
            "query's size"
        )


def require_latents(
    index: int, notes: Notes, found: LayerRotation | None, held: dict[Place, Rotary], positions: Tensor
) -> None:
    """Raise :class:`MeasuredOtherwiseError` unless the cache holds latents, and parts that turn as the keys do."""
    latents, parts = notes.parts.get(index, (notes.keys[index],) * 2)
    rotary = UNROTATED if found is None else replace(found.of(held), offset=0)
    if found is None or _error(latents, UNROTATED, positions) > 1 or _error(parts, rotary, positions) > 1:
        raise MeasuredOtherwiseError(
            f"layer {index} attends to other keys than its cache holds, and that is no latents and rotated parts"
        )


def layout_of(path: str, notes: Notes, held: dict[Place, Rotary]) -> AngleLayout:
    """How a rotary module lays out what it returns."""
    for (at, layer_type), (positions, output) in notes.returned.items():
        if at != path:
            continue
        rotary = held.get((path, layer_type)) or held[path, None]
        parts = torch.view_as_real(output).unbind(-1) if isinstance(output, Tensor) else output
        one_axis = positions.dim() == 3 and parts[0].dim() == 3
        positions = positions[0] if one_axis else positions
        angles = positions.double().unsqueeze(-1) * rotary.inv_freq
        for kind in ("complex",) if isinstance(output, Tensor) else ("halves", "pairs", "once"):
            expected: Any = AngleLayout(kind).of(angles, rotary.scaling)
            expected = torch.view_as_real(expected).unbind(-1) if kind == "complex" else expected
            if expected[0].shape == parts[0].shape:
                error = max((a - b).abs().max().item() for a, b in zip(expected, parts, strict=True))
                if error < 1e-3:
                    return AngleLayout(kind, one_axis)
    raise MeasuredOtherwiseError(
        "its rotary module returns other angles than its frequencies times the position, or lays them out in a way "
        "that is not known"
    )
