"""Where the streams of a batch are, on the device: advanced by each step, read by its kernels.

Layers that lie and rotate alike share a state. Each row of the batch is a stream of its own, with counters and angles
of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..cache_layer import StreamingLayer
from ..positions import Progress, StreamLayout
from ..rope_utils import Rotary
from .launch import launch

SEEN, OFFSET, NOW, SLOT = range(4)
"""Counters of a stream: tokens seen, position of its first token, number and slot of the token at hand."""


@dataclass(frozen=True, eq=False)
class RingState:
    """What the kernels of a layer read.

    Attributes:
        layout: which tokens the layer keeps, and where.
        rotary: the layer's rotation.
        counters: int64 ``[batch, 4]``, see :data:`SEEN`.
        angles: float32 ``[batch, 6, at least rotary_dim / 2]``, computed in float64: cosine and sine of the query's
            position, of the position from which it sees the sinks as first rotated, and of the turn that the sinks
            have made. The first two have the rotation's factor.
    """

    layout: StreamLayout
    rotary: Rotary
    counters: Tensor
    angles: Tensor

    @property
    def half(self) -> int:
        """Pairs of dimensions that are rotated."""
        return self.rotary.inv_freq.shape[0]


class Rings:
    """The states of the layers of a cache.

    Attributes:
        states: the different ones.
        of_layer: for each layer its own.
    """

    def __init__(self, layers: Sequence[StreamingLayer], batch: int, device: torch.device) -> None:
        kinds = list(dict.fromkeys((layer.layout, layer.rotation) for layer in layers))
        rotaries = [rotation.rotary for _, rotation in kinds]
        self.width = max(1, *(rotary.inv_freq.shape[0] for rotary in rotaries))
        self.counters = torch.zeros(len(kinds), batch, 4, dtype=torch.int64, device=device)
        self.angles = torch.zeros(len(kinds), batch, 6, self.width, dtype=torch.float32, device=device)
        configs = [layout.config for layout, _ in kinds]
        self.sizes = torch.tensor([(c.n_sink, c.window_size) for c in configs], device=device)
        self.factors = torch.tensor([r.scaling for r in rotaries], dtype=torch.float64, device=device)
        self.inv_freq = torch.zeros(len(kinds), self.width, dtype=torch.float64, device=device)
        for row, rotary in zip(self.inv_freq, rotaries, strict=True):
            row[: rotary.inv_freq.shape[0]] = rotary.inv_freq.to(device)
        self.states = [
            RingState(layout, rotation.rotary, *on_device)
            for (layout, rotation), *on_device in zip(kinds, self.counters, self.angles, strict=True)
        ]
        self.of_layer = [self.states[kinds.index((layer.layout, layer.rotation))] for layer in layers]

    def set(self, progress: Progress) -> None:
        """Put the streams where the host says they are."""
        rows = progress.of_rows(self.counters.shape[1])
        self.counters[:, :, :2] = torch.tensor(rows, dtype=torch.int64)


@triton.jit
def _begin_step(
    tokens_ptr, tokens_step, table_ptr, x_ptr, scale, counters_ptr, angles_ptr, sizes_ptr, factors_ptr, inv_freq_ptr,
    STATES: tl.constexpr, HIDDEN: tl.constexpr, WIDTH: tl.constexpr, WIDTH_P: tl.constexpr, SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    batch, part = tl.program_id(0), tl.program_id(1)
    if part < STATES:
        at = counters_ptr + (part * tl.num_programs(0) + batch) * 4
        now, offset = tl.load(at), tl.load(at + 1)
        n_sink, window = tl.load(sizes_ptr + 2 * part), tl.load(sizes_ptr + 2 * part + 1)
        tl.store(at, now + 1)
        tl.store(at + 2, now)
        tl.store(at + 3, tl.where(now < n_sink, now, n_sink + (now - n_sink) % (window + 1)))
        in_cache = tl.minimum(now, n_sink + window)
        which = tl.arange(0, 4)[:, None]  # a power of two; the last one is not used
        position = tl.where(which == 0, now + offset, tl.where(which == 1, in_cache + offset, now - in_cache))
        pair = tl.arange(0, WIDTH_P)[None, :]
        inside = (pair < WIDTH) & (which < 3)
        angle = position.to(tl.float64) * tl.load(inv_freq_ptr + part * WIDTH + pair, pair < WIDTH, 0.0)
        factor = tl.where(which < 2, tl.load(factors_ptr + part), 1.0)
        to = angles_ptr + ((part * tl.num_programs(0) + batch) * 6 + which * 2) * WIDTH + pair
        tl.store(to, (tl.cos(angle) * factor).to(tl.float32), inside)
        tl.store(to + WIDTH, (tl.sin(angle) * factor).to(tl.float32), inside)
    else:
        column = (part - STATES) * BLOCK + tl.arange(0, BLOCK)
        row = tl.load(tokens_ptr + batch * tokens_step)
        x = tl.load(table_ptr + row * HIDDEN + column, column < HIDDEN, 0.0).to(tl.float32)
        if SCALE:
            x *= scale
        tl.store(x_ptr + batch * HIDDEN + column, x, column < HIDDEN)


def begin_step(tokens: Tensor, table: Tensor, x: Tensor, rings: Rings, scale: float = 1.0) -> None:
    """Advance ``rings`` by one token and write the embeddings of ``tokens`` ``[batch]`` to ``x`` ``[batch, hidden]``.

    Args:
        tokens: int64.
        table: the embedding's weight ``[vocab, hidden]``.
        x: float32.
        scale: factor on the embeddings.
    """
    batch, hidden = x.shape
    n_states, block = len(rings.states), 1024
    launch(
        _begin_step, (batch, n_states + triton.cdiv(hidden, block)), tokens, tokens.stride(0), table, x, scale,
        rings.counters, rings.angles, rings.sizes, rings.factors, rings.inv_freq,
        STATES=n_states, HIDDEN=hidden, WIDTH=rings.width, WIDTH_P=triton.next_power_of_2(rings.width),
        SCALE=scale != 1.0, BLOCK=block,
    )  # fmt: skip
