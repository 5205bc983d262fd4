"""What a streaming cache has to remember to go on exactly, as a value that can be saved, and back.

Keys and values are kept as they lie, with the sinks as they were first rotated: a cache restored from its state
gives the same bits as the one that it was taken from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from streaming_llm import StreamingKVCache


def cache_state(cache: StreamingKVCache) -> list[dict[str, Any]]:
    """The state of each layer, tensors on the CPU.

    Returns:
        per layer: ``n_seen``, ``position_offset``, ``keys`` and ``values`` ``[batch, num_kv_heads, slots, head_dim]``
        (``slots``: as many as are allocated) and ``sink_keys`` ``[batch, num_kv_heads, n_sink, head_dim]`` or
        ``None`` while they have not moved.
    """
    return [_layer_state(layer) for layer in cache.layers]


def _layer_state(layer) -> dict[str, Any]:
    def saved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().clone().cpu()

    return {
        "n_seen": layer.n_seen,
        "position_offset": layer.position_offset,
        "keys": saved(layer.keys if layer.is_initialized else None),
        "values": saved(layer.values if layer.is_initialized else None),
        "sink_keys": saved(layer._sink_keys),
    }


def load_cache_state(cache: StreamingKVCache, state: list[dict[str, Any]], device: torch.device) -> None:
    """Put an empty cache where `state` was taken, with keys and values on `device`.

    Raises:
        ValueError: the state is of a model with another number of layers, or of another cache size.
    """
    if len(state) != len(cache.layers):
        raise ValueError(f"the state has {len(state)} layers and the model {len(cache.layers)}")
    for layer, saved in zip(cache.layers, state, strict=True):
        if saved["keys"] is None:
            continue
        slots = saved["keys"].shape[2]
        if slots > layer.layout.capacity:
            raise ValueError(f"the state has {slots} slots and the cache {layer.layout.capacity}")
        keys, values = saved["keys"].to(device), saved["values"].to(device)
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        layer.n_seen, layer.position_offset = saved["n_seen"], saved["position_offset"]
        layer._sink_keys = None if saved["sink_keys"] is None else saved["sink_keys"].to(device)
        layer._sink_parts = None  # follows from the keys, and is made when it is needed
