"""A recorded step of the plain model call.

It attends to the whole ring, since PyTorch's kernels take no length from the device. Until the cache is full, slots
without a token are masked, which the math kernel can do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from ..attention.math_kernel import mask_of_empty
from ..attention.plan import StepPlan
from ..cache_layer import StreamingLayer
from ..kv_cache import StreamingKVCache
from ..positions import StreamLayout
from ..rope_utils import compute_dtype
from .recorded_step import RecordedStep, StaticTensors


class ModelCall(RecordedStep):
    """The model's own call, recorded as it is."""

    def __init__(self, model: nn.Module, cache: StreamingKVCache, static: StaticTensors) -> None:
        self._model, self._static = model, static
        self._cache = DeviceCache(cache, static.tokens.device)
        self.seen = self._cache.seen
        self._call: Callable[..., Tensor] = model_call  # no method: a step that held itself would keep its memory

    def load(self) -> None:
        self._cache.load()
        self.masked = self._cache.masked

    def run(self) -> None:
        self._static.logits.copy_(self._call(self._model, self._cache, self._static.tokens))


class CompiledModelCall(ModelCall):
    """The model's call after ``torch.compile`` has fused what it can; the plain one until the cache is full."""

    def __init__(self, model: nn.Module, cache: StreamingKVCache, static: StaticTensors) -> None:
        super().__init__(model, cache, static)
        self._compiled = torch.compile(model_call, dynamic=False)

    def load(self) -> None:
        super().load()
        self._call = model_call if self.masked else self._compiled


def model_call(model: nn.Module, cache: DeviceCache, tokens: Tensor) -> Tensor:
    """Logits ``[batch, vocab]`` of one token of each row, ``[batch]``."""
    position_ids = (cache.seen + cache.offset).unsqueeze(1)
    given = {"input_ids": tokens.unsqueeze(1), "position_ids": position_ids, "past_key_values": cache}
    return model(**given, use_cache=True).logits[:, -1]


class DeviceCache(Cache):
    """A :class:`StreamingKVCache` with every slot allocated, as a model sees it while its step is recorded.

    Attributes:
        masked: whether there are slots without a token.
        seen, offset: int64 ``[batch]`` on the device: tokens seen, and position of the stream's first token.
    """

    def __init__(self, cache: StreamingKVCache, device: torch.device) -> None:
        self.source, self.masked = cache, False
        self.rows = torch.arange(cache.layers[0].batch_size, device=device)
        self.seen, self.offset = torch.zeros_like(self.rows), torch.zeros_like(self.rows)
        self._own = [DeviceLayer(layer) for layer in cache.layers]
        super().__init__(layers=list(self._own))

    def load(self) -> None:
        """Take the stream's state from the host."""
        self.masked = not self.source.is_full
        if self.masked:  # what is masked has to be finite
            self.source.clear_empty_slots()
        rows = self.source.progress.of_rows(len(self.rows))
        self.seen.copy_(torch.tensor([seen for seen, _ in rows]))
        self.offset.copy_(torch.tensor([offset for _, offset in rows]))
        for layer in self._own:
            layer.load()

    def begin(self, n_tokens: int, *, attached: bool) -> None:
        """Forget what was worked out for the step before."""
        self._slots: dict[StreamLayout, Tensor] = {}
        self._plans: dict[StreamLayout, StepPlan] = {}
        self._turns: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def end(self) -> None:
        """The token at hand has been seen."""
        self.seen += 1

    def abandon(self) -> None:
        """Nothing to do: a failed recording is given up."""

    def slot(self, layout: StreamLayout) -> Tensor:
        """Where each row's token goes in layers of a layout, ``[batch]``."""
        if layout not in self._slots:
            n_sink, ring = layout.config.n_sink, layout.config.window_size + 1
            slots = n_sink + (self.seen - n_sink) % ring
            self._slots[layout] = torch.where(self.seen < n_sink, self.seen, slots) if self.masked else slots
        return self._slots[layout]

    def turn(self, layer: StreamingLayer) -> tuple[Tensor, Tensor]:
        """Cosine and sine ``[batch, 1, 1, rotary_dim]`` of the turn that a layer's sinks have made."""
        key = id(layer.rotation), layer.layout
        if key not in self._turns:
            rotary, dtype = layer.rotation.on(layer.device), compute_dtype(layer.dtype)
            distance = self.seen - layer.layout.config.cache_size
            cos, sin = rotary.cos_sin(distance.clamp(min=0) if self.masked else distance)
            self._turns[key] = cos.to(dtype)[:, None, None], sin.to(dtype)[:, None, None]
        return self._turns[key]

    def take_plan(self, layer_idx: int) -> StepPlan:
        """The token at hand attends to the whole ring, but for slots without a token."""
        if not self.masked:
            return StepPlan()
        layer = self.source.layers[self.source.family.sources.get(layer_idx, layer_idx)]
        if layer.layout not in self._plans:
            self._plans[layer.layout] = StepPlan(mask=mask_of_empty(layer.keys, self.seen))
        return self._plans[layer.layout]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Store one layer's token; see :meth:`DeviceLayer.update`."""
        if self.source.family.latents:
            return self._own[layer_idx].update(value_states, key_states, self)[::-1]
        return self._own[layer_idx].update(key_states, value_states, self)


