"""The cache that a family makes for itself: beside keys and values it holds the states of recurrent layers."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any

import torch
from transformers import DynamicCache


def model_files(decoder: Any) -> list[ModuleType]:
    """The files that the classes of a decoder come from, which may be derived from one of Transformers' own."""
    names = dict.fromkeys(kind.__module__ for kind in type(decoder).__mro__)
    return [sys.modules[name] for name in names if ".modeling_" in name and name != "transformers.modeling_utils"]


def uses_attention_functions(decoder: Any) -> bool:
    """Whether a decoder's file goes through Transformers' table of attention functions."""
    return any(hasattr(module, "ALL_ATTENTION_FUNCTIONS") for module in model_files(decoder))


def native_cache(decoder: Any, n_rows: int, device: torch.device | str, dtype: torch.dtype) -> Any:
    """A new cache of the kind that a decoder uses by itself.

    Before Transformers had one for all, each family with recurrent layers had a cache class in its own file.
    """
    config, modules = decoder.config, model_files(decoder)
    own = [
        kind
        for module in modules
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
        cache.key_cache = [torch.empty(0, 0, 0, 0) for _ in range(config.num_hidden_layers)]
        cache.value_cache = list(cache.key_cache)
    return cache
