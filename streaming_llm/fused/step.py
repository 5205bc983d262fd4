"""Logits of one token of each stream, by recipe: made to be captured, with all that positions change on the device.

A token of a single stream is a sequence of matrix-vector products, each in one launch with the norm before it
(:mod:`.norm_gemv`) or the residual sum behind it (:mod:`.gemv_sum`). Several streams go through the layers as blocks
do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..attention.kernel_choice import choose_kernel, kernel_context
from ..kv_cache import StreamingKVCache
from ..launch import pdl_available
from .block import logits_of, product, projected_as_one, through_layers
from .full_ring import FullRing
from .gemv_sum import gemv_sum
from .norm_gemv import norm_gemv
from .recipe import Attention, Layer, Linear, Norm, Recipe
from .ring_attention import RingAttention
from .rings import Rings, begin_step

Attend = Callable[[Tensor], Tensor]
"""From what a layer's projections give, ``[batch, width]``, to ``[batch, num_heads * head_dim]``."""

Pending = tuple[Tensor, Norm]
"""An output, to be normed and added to the residual stream by the next kernel that reads that."""


class StepForward:
    """Logits of one token for each row of a batch.

    Args:
        recipe: of a model.
        cache: its streams, with every slot allocated.
        own_attention: attention by :class:`RingAttention`, for rings filled to any degree, instead of the SDPA kernel
            that is allowed.
        logits: ``[batch, vocab]``, where every call writes its result.

    Attributes:
        masked: whether slots without a token are masked, by an SDPA kernel that takes a mask.
    """

    masked = False

    def __init__(self, recipe: Recipe, cache: StreamingKVCache, *, own_attention: bool, logits: Tensor) -> None:
        self.recipe, self.cache, self.own_attention, self.logits = recipe, cache, own_attention, logits
        self.device, dtype = recipe.embedding.device, recipe.embedding.dtype
        self.batch, hidden, layers = cache.layers[0].batch_size, recipe.hidden_size, recipe.layers
        self.pdl = pdl_available(self.device)
        self.rings = Rings(cache.layers, self.batch, self.device)
        self._kernels: dict[tuple[Any, ...], RingAttention | FullRing] = {}
        self.attend = [self._attention_of(index) for index in range(len(layers))]

        def buffer(width: int, of: torch.dtype) -> Tensor:
            return torch.empty(self.batch, width, dtype=of, device=self.device)

        self.x = [buffer(hidden, torch.float32) for _ in range(2)]
        self.qkv = buffer(max(layer.attention.width for layer in layers), torch.float32)
        self.inner = buffer(max(layer.mlp.down.columns for layer in layers), dtype)
        self.output = buffer(hidden, torch.float32)
        self.side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def load(self) -> None:
        """Take over the streams from the cache, as the host knows them."""
        self.rings.set(self.cache.progress)
        self.masked = not (self.own_attention or self.cache.is_full)
        if self.masked:  # what is masked has to be finite
            self.cache.clear_empty_slots()
        for layer in self.cache.layers if self.own_attention else ():
            layer.put_sinks_back()

    def __call__(self, tokens: Tensor) -> None:
        """Feed ``tokens`` ``[batch]`` and advance."""
        recipe = self.recipe
        begin_step(tokens, recipe.embedding, self.x[0], self.rings, recipe.embedding_scale, pdl=self.pdl)
        for kernel in self._kernels.values():
            if isinstance(kernel, FullRing):
                kernel.begin(self.masked)
        if self.batch > 1:
            hidden = through_layers(recipe, self.x[0], self._attention_of_many, beside=self._beside)
            logits_of(hidden, recipe, self.logits)
            return
        x, pending = self.x[0], None
        for layer, attend in zip(recipe.layers, self.attend, strict=True):
            step = self._parallel_layer if layer.parallel else self._sequential_layer
            x, pending = step(layer, attend, x, pending)
        how = {"scale": recipe.logit_scale, "cap": recipe.logit_cap}
        self._read(x, pending, recipe.norm, (recipe.output,), self.logits, **how)

    # A layer, for a single stream

    def _sequential_layer(
        self, layer: Layer, attend: Attend, x: Tensor, pending: Pending | None
    ) -> tuple[Tensor, Pending | None]:
        attention = layer.attention
        x = self._read(x, pending, layer.attention_norm, attention.projections, self.qkv, clip=attention.clip)
        attended = attend(self.qkv)
        x, pending = self._add(x, attention.output, attended, layer.attention_out_norm, layer.multiplier)
        x = self._read_first(x, pending, layer)
        return self._add(x, layer.mlp.down, self.inner, layer.mlp_out_norm, layer.multiplier)

    def _parallel_layer(self, layer: Layer, attend: Attend, x: Tensor, pending: Any) -> tuple[Tensor, None]:
        """Attention, and beside it on a second stream the MLP, or as much of it as takes as long."""
        attention, y = layer.attention, self._other(x)
        down, joins = (layer.mlp.down, self.inner[0]), self.mlp_joins(attention)

        def mlp() -> None:
            self._read_first(x, None, layer)
            if not joins:
                gemv_sum(down, None, self.output[0], pdl=self.pdl)

        with self._beside(mlp):  # with programmatic launch the next kernel may start early, and waits for both streams
            self._read(x, None, layer.attention_norm, attention.projections, self.qkv, clip=attention.clip)
            dense = attention.output, attend(self.qkv)[0]
        second, other = (down, None) if joins else (None, self.output[0])
        gemv_sum(dense, second, y[0], x[0], other, multiplier=layer.multiplier, pdl=self.pdl)
        return y, None

    def _read(
        self, x: Tensor, pending: Pending | None, norm: Norm | None, linears: tuple[Linear, ...], y: Tensor, **how: Any
    ) -> Tensor:
        """Products of the normed residual stream, to ``y``; returns the stream, with what was pending added first."""
        new_x = x if pending is None else self._other(x)
        norm_gemv(x[0], norm, linears, y[0], pending=pending, new_x=new_x[0], pdl=self.pdl, **how)
        return new_x

    def _read_first(self, x: Tensor, pending: Pending | None, layer: Layer) -> Tensor:
        """The first half of the MLP, to ``inner``."""
        mlp = layer.mlp
        how = {"activation": mlp.activation, "gated": mlp.gate is not None}
        return self._read(x, pending, layer.mlp_norm, mlp.first, self.inner, **how)

    def _add(
        self, x: Tensor, linear: Linear, of: Tensor, norm: Norm | None, multiplier: float
    ) -> tuple[Tensor, Pending | None]:
        """Add a product to the residual stream; where it is normed first, that is left to the next kernel."""
        y, residual = (self._other(x), x[0]) if norm is None else (self.output, None)
        gemv_sum((linear, of[0]), None, y[0], residual, multiplier=multiplier, pdl=self.pdl)
        return (y, None) if norm is None else (x, (y, norm))

    def _other(self, x: Tensor) -> Tensor:
        return self.x[1] if x is self.x[0] else self.x[0]

    @contextmanager
    def _beside(self, work: Callable[[], Any]) -> Iterator[Any]:
        """``work`` runs on a second stream, beside what stands inside; both have ended where that ends."""
        if self.side is None:
            yield work()
            return
        current = torch.cuda.current_stream(self.device)
        self.side.wait_stream(current)
        with torch.cuda.stream(self.side):
            result = work()
        yield result
        current.wait_stream(self.side)

    def mlp_joins(self, attention: Attention) -> bool:
        """Whether the MLP's second product shares a launch with the attention's, instead of running beside it.

        It pays where the MLP's first product takes as long as the attention: measured on an H200 with 2,048 tokens,
        for the sizes of Pythia-70m, 410m, 2.8b and 6.9b.
        """
        hidden = self.recipe.hidden_size
        if self.own_attention:
            return hidden >= 2560
        query = self.inner.new_empty(0, attention.head_dim)
        with kernel_context(attention.module):
            return hidden >= 4096 and choose_kernel(query) != "math"

    # Attention

    def _attention_of(self, index: int) -> Attend:
        """The attention of a layer, with what layers of the same sizes share."""
        attention, layer = self.recipe.layers[index].attention, self.cache.layers[index]
        state = self.rings.of_layer[index]
        key = id(state), attention.num_heads, attention.num_kv_heads, attention.head_dim
        if key not in self._kernels:
            kind = RingAttention if self.own_attention else FullRing
            self._kernels[key] = kind(attention, layer.keys, state)
        # A reference to this object would keep the cache's memory until Python looks for circles.
        kernel, pdl = self._kernels[key], self.pdl
        return lambda qkv: kernel(attention, qkv, layer, pdl=pdl)

    def _attention_of_many(self, index: int, x: Tensor) -> Tensor:
        """The attention layer of normed hidden states ``[batch, hidden]``."""
        attention = self.recipe.layers[index].attention
        return product(self.attend[index](projected_as_one(x, attention)), attention.output)