class DeviceLayer(CacheLayerMixin):
    """A layer of a stream, all slots allocated, for single tokens whose slot and position only the device knows."""

    is_compileable = False
    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, layer: StreamingLayer) -> None:
        super().__init__()
        self.is_initialized, self.layer = True, layer
        self.keys, self.values = layer.keys, layer.values
        self.n_sink = layer.layout.config.n_sink
        self.rotary = layer.rotation.on(layer.device)
        self.turned = torch.zeros_like(layer.sinks[..., self.rotary.span], dtype=compute_dtype(self.keys.dtype))
        self.quarter = torch.zeros_like(self.turned)

    def lazy_initialization(self, *states: Tensor) -> None:
        """Nothing to do: the ring is there."""

    def load(self) -> None:
        """Take the sinks as first rotated from the layer."""
        self.turned.copy_(self.layer.sinks[..., self.rotary.span])
        self.quarter.copy_(self.rotary.quarter_turn(self.turned))

    def _keep_sink(self, key: Tensor, rows: Tensor, seen: Tensor) -> None:
        """Keep the keys ``[batch, num_kv_heads, head_dim]`` of rows whose token is a sink as they are."""
        sinks = self.layer.sinks
        at, is_sink = seen.clamp(max=self.n_sink - 1), seen < self.n_sink
        sinks[rows, :, at] = torch.where(is_sink[:, None, None], key, sinks[rows, :, at])
        self.load()

    def update(self, key_states: Tensor, value_states: Tensor, cache: Any = None) -> tuple[Tensor, Tensor]:
        """Store one token of each row and move the sinks: the whole ring is what the token attends to."""
        rows, slots = cache.rows, cache.slot(self.layer.layout)
        self.keys[rows, :, slots] = key_states[:, :, 0]
        self.values[rows, :, slots] = value_states[:, :, 0]
        if self.n_sink and cache.masked:
            self._keep_sink(key_states[:, :, 0], rows, cache.seen)
        if self.layer.sinks_turn:
            cos, sin = cache.turn(self.layer)
            moved = torch.addcmul(self.turned * cos, self.quarter, sin)
            self.keys[:, :, : self.n_sink, self.rotary.span] = moved.to(self.keys.dtype)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.layer.layout.config.cache_size

    def get_mask_sizes(self, cache_position: Tensor | int) -> tuple[int, int]:
        return self.layer.layout.capacity, 0

    def get_max_length(self) -> int:
        return self.layer.layout.capacity

    get_max_cache_shape = get_max_length  # its name in older Transformers
