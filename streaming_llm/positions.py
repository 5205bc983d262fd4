"""Which tokens survive, where they lie, and how far streams are: integers only, no tensors.

Tokens of a stream are numbered from 0. Token ``t`` attends to itself, to the sinks ``0 .. S-1`` and to the
``W`` tokens before it. A cache therefore holds ``S + W + 1`` slots: the sinks at the front, and behind them a
ring in which token ``t >= S`` lies at slot ``S + (t - S) mod (W + 1)`` and overwrites token ``t - W - 1``, the
one that has just left the window. Until the ring turns for the first time, slot and token number are equal.
"""

from __future__ import annotations

from collections.abc import Iterable
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

    @classmethod
    def of_window(cls, window: int) -> StreamLayout:
        """A sliding window of a model's own, the current token included: a stream's rule without sinks."""
        return cls(StreamingConfig(0, window - 1))

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

    def stored(self, n_seen: int) -> int:
        """Slots that hold a token when ``n_seen`` have been seen."""
        return min(n_seen, self.capacity)

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


class Progress:
    """How far the streams of a batch are: one object for all layers of a cache, changed in place.

    Attributes:
        seen: tokens fed, for each row; a single entry where all rows are equally far.
        offset: position of the first token, likewise.
        taken_back: tokens, at most, that a row was fed and is now without: their slots have been written, and what
            these held is gone.
        version: grows with every change, so that what was derived from an earlier state can be told.
    """

    def __init__(self) -> None:
        self.version = self.taken_back = 0
        self.set((0,), (0,))

    def set(self, seen: Iterable[int], offset: Iterable[int]) -> None:
        """Put the streams where they are said to be."""
        self.seen, self.offset = tuple(seen), tuple(offset)
        if len(set(zip(self.seen, self.offset, strict=True))) == 1:
            self.seen, self.offset = self.seen[:1], self.offset[:1]
        if not any(self.seen):
            self.taken_back = 0
        self.version += 1

    @property
    def together(self) -> bool:
        """Whether all rows are equally far."""
        return len(self.seen) == 1

    @property
    def n_seen(self) -> int:
        """Tokens that the longest of the streams has been fed."""
        return max(self.seen)

    @property
    def position(self) -> int:
        """Position of the next token of the stream that is furthest."""
        return max(map(sum, zip(self.seen, self.offset, strict=True)))

    def advance(self, n_tokens: int) -> None:
        """Every stream has been fed ``n_tokens`` more."""
        self.seen = tuple(n + n_tokens for n in self.seen)
        self.taken_back = max(0, self.taken_back - n_tokens)
        self.version += 1

    def take_back(self, n_tokens: Iterable[int]) -> None:
        """Each row has been fed so many tokens less."""
        n_tokens = list(n_tokens)
        rows = self.of_rows(len(n_tokens))
        self.taken_back += max(n_tokens)
        self.set((seen - n for (seen, _), n in zip(rows, n_tokens, strict=True)), (offset for _, offset in rows))

    def move(self, distance: int) -> None:
        """Every stream's position is shifted by ``distance``."""
        self.set(self.seen, (n + distance for n in self.offset))

    def of_rows(self, n_rows: int) -> list[tuple[int, int]]:
        """``(seen, offset)`` of each of ``n_rows`` rows."""
        rows = list(zip(self.seen, self.offset, strict=True))
        return rows * n_rows if self.together else rows

    def select(self, rows: Iterable[int], n_rows: int) -> None:
        """Keep these of the ``n_rows`` rows, in this order."""
        before = self.of_rows(n_rows)
        chosen = [before[row] for row in rows]
        self.set((seen for seen, _ in chosen), (offset for _, offset in chosen))
