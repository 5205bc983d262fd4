"""What moves with the query: the sinks, their angles, and the plan of a block of queries, each of its own window."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .positions import StreamLayout
from .rope_utils import Rotary, compute_dtype

MAX_POSITIONS_AHEAD = 64
MAX_BYTES_AHEAD = 1 << 20
"""Sinks are moved for so many of the coming positions at a time, where they are small enough."""


@dataclass
class BlockPlan:
    """What attention over several new tokens needs to know beside queries, keys and values.

    Travels on the key tensor that ``StreamingLayer.update`` returns, as its attribute ``streaming_plan``.

    Args:
        layout: the stream's layout.
        rotation: the turns of the stream's sinks.
        first_key: token number of the first key; keys and values are consecutive tokens from there on, first those
            of ``previous``, then those that ``update`` returned.
        first_query: token number of the first query.
        sink_keys, sink_values: ``[batch, num_kv_heads, n_sink, head_dim]``, the keys as first rotated; ``None``
            where no query is far enough into the stream to see a sink at other than its true distance.
        previous: keys and values ``[batch, num_kv_heads, n, head_dim]`` of tokens before what ``update`` returned;
            empty where that returned all of them.
        consumed: set by the attention function, so that a plan that nobody reads is noticed.
    """

    layout: StreamLayout
    rotation: SinkRotation
    first_key: int
    first_query: int
    sink_keys: Tensor | None
    sink_values: Tensor | None
    previous: tuple[Tensor, ...] = ()
    consumed: bool = False


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

    def cos_sin(self, queries: Tensor, anchor: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine ``[n, rotary_dim]``, float64, of turns from position ``anchor`` to ``queries`` ``[n]``."""
        rotary = self.on(queries.device)
        if self.exact_angles:
            return rotary.cos_sin(queries - anchor)
        angles = (rotary.inv_freq.float() * queries.float().unsqueeze(-1)).double() - rotary.inv_freq * anchor
        return rotary.cos_sin_of(angles)

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
                turns = tuple(x[:, one_of_each].float().contiguous() for x in turns)
            while len(self._turns) > 2:  # a block needs three at most: each part that it is cut into has its own
                del self._turns[next(iter(self._turns))]
            self._turns[key] = turns
        return self._turns[key]


class MovingSinks:
    """The sinks of layers that rotate alike and lie alike, moved together: for all layers, and several steps, at once.

    Args:
        rotation: of these layers.
        first: for each layer its sinks as first rotated, ``[batch, num_kv_heads, n_sink, head_dim]``, all of one
            shape, dtype and device.
    """

    def __init__(self, rotation: SinkRotation, first: Sequence[Tensor]) -> None:
        self.rotation, rotary = rotation, rotation.rotary
        turned = torch.stack([keys[..., : rotary.rotary_dim] for keys in first])
        self.dtype = turned.dtype
        self._max_ahead = max(1, min(MAX_POSITIONS_AHEAD, MAX_BYTES_AHEAD // max(1, turned.nbytes)))
        self._turned = turned.to(compute_dtype(turned.dtype))
        self._quarter = rotary.quarter_turn(self._turned)
        self._ahead: list[tuple[Tensor, ...]] = []  # for positions from `_start` on, for each layer
        self._start, self._turn = 0, (0, False)

    def at(self, query: int, anchor: int) -> tuple[Tensor, ...]:
        """For each layer ``[batch, num_kv_heads, n_sink, rotary_dim]``: the sinks turned from ``anchor`` to ``query``.

        Worked out in float32 or better; given in the dtype of ``first``.
        """
        turn = (anchor, self.rotation.exact_angles)
        if turn != self._turn or not self._start <= query < self._start + len(self._ahead):
            self._work_out(query, anchor)
            self._start, self._turn = query, turn
        return self._ahead[query - self._start]

    def _work_out(self, query: int, anchor: int) -> None:
        """Move the sinks to ``query`` and to more and more positions after it: a beam search starts anew each step."""
        count = min(self._max_ahead, max(1, 2 * len(self._ahead)))
        positions = torch.arange(query, query + count, device=self._turned.device)
        turns = self.rotation.cos_sin(positions, anchor)
        cos, sin = (x.to(self._turned.dtype).view(count, 1, 1, 1, 1, -1) for x in turns)
        moved = torch.addcmul(self._turned * cos, self._quarter, sin).to(self.dtype)
        self._ahead = [of_position.unbind() for of_position in moved.unbind()]


def sink_rotations(rotaries: Iterable[Rotary]) -> list[SinkRotation]:
    """One for each layer; layers with the same :class:`Rotary` object share theirs."""
    shared: dict[int, SinkRotation] = {}
    return [shared.setdefault(id(rotary), SinkRotation(rotary)) for rotary in rotaries]
