"""What moves with the query: the angles of the sinks, and the plan of a block of queries, each of its own window."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .positions import StreamLayout
from .rope_utils import Rotary


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
    """Cosine and sine for the sinks of all layers that rotate alike, computed once a step for each device.

    Attributes:
        rotary: the model's rotation.
        exact_angles: whether the model's angles are exact in the forward at hand. If not, they are float32 products
            of position and frequency, and the sinks follow the angle that the query really has.
    """

    def __init__(self, rotary: Rotary) -> None:
        self.rotary = rotary
        self.exact_angles = False
        self._on_device: dict[torch.device, Rotary] = {}
        self._last: dict[tuple[torch.device, torch.dtype], tuple[tuple[int, int, bool], Tensor, Tensor]] = {}
        self._turns: dict[tuple[int, int, torch.device, bool], tuple[Tensor, Tensor]] = {}

    def on(self, device: torch.device) -> Rotary:
        """The rotation with its frequencies on ``device``."""
        if device not in self._on_device:
            self._on_device[device] = self.rotary.to(device)
        return self._on_device[device]

    def cos_sin(self, query: int, anchor: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine, each ``[rotary_dim]``, of the turn from position ``anchor`` to position ``query``."""
        last, key = self._last.get((device, dtype)), (query, anchor, self.exact_angles)
        if last is None or last[0] != key:
            rotary = self.on(device)
            if self.exact_angles:
                angles = rotary.inv_freq * (query - anchor)
            else:
                angles = (rotary.inv_freq.float() * query).double() - rotary.inv_freq * anchor
            cos, sin = rotary.cos_sin_of(angles)
            last = self._last[device, dtype] = (key, cos.to(dtype), sin.to(dtype))
        return last[1], last[2]

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
            while len(self._turns) > 1:  # a block needs two at most: the queries that see the one before, and the rest
                del self._turns[next(iter(self._turns))]
            self._turns[key] = turns
        return self._turns[key]


def sink_rotations(rotaries: Iterable[Rotary]) -> list[SinkRotation]:
    """One for each layer; layers with the same :class:`Rotary` object share theirs."""
    shared: dict[int, SinkRotation] = {}
    return [shared.setdefault(id(rotary), SinkRotation(rotary)) for rotary in rotaries]
