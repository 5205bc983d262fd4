"""What the attention of one layer has to know of a forward, beside queries, keys and values.

The cache makes a plan when it stores a layer's new tokens, and the layer's attention takes it. There is one for every
layer of every forward with a streaming cache, so that one that got lost is noticed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..positions import StreamLayout
from ..sinks import SinkRotation


@dataclass(frozen=True)
class StepPlan:
    """One new token for each row, which attends to every key that is given.

    Args:
        lengths: keys that each row attends to, the first ones; ``None``: all rows attend to all of them.
    """

    lengths: tuple[int, ...] | None = None


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
    """

    layout: StreamLayout
    first_key: int
    first_query: int
    rotation: SinkRotation | None = None
    sinks: tuple[Tensor, ...] = ()
    previous: tuple[Tensor, ...] = ()


Plan = StepPlan | BlockPlan


class ForwardAtHand:
    """What the attention layers of an attached model see of the forward that is running: its cache.

    Attributes:
        cache: the streaming cache of the forward, which has ``take_plan(layer_idx) -> Plan``; ``None`` in a forward
            without one.
    """

    def __init__(self) -> None:
        self.cache: Any = None

    def is_streaming(self) -> bool:
        """Whether the forward has a streaming cache."""
        return self.cache is not None
