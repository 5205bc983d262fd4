"""What moves with the query: the sinks, and the angles by which they turn."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .positions import Progress
from .rope_utils import Rotary, compute_dtype

MAX_POSITIONS_AHEAD = 64
MAX_BYTES_AHEAD = 1 << 20
"""Sinks are moved for so many of the coming positions at a time, where they are small enough."""


class SinkRotation:
    """Cosine and sine for the sinks of all layers that rotate alike.

    Attributes:
        rotary: the model's rotation.
        exact_angles: whether the model's angles are exact in the forward at hand. If not, they are float32 products
            of position and frequency, and the sinks follow the angle that the query really has.
    """

    def __init__(self, rotary: Rotary) -> None:
        self.rotary = rotary
        self.exact_angles = False
        self._on_device: dict[torch.device, Rotary] = {}
        self._turns: dict[tuple[int, int, torch.device, bool], tuple[Tensor, Tensor]] = {}

    def on(self, device: torch.device) -> Rotary:
        """The rotation with its frequencies on ``device``."""
        if device not in self._on_device:
            self._on_device[device] = self.rotary.to(device)
        return self._on_device[device]

    def cos_sin(self, queries: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine ``[..., rotary_dim]``, float64, of turns to positions ``queries`` ``[...]``.

        Args:
            distance: from where the turns begin, ``[...]``; where it is negative, nothing is turned.
        """
        rotary = self.on(queries.device)
        if self.exact_angles:
            return rotary.cos_sin(distance.clamp(min=0))
        angles = (rotary.inv_freq.float() * queries.float().unsqueeze(-1)).double()
        angles = angles - rotary.inv_freq * (queries - distance).unsqueeze(-1)
        return rotary.cos_sin_of(angles * (distance > 0).unsqueeze(-1))

    def turns(self, first: int, count: int, device: torch.device, paired: bool = False) -> tuple[Tensor, Tensor]:
        """Cosine and sine of turns by ``first``, ``first - 1``, ..., computed once for all layers.

        They bring the queries of a block to where the sinks in their first rotation see them.

        Returns:
            Two tensors ``[count, rotary_dim]`` in float64, or if ``paired`` ``[count, rotary_dim / 2]`` in float32,
            contiguous, with one angle for each pair of dimensions.
        """
        key = (first, count, device, paired)
        if key not in self._turns:
            angles = torch.arange(first, first - count, -1, device=device)
            turns = self.on(device).cos_sin(angles)
            if paired:
                one_of_each = slice(None, None, 2) if self.rotary.interleaved else slice(self.rotary.rotary_dim // 2)
                cos, sin = (x[:, one_of_each].float().contiguous() for x in turns)
                turns = cos, sin
            while len(self._turns) > 2:  # a block needs three at most: each part that it is cut into has its own
                del self._turns[next(iter(self._turns))]
            self._turns[key] = turns
        return self._turns[key]


class MovingSinks:
    """The sinks in the rings of several layers, turned to their distance from the query several steps at a time.

    Valid for as long as no ring or first copy is replaced.

    Args:
        layers: each a :class:`~streaming_llm.cache_layer.StreamingLayer`; their sinks rotate and lie alike.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.rotation, self.layout = layers[0].rotation, layers[0].layout
        span, n_sink = self.rotation.rotary.span, self.layout.config.n_sink
        turned = torch.stack([layer.sinks[..., span] for layer in layers])
        with torch.inference_mode(False):
            self._slots = [layer.keys[:, :, :n_sink, span] for layer in layers]
        self._dtype = turned.dtype
        self._max_ahead = max(1, min(MAX_POSITIONS_AHEAD, MAX_BYTES_AHEAD // max(1, turned.nbytes)))
        self._turned = turned.to(compute_dtype(turned.dtype))
        self._quarter = self.rotation.rotary.quarter_turn(self._turned)
        self._ahead: list[tuple[Tensor, ...]] = []  # for each position from `_start` on, for each layer
        self._start: tuple[int, ...] = ()
        self._valid_for: tuple[Any, ...] = ()

    def move(self, progress: Progress) -> None:
        """Bring every sink to its distance from the token that comes next in its row."""
        ahead = progress.seen[0] - self._start[0] if self._start else -1
        of_now = (progress.offset, self.rotation.exact_angles)
        fits = 0 <= ahead < len(self._ahead) and of_now == self._valid_for
        if not fits or progress.seen != tuple(n + ahead for n in self._start):
            self._work_out(progress)
            self._start, self._valid_for, ahead = progress.seen, of_now, 0
        for slots, moved in zip(self._slots, self._ahead[ahead], strict=True):
            slots.copy_(moved)

    def _work_out(self, progress: Progress) -> None:
        """Move the sinks to the next token and to more and more after it: a beam search starts anew each step."""
        device, count = self._turned.device, min(self._max_ahead, max(1, 2 * len(self._ahead)))
        ahead = torch.arange(count, device=device)[:, None]
        if progress.together:  # numbers of the host, which wait for nothing
            tokens, queries = ahead + progress.seen[0], ahead + progress.position
        else:
            seen, offsets = (torch.tensor(rows, device=device) for rows in (progress.seen, progress.offset))
            tokens, queries = ahead + seen, ahead + (seen + offsets)
        turns = self.rotation.cos_sin(queries, tokens - self.layout.config.cache_size)  # [count, rows or 1, dim]
        cos, sin = (x.to(self._turned.dtype)[:, None, :, None, None] for x in turns)
        moved = torch.addcmul(self._turned * cos, self._quarter, sin).to(self._dtype)
        self._ahead = [of_position.unbind() for of_position in moved.unbind()]


def moving_sinks(layers: Iterable[Any]) -> list[MovingSinks]:
    """The sinks of layers, those together that rotate and lie alike."""
    alike: dict[tuple[Any, ...], list[Any]] = {}
    for layer in layers:
        key = (id(layer.rotation), layer.layout, layer.sinks.shape, layer.sinks.dtype, layer.sinks.device)
        alike.setdefault(key, []).append(layer)
    return [MovingSinks(group) for group in alike.values()]


def sink_rotations(rotaries: Iterable[Rotary]) -> list[SinkRotation]:
    """One for each layer; layers with the same :class:`Rotary` object share theirs."""
    shared: dict[int, SinkRotation] = {}
    return [shared.setdefault(id(rotary), SinkRotation(rotary)) for rotary in rotaries]
