"""What the attention of one layer has to know of a forward, beside queries, keys and values.

The cache makes a plan when it stores a layer's new tokens, and the layer's attention takes it. There is one for every
layer of every forward with a streaming cache, so that one that got lost is noticed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..positions import StreamLayout
from ..sinks import SinkRotation


@dataclass(frozen=True)
class StepPlan:
    """One new token for each row, which attends to every key that is given.

    Args:
        lengths: keys that each row attends to, the first ones; ``None``: all rows attend to all of them.
        mask: of a step that is recorded, whose lengths only the device knows: see :func:`.math_kernel.mask_of_empty`.
    """

    lengths: tuple[int, ...] | None = None
    mask: Tensor | None = None


@dataclass(frozen=True)
class BlockPlan:
    """Several new tokens, each with a window of its own.

    Args:
        layout: which tokens the layer keeps.
        first_key: token number of the first key; keys and values are consecutive tokens from there on, first those
            of ``previous``, then those given to attention.
        first_query: token number of the first query.
        rotation: the turns of the sinks; ``None`` where there are none.
        sinks: keys as first rotated, and values, ``[batch, num_kv_heads, n_sink, head_dim]``; empty where no query is
            far enough into the stream to see a sink at other than its true distance.
        previous: keys and values ``[batch, num_kv_heads, n, head_dim]`` of tokens before those given to attention;
            empty where there are none.
        sinks_in_front: how many of the keys given to attention are those of the sinks as first rotated (where a model
            makes keys of what the cache holds).
    """

    layout: StreamLayout
    first_key: int
    first_query: int
    rotation: SinkRotation | None = None
    sinks: tuple[Tensor, ...] = ()
    previous: tuple[Tensor, ...] = ()
    sinks_in_front: int = 0

    def split(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, BlockPlan]:
        """Keys and values without the sinks in front, and the plan with them."""
        n = self.sinks_in_front
        if not n:
            return key, value, self
        return key[:, :, n:], value[:, :, n:], replace(self, sinks=(key[:, :, :n], value[:, :, :n]), sinks_in_front=0)

    def all_in_one(self, key: Tensor, value: Tensor, rotation: SinkRotation) -> tuple[Tensor, Tensor, BlockPlan]:
        """Sinks, earlier tokens and new ones one behind the other, and the plan for them: see ``sinks_in_front``.

        Args:
            rotation: of the keys that the model makes of these.
        """
        given = [pair for pair in (self.sinks, self.previous, (key, value)) if pair]
        n_sink = self.sinks[0].shape[2] if self.sinks else 0
        key, value = (torch.cat(parts, dim=2) for parts in zip(*given, strict=True))
        plan = BlockPlan(self.layout, self.first_key, self.first_query, rotation, sinks_in_front=n_sink)
        return key, value, plan


Plan = StepPlan | BlockPlan


@dataclass
class ForwardAtHand:
    """What the attention layers of an attached model see of the forward that is running: its cache.

    Attributes:
        cache: the streaming cache of the forward, which has ``take_plan(layer_idx) -> Plan``; ``None`` in a forward
            without one.
        positions: of its tokens in the stream, ``[batch or 1, q_len]``, where the model is given those in the cache.
    """

    cache: Any = None
    positions: Tensor | None = None
