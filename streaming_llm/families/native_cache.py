"""The cache that a family makes for itself: beside keys and values it holds the states of recurrent layers."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from transformers import DynamicCache


def native_cache(decoder: Any, n_rows: int, device: torch.device | str, dtype: torch.dtype) -> Any:
    """A new cache of the kind that a decoder uses by itself.

    Before Transformers had one for all, each family with recurrent layers had a cache class in its own file.
    """
    config, module = decoder.config, sys.modules[type(decoder).__module__]
    own = [
        kind
        for kind in vars(module).values()
        if isinstance(kind, type) and kind.__module__ == module.__name__ and hasattr(kind, "update")
        and kind.__name__.endswith("Cache")
    ]  # fmt: skip
    if not own:
        return DynamicCache(config=config)
    rows = dict.fromkeys(("batch_size", "max_batch_size"), n_rows)
    devices = [device] * config.num_hidden_layers
    known = {"config": config, "dtype": dtype, "device": device, "devices": devices, **rows}
    wanted = inspect.signature(own[0]).parameters
    cache = own[0](**{name: value for name, value in known.items() if name in wanted})
    if not getattr(cache, "key_cache", True):  # Falcon-H1's, which counts as false while it holds no keys
        cache.key_cache = [torch.empty(0) for _ in range(config.num_hidden_layers)]
        cache.value_cache = list(cache.key_cache)
    return cache
