"""Engines that are kept from one use to the next, so that a step is recorded once for each size of a batch."""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from ..kv_cache import StreamingKVCache
from . import make_engine
from .base import Engine

MAX_KEPT = 4
"""Engines that are kept: for the latest sizes of a batch."""


class EnginePool:
    """Engines of one name for an attached model, each with the buffers of a cache of its own.

    A cache that is decoded with lives in an engine's buffers until another cache of its size needs them.

    Args:
        model: attached as long as engines are used.
        name: a resolved name, see :func:`streaming_llm.resolve_engine`.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name
        self._engines: OrderedDict[tuple[Any, ...], tuple[Engine, weakref.ref[StreamingKVCache]]] = OrderedDict()

    def engine_for(self, cache: StreamingKVCache) -> Engine:
        """An engine that advances ``cache``, which is not empty."""
        first = cache.layers[0]
        key = cache.streaming_config, first.keys.shape[:2], first.dtype, first.device
        kept = self._engines.pop(key, None)
        if kept is None:
            own = copy.copy(cache)  # the engine outlives the caller's
            own.become(cache)
            engine = make_engine(self.model, own, self.name)
        else:
            engine, holder = kept
            if (before := holder()) is not cache:
                self._hand_over(engine.cache, before, cache)
        self._engines[key] = engine, weakref.ref(cache)
        if len(self._engines) > MAX_KEPT:
            self._engines.popitem(last=False)
        return engine

    @staticmethod
    def _hand_over(own: StreamingKVCache, before: StreamingKVCache | None, cache: StreamingKVCache) -> None:
        """Let ``cache`` live in the engine's buffers instead of the cache that was there ``before``."""
        if before is not None:
            with torch.inference_mode(False), torch.no_grad():
                before.become(copy.deepcopy(own))
        state = cache.state()
        own.restore(state, device=[layer.device for layer in cache.layers])
        cache.become(own)
