"""A full streaming cache as a model sees it while its step is recorded: slot and position are the device's alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from .cache_layer import StreamingLayer
from .kv_cache import StreamingKVCache
from .rope_utils import compute_dtype


class DeviceLayer(CacheLayerMixin):
    """A full layer of a stream for single tokens whose slot and position only the device knows."""

    is_compileable = False
    is_sliding = False

    def __init__(self, layer: StreamingLayer, cache: DeviceCache) -> None:
        super().__init__()
        self.is_initialized = True
        self.layer, self.cache = layer, cache
        self.keys, self.values = layer.keys, layer.values
        self.n_sink = layer.layout.config.n_sink
        self.rotary = layer.rotation.on(layer.device)
        rotated = self.keys[:, :, : self.n_sink, : self.rotary.rotary_dim]
        self.turned = torch.zeros_like(rotated, dtype=compute_dtype(self.keys.dtype))
        self.quarter = torch.zeros_like(self.turned)

    def lazy_initialization(self, *states: Tensor) -> None:
        """Nothing to do: the ring is there."""

    def load(self) -> None:
        """Take the sinks as first rotated from the layer."""
        self.turned.copy_(self.layer._keep_sinks()[..., : self.rotary.rotary_dim])
        self.quarter.copy_(self.rotary.quarter_turn(self.turned))

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Store one token and move the sinks: the whole ring is what the token attends to."""
        self.keys.index_copy_(2, self.cache.slot, key_states)
        self.values.index_copy_(2, self.cache.slot, value_states)
        if self.n_sink:
            cos, sin = self.cache.turn(self.layer)
            moved = torch.addcmul(self.turned * cos, self.quarter, sin)
            self.keys[:, :, : self.n_sink, : self.rotary.rotary_dim] = moved.to(self.keys.dtype)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.layer.layout.config.cache_size

    def get_mask_sizes(self, cache_position: Tensor | int) -> tuple[int, int]:
        return self.layer.layout.capacity, 0

    def get_max_cache_shape(self) -> int:
        return self.layer.layout.capacity

    def get_max_length(self) -> int:
        return self.layer.layout.capacity


class DeviceCache(Cache):
    """What a model sees of a full :class:`StreamingKVCache` while its step is recorded.

    Attributes:
        counters: int64 ``[2]`` on the device: tokens seen, and position of the stream's first token.
        slot: int64 ``[1]``: where the token at hand is stored.
    """

    def __init__(self, cache: StreamingKVCache, model: nn.Module) -> None:
        self.source = cache
        self.counters = torch.zeros(2, dtype=torch.int64, device=model.device)
        self.slot = torch.zeros(1, dtype=torch.int64, device=model.device)
        self._turns: dict[int, tuple[Tensor, Tensor]] = {}
        super().__init__(layers=[DeviceLayer(layer, self) for layer in cache.layers])

    def load(self) -> None:
        """Take the stream's state from the host."""
        first = self.source.layers[0]
        self.counters.copy_(torch.tensor([first.n_seen, first.position_offset]))
        for layer in self.layers:
            layer.load()

    def begin(self) -> None:
        """Work out what all layers need to know of the token at hand."""
        config = self.source.streaming_config
        self.slot = config.n_sink + (self.counters[:1] - config.n_sink) % (config.window_size + 1)
        self._turns = {}

    def turn(self, layer: StreamingLayer) -> tuple[Tensor, Tensor]:
        """Cosine and sine ``[rotary_dim]`` of the turn that a layer's sinks have made."""
        key = id(layer.rotation)
        if key not in self._turns:
            rotary = layer.rotation.on(layer.device)
            cos, sin = rotary.cos_sin(self.counters[0] - self.source.streaming_config.cache_size)
            dtype = compute_dtype(layer.dtype)
            self._turns[key] = (cos.to(dtype), sin.to(dtype))
        return self._turns[key]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """Store one layer's token; see :meth:`DeviceLayer.update`."""
        return self.layers[layer_idx].update(key_states, value_states)
