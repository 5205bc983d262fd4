"""Where the streams of a batch are, on the device: advanced by each step, read by its kernels.

Layers that lie and rotate alike share a state. Each row of the batch is a stream of its own, with counters and angles
of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..cache_layer import StreamingLayer
from ..launch import launch, wait_for_input
from ..positions import Progress, StreamLayout
from ..rope_utils import Rotary
from .heads import head_meta
from .recipe import Attention


@dataclass(frozen=True, eq=False)
class RingState:
    """What the kernels of a layer read.

    Attributes:
        counters: int64 ``[batch, 2]``: number and slot of the token at hand.
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

    def meta_of(self, attention: Attention) -> dict[str, Any]:
        """Compile-time arguments for a token of a layer."""
        places = attention.places
        return {
            "CAPACITY": self.layout.capacity, "N_SINK": self.layout.config.n_sink,
            "HALF": self.half, "WIDTH": self.angles.shape[2], **head_meta(attention),
            "HEADS": attention.num_heads, "KV_HEADS": attention.num_kv_heads, "QKV_WIDTH": attention.width,
            "Q_STEP": places.query_step, "K_START": places.key_start, "K_STEP": places.key_step,
            "V_START": places.value_start, "V_STEP": places.value_step,
        }  # fmt: skip


class Rings:
    """The states of the layers of a cache.

    Attributes:
        seen: tokens that each row has been fed, int64 ``[batch]``: advanced by each step.
        offset: position of its first token, likewise.
        states: the different ones.
        of_layer: for each layer its own.
    """

    def __init__(self, layers: Sequence[StreamingLayer], batch: int, device: torch.device) -> None:
        kinds = list(dict.fromkeys((layer.layout, layer.rotation) for layer in layers))
        rotaries = [rotation.rotary for _, rotation in kinds]
        self.width = max(1, *(rotary.inv_freq.shape[0] for rotary in rotaries))
        self.seen, self.offset = (torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(2))
        self.counters = torch.zeros(len(kinds), batch, 2, dtype=torch.int64, device=device)
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
        seen, offset = torch.tensor(progress.of_rows(len(self.seen)), dtype=torch.int64).unbind(1)
        self.seen.copy_(seen)
        self.offset.copy_(offset)


@triton.jit
def _begin_step(
    tokens_ptr, tokens_step, table_ptr, x_ptr, scale, seen_ptr, offset_ptr, counters_ptr, angles_ptr,
    sizes_ptr, factors_ptr, inv_freq_ptr,
    STATES: tl.constexpr, HIDDEN: tl.constexpr, WIDTH: tl.constexpr, WIDTH_P: tl.constexpr, SCALE: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_input(PDL)
    row, part = tl.program_id(0), tl.program_id(1)
    if part == 0:
        which = tl.arange(0, 4)[:, None]  # a power of two; the last one is not used
        pair = tl.arange(0, WIDTH_P)[None, :]
        now, offset = tl.load(seen_ptr + row), tl.load(offset_ptr + row)
        states = ()
        for state in tl.static_range(STATES):  # all loads come first: one behind a store would wait for it
            n_sink, window = tl.load(sizes_ptr + 2 * state), tl.load(sizes_ptr + 2 * state + 1)
            inv_freq = tl.load(inv_freq_ptr + state * WIDTH + pair, pair < WIDTH, 0.0)
            states = states + ((n_sink, window, inv_freq, tl.load(factors_ptr + state)),)  # type: ignore[assignment]  # noqa: RUF005 - Triton cannot unpack
        tl.store(seen_ptr + row, now + 1)
        inside = (pair < WIDTH) & (which < 3)
        for state in tl.static_range(STATES):
            n_sink, window, inv_freq, scaling = states[state]  # type: ignore[var-annotated]
            place = state * tl.num_programs(0) + row
            slot = tl.where(now < n_sink, now, n_sink + (now - n_sink) % (window + 1))
            tl.store(counters_ptr + place * 2, now)
            tl.store(counters_ptr + place * 2 + 1, slot)
            in_cache = tl.minimum(now, n_sink + window)
            position = tl.where(which == 0, now + offset, tl.where(which == 1, in_cache + offset, now - in_cache))
            angle = position.to(tl.float64) * inv_freq
            factor = tl.where(which < 2, scaling, 1.0)
            to = angles_ptr + (place * 6 + which * 2) * WIDTH + pair
            tl.store(to, (tl.cos(angle) * factor).to(tl.float32), inside)
            tl.store(to + WIDTH, (tl.sin(angle) * factor).to(tl.float32), inside)
    else:
        column = (part - 1) * BLOCK + tl.arange(0, BLOCK)
        token = tl.load(tokens_ptr + row * tokens_step)
        x = tl.load(table_ptr + token * HIDDEN + column, column < HIDDEN, 0.0).to(tl.float32)
        if SCALE:
            x *= scale
        tl.store(x_ptr + row * HIDDEN + column, x, column < HIDDEN)


def begin_step(
    tokens: Tensor, table: Tensor, x: Tensor, rings: Rings, scale: float = 1.0, *, pdl: bool = False
) -> None:
    """Advance ``rings`` by one token, and write its embedding times ``scale`` to ``x``.

    Args:
        tokens: int64 ``[batch]``.
        table: the embedding's weight ``[vocab, hidden]``.
        x: float32 ``[batch, hidden]``.
    """
    batch, hidden = x.shape
    block = 1024
    launch(
        _begin_step, (batch, 1 + triton.cdiv(hidden, block)), tokens, tokens.stride(0), table, x, scale,
        rings.seen, rings.offset, rings.counters, rings.angles, rings.sizes, rings.factors, rings.inv_freq,
        STATES=len(rings.states), HIDDEN=hidden, WIDTH=rings.width, WIDTH_P=triton.next_power_of_2(rings.width),
        SCALE=scale != 1.0, BLOCK=block, pdl=pdl,
    )  # fmt: skip
