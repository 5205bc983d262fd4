"""Which tokens survive and where they lie: integers only, no tensors.

Tokens of a stream are numbered from 0. Token ``t`` attends to itself, to the sinks ``0 .. S-1`` and to the
``W`` tokens before it. A cache therefore holds ``S + W + 1`` slots: the sinks at the front, and behind them a
ring in which token ``t >= S`` lies at slot ``S + (t - S) mod (W + 1)`` and overwrites token ``t - W - 1``, the
one that has just left the window. Until the ring turns for the first time, slot and token number are equal.
"""

from __future__ import annotations

from dataclasses import dataclass

from .config import StreamingConfig


@dataclass(frozen=True)
class Segment:
    """A run of consecutive tokens that lies in consecutive slots."""

    token: int
    slot: int
    length: int


@dataclass(frozen=True)
class StreamLayout:
    """Slots of one stream configuration."""

    config: StreamingConfig

    @property
    def capacity(self) -> int:
        """Slots in all: the sinks, the window and the current token."""
        return self.config.cache_size + 1

    def slot(self, token: int) -> int:
        """The slot in which ``token`` is stored."""
        n_sink = self.config.n_sink
        return token if token < n_sink else n_sink + (token - n_sink) % (self.config.window_size + 1)

    def kept(self, n_seen: int) -> int:
        """Tokens that the next one attends to, besides itself, when ``n_seen`` have been seen."""
        return min(n_seen, self.config.cache_size)

    def survivors(self, start: int, end: int) -> list[range]:
        """Those of the tokens ``start .. end - 1`` that are still stored after token ``end - 1``.

        At most two ranges: sinks, then ring.
        """
        n_sink = self.config.n_sink
        first_in_ring = max(start, n_sink, end - self.config.window_size - 1)
        ranges = [range(start, min(end, n_sink)), range(first_in_ring, end)]
        return [tokens for tokens in ranges if len(tokens)]

    def segments(self, tokens: range) -> list[Segment]:
        """``tokens`` (stored ones, consecutive) as runs of consecutive slots, in token order; at most three."""
        runs: list[Segment] = []
        token = tokens.start
        while token < tokens.stop:
            slot = self.slot(token)
            region_end = self.config.n_sink if token < self.config.n_sink else self.capacity
            length = min(tokens.stop - token, region_end - slot)
            runs.append(Segment(token, slot, length))
            token += length
        return runs
