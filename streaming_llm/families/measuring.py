"""What a family does with positions, found by measurement on a small random model of it.

One token is fed in several rows, each at another position and with nothing before it. So every layer sees the same
hidden states in all rows, and keys and queries differ by their rotation alone: what the rotary module's frequencies
would give is compared with what reaches the cache and the attention function. A rotation that agrees is the layer's;
keys that are the same at all positions have none; anything else is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ..rope_utils import AngleLayout, Rotary, rotate
from .family import (
    UNROTATED,
    Family,
    LayerRotation,
    LayerType,
    MeasuredOtherwiseError,
    Place,
    constant_up_to,
    frequencies,
    queries_scaled_from,
    rotary_modules_of,
)
from .native_cache import native_cache, uses_attention_functions
from .small import small_model
from .table import LAYER_TYPES, REWRITTEN_TYPES

POSITIONS = (0, 1, 2, 5, 60, 1001)
"""Where the token is put; those beyond the length up to which a rotation is constant are left out."""

TOLERANCE = 5e-5
"""Of a pair of dimensions, relative to its length; the float32 rounding of a larger angle comes on top."""

MEASURING = "streaming_llm_measuring"
"""Name of the attention implementation that notes what it is given."""


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


_notes: list[Notes] = []


def _attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    return _notes[-1].attend(module, *args, **kwargs)


AttentionInterface.register(MEASURING, _attention)


def measure(model_class: type[nn.Module], config: Any, table: Rotary | None = None) -> Family:
    """Measure a decoder's class, as it is with a configuration of it.

    Args:
        table: the rotation of a model that reads it from a table (GPT-J) and has no rotary module.

    Raises:
        MeasuredOtherwiseError: it does what a stream cannot go on with; says what was measured.
    """
    try:
        model = small_model(model_class, config)
    except Exception as error:
        raise MeasuredOtherwiseError(
            f"a small {model_class.__name__} of this configuration cannot be made to measure it: {error}"
        ) from error
    modules = rotary_modules_of(model)
    if not modules and table is None and "position_ids" not in inspect.signature(model_class.forward).parameters:
        raise MeasuredOtherwiseError("it has no rotary module and takes no position_ids")
    held = {(path, kind): rotary for path, x in modules.items() for kind, rotary in frequencies(x).items()}
    if table is not None:
        held["", None] = table
    limits = constant_up_to(config), queries_scaled_from(config), getattr(config, "max_position_embeddings", None)
    limit = min((n for n in limits if n), default=max(POSITIONS) + 1)
    positions = torch.tensor([p for p in POSITIONS if p < limit])
    notes = _run(model, modules, positions)
    stores = tuple(sorted(notes.keys))
    if set(notes.sources) & set(stores):
        raise MeasuredOtherwiseError("it runs its layers several times for each token")
    if not notes.queries and config.model_type not in REWRITTEN_TYPES:
        raise MeasuredOtherwiseError("its attention layers do not go through Transformers' attention functions")
    types = getattr(config, "layer_types", None) or ()
    if not stores:
        raise MeasuredOtherwiseError("none of its layers stores keys in a cache")
    kinds = {index: types[index] for index in (*stores, *notes.sources) if index < len(types)}
    others = set(kinds.values()) - set(LAYER_TYPES)
    if others:
        raise MeasuredOtherwiseError(f"it has attention layers of type {', '.join(sorted(others))}")
    rotations = tuple(_rotation_of(index, notes, held, kinds.get(index), positions) for index in stores)
    for layer, source in notes.sources.items():
        _require_turned(layer, notes.queries[layer], rotations[stores.index(source)], held, positions)
    for layer, rotation in zip(stores, rotations, strict=True):
        if notes.parts:
            _require_latents(layer, notes, rotation, held, positions)
    has_state = len(stores) + len(notes.sources) < config.num_hidden_layers or _keeps_state(model)
    called = {at for at, _ in notes.returned}
    return Family(
        stores,
        rotations,
        held,
        notes.sources,
        {path: _layout_of(path, notes, held) for path in modules if path in called},
        has_state,
        bool(notes.parts),
        not has_state or _blocks_continue(model),
    )


def _keeps_state(model: nn.Module) -> bool:
    """Whether there are recurrent layers beside attention, or within the same layer (Falcon-H1)."""
    return any(hasattr(module, "layer_idx") and hasattr(module, "conv1d") for module in model.modules())


@torch.no_grad()
def _run(model: Any, modules: dict[str, nn.Module], positions: Tensor) -> Notes:
    notes, ids = Notes(), torch.ones(len(positions), 1, dtype=torch.int64)
    hooks = [x.register_forward_hook(notes.noting(path), with_kwargs=True) for path, x in modules.items()]
    for module in model.modules():
        if hasattr(module, "_update_causal_mask"):  # older files make their masks themselves, but not in a stream
            module._update_causal_mask = lambda *args, **kwargs: None
    if uses_attention_functions(model):
        for module in model.modules():
            if "config" in vars(module):
                module.config._attn_implementation_internal = MEASURING
    _notes.append(notes)
    try:
        cache = native_cache(model, len(positions), "cpu", torch.float32)
        cache.update = notes.store
        model(input_ids=ids, position_ids=positions.unsqueeze(1), past_key_values=cache, use_cache=True)
    except MeasuredOtherwiseError:
        raise
    except Exception as error:
        raise MeasuredOtherwiseError(f"a small model of it cannot be run to measure it: {error!r}") from error
    finally:
        _notes.remove(notes)
        for hook in hooks:
            hook.remove()
    return notes


@torch.no_grad()
def _blocks_continue(model: Any) -> bool:
    """Whether a second block of tokens goes on from the state that the first one left."""
    for module in model.modules():
        if "config" in vars(module):
            module.config._attn_implementation_internal = "eager"
    ids, positions = torch.tensor([[1, 3, 2, 4, 1, 2]]), torch.arange(6).unsqueeze(0)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)  # so that what is left out shows
    whole, cache = (
        model(input_ids=ids, use_cache=False).last_hidden_state,
        native_cache(model, 1, "cpu", torch.float32),
    )
    cut = []
    try:
        for block, at in zip(ids.split(3, dim=1), positions.split(3, dim=1), strict=True):
            given = {"input_ids": block, "position_ids": at, "cache_position": at[0]}
            cut.append(model(**given, past_key_values=cache, use_cache=True).last_hidden_state)
    except Exception:  # some expect a single token
        return False
    return bool((torch.cat(cut, dim=1) - whole).abs().max() < 1e-3 * whole.abs().max())


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


def _rotation_of(
    index: int, notes: Notes, held: dict[Place, Rotary], layer_type: LayerType, positions: Tensor
) -> LayerRotation | None:
    keys, queries = notes.keys[index], notes.queries.get(index)
    if _error(keys, UNROTATED, positions) <= 1:
        _require_turned(index, queries, None, held, positions)
        return None
    errors: dict[float, LayerRotation] = {}
    for found in _candidates(held, layer_type, keys.shape[-1]):
        error = _error(keys, found.of(held), positions)
        if error <= 1:
            _require_turned(index, queries, found, held, positions)
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


def _require_turned(
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


def _require_latents(
    index: int, notes: Notes, found: LayerRotation | None, held: dict[Place, Rotary], positions: Tensor
) -> None:
    """Raise :class:`MeasuredOtherwiseError` unless the cache holds latents, and parts that turn as the keys do."""
    latents, parts = notes.parts.get(index, (notes.keys[index],) * 2)
    rotary = UNROTATED if found is None else replace(found.of(held), offset=0)
    if found is None or _error(latents, UNROTATED, positions) > 1 or _error(parts, rotary, positions) > 1:
        raise MeasuredOtherwiseError(
            f"layer {index} attends to other keys than its cache holds, and that is no latents and rotated parts"
        )


def _layout_of(path: str, notes: Notes, held: dict[Place, Rotary]) -> AngleLayout:
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
