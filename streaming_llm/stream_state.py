"""A stream as a value: what everything to come depends on, and whether it fits a cache.

That is the stored keys and values as they lie, the sinks as they were first rotated, and two counters. A state also
says of which model and cache it is: one that does not fit is refused, because it would give wrong tokens without a
sign.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .rope_utils import Rotary

if TYPE_CHECKING:
    from .kv_cache import StreamingKVCache

MODEL_FACTS = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_kv_heads",
    "multi_query",
    "new_decoder_architecture",
    "head_dim",
)
"""What decides the shape of keys and values in one family or another; compared where both sides have it."""


@dataclass(frozen=True)
class StreamState:
    """Where a stream is.

    Args:
        facts: JSON values. Of which cache: ``model`` (see ``MODEL_FACTS``), ``n_sink``, ``window_size``, ``rotary``
            (the rotations that occur), ``rotary_of_layer``. Where: ``n_seen``, ``position_offset``, ``dtype`` (of an
            empty stream ``None``), ``slots`` (allocated in each layer; the first of them are stored).
        tensors: ``<layer>.keys`` and ``<layer>.values`` ``[batch, num_kv_heads, n_stored, head_dim]`` and, once the
            sinks have moved, ``<layer>.sink_keys`` ``[batch, num_kv_heads, n_sink, head_dim]``. Those of
            :meth:`StreamingKVCache.state` are views of the cache.
    """

    facts: dict[str, Any]
    tensors: dict[str, Tensor]


def model_facts(config) -> dict[str, Any]:
    """What a Transformers configuration says about the shape of keys and values."""
    config = config.get_text_config(decoder=True)
    return {name: value for name in MODEL_FACTS if (value := getattr(config, name, None)) is not None}


def state_of(cache: StreamingKVCache) -> StreamState:
    """The state of a cache; its tensors are views.

    Raises:
        RuntimeError: a forward ended before its last layer.
    """
    first = cache.layers[0]
    if any(layer.n_seen != first.n_seen for layer in cache.layers):
        raise RuntimeError("a forward with this cache ended before its last layer: its layers hold different tokens")
    facts = {
        **_identity(cache),
        "n_seen": first.n_seen,
        "position_offset": first.position_offset,
        "dtype": str(first.keys.dtype).removeprefix("torch.") if first.n_stored else None,
        "slots": [layer.keys.shape[2] if layer.n_stored else 0 for layer in cache.layers],
    }
    layers = [layer.state() for layer in cache.layers]
    return StreamState(
        facts, {f"{index}.{name}": tensor for index, state in enumerate(layers) for name, tensor in state.items()}
    )


def _identity(cache: StreamingKVCache) -> dict[str, Any]:
    rotations = [_rotation_facts(layer.rotation.rotary) for layer in cache.layers]
    distinct = [rotation for index, rotation in enumerate(rotations) if rotation not in rotations[:index]]
    return {
        "model": cache.model_facts,
        "n_sink": cache.streaming_config.n_sink,
        "window_size": cache.streaming_config.window_size,
        "rotary": distinct,
        "rotary_of_layer": [distinct.index(rotation) for rotation in rotations],
    }


def _rotation_facts(rotary: Rotary) -> dict[str, Any]:
    values = {"inv_freq": rotary.inv_freq.tolist()}  # JSON keeps every bit of a float64
    return values | {name: value for name, value in vars(rotary).items() if not isinstance(value, Tensor)}


def put(
    cache: StreamingKVCache,
    state: StreamState,
    *,
    device: torch.device | list[torch.device],
    dtype: torch.dtype | None = None,
) -> None:
    """Bring a cache to where ``state`` was taken. Buffers that fit stay where they are.

    Args:
        device: where keys and values go, for all layers or for each.
        dtype: what keys and values are converted to; as saved when ``None``.

    Raises:
        ValueError: the state is of another model, of a cache of another size, or not whole. The cache is unchanged.
    """
    facts = state.facts
    differing = _differences(facts, _identity(cache))
    if differing:
        raise ValueError("it is a stream of another model or cache: " + "; ".join(differing))
    layers = [_layer_tensors(cache, state, index) for index in range(len(cache.layers))]
    devices = device if isinstance(device, list) else [device] * len(cache.layers)
    cache.reset()
    for layer, tensors, n_slots, where in zip(cache.layers, layers, facts["slots"], devices, strict=True):
        layer.restore(facts["n_seen"], facts["position_offset"], n_slots, tensors, where, dtype)


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    there, here = theirs["model"], ours["model"]
    found = [
        f"{name}: {there[name]} there, {here[name]} here"
        for name in MODEL_FACTS
        if name in there and name in here and there[name] != here[name]
    ]
    for name in ("rotary_of_layer", "slots"):
        if not found and len(theirs[name]) != len(ours["rotary_of_layer"]):
            found.append(f"layers in {name}: {len(theirs[name])} there, {len(ours['rotary_of_layer'])} here")
    for name in ("n_sink", "window_size"):
        if theirs[name] != ours[name]:
            found.append(f"{name}: {theirs[name]} there, {ours[name]} here")
    if found:
        return found
    for layer, (a, b) in enumerate(zip(theirs["rotary_of_layer"], ours["rotary_of_layer"], strict=True)):
        rotation, own = theirs["rotary"][a], ours["rotary"][b]
        names = [name for name in {**rotation, **own} if rotation.get(name) != own.get(name)]
        if names:
            return [f"{name} of the rotation in layer {layer}: {_pair(rotation, own, name)}" for name in names]
    return []


def _pair(theirs: dict[str, Any], ours: dict[str, Any], name: str) -> str:
    a, b = theirs.get(name), ours.get(name)
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        index = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
        return f"number {index} is {a[index]!r} there, {b[index]!r} here"
    if isinstance(a, list) and isinstance(b, list):
        return f"{len(a)} there, {len(b)} here"
    return f"{a} there, {b} here"


def _layer_tensors(cache: StreamingKVCache, state: StreamState, index: int) -> dict[str, Tensor]:
    """A layer's tensors, checked against the counters and each other."""
    names = ("keys", "values", "sink_keys")
    found = {name: state.tensors[key] for name in names if (key := f"{index}.{name}") in state.tensors}
    layout, n_seen = cache.layers[index].layout, state.facts["n_seen"]
    n_stored, n_sink = min(n_seen, layout.capacity), layout.config.n_sink
    expected = {"keys": n_stored, "values": n_stored} if n_seen else {}
    if n_seen > layout.capacity and n_sink:
        expected["sink_keys"] = n_sink
    lengths = {name: tensor.shape[2] if tensor.dim() == 4 else None for name, tensor in found.items()}
    rows = {tuple(tensor.shape[:2]) for tensor in found.values()}
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in found.values()}
    whole = not found or (len(rows) == 1 and dtypes == {state.facts["dtype"]})
    if lengths != expected or not whole or not n_stored <= state.facts["slots"][index] <= layout.capacity:
        raise ValueError(f"layer {index} is not whole: slots {lengths} where {expected} belong after {n_seen} tokens")
    return found
