"""Which cells there are, and in which order their runs come: every contender once before any runs again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from decode_benchmark.contenders import CONTENDERS

DECODE, PREFILL = "decode", "prefill"


@dataclass(frozen=True)
class Cell:
    """One contender under one set of conditions. `length`: tokens of the prompt; sizes in tokens.

    `backend` is what computes the attention: an SDPA backend, or the contender's own kernel.
    """

    kind: str  # DECODE | PREFILL
    model: str
    cache_size: int
    n_sink: int
    batch_size: int
    length: int
    contender: str
    backend: str

    def __str__(self) -> str:
        what = f"cache {self.cache_size}" if self.kind == DECODE else f"prefill {self.length}"
        return f"{self.model} | {what} | batch {self.batch_size} | {self.contender} ({self.backend})"

    @property
    def key(self) -> dict:
        """The cell as JSON values."""
        return asdict(self)

    @property
    def window_size(self) -> int:
        return self.cache_size - self.n_sink

    @property
    def conditions(self) -> tuple:
        """What cells that are compared with each other share."""
        return self.kind, self.model, self.cache_size, self.n_sink, self.batch_size, self.length


@dataclass(frozen=True)
class Plan:
    """What a command line asks for."""

    cache_sizes: tuple[int, ...]
    prefill_lengths: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    contenders: tuple[str, ...]
    backends: tuple[str, ...]
    n_sink: int

    def groups(self, model: str) -> list[list[Cell]]:
        """Cells that are measured in turns: one list for each set of conditions."""
        groups = []
        for batch_size in self.batch_sizes:
            for cache_size in self.cache_sizes:
                groups.append(self._group(DECODE, model, cache_size, batch_size, cache_size))
            for length in self.prefill_lengths:
                groups.append(self._group(PREFILL, model, self.cache_sizes[0], batch_size, length))
        return [group for group in groups if group]

    def _group(self, kind: str, model: str, cache_size: int, batch_size: int, length: int) -> list[Cell]:
        conditions = (kind, model, cache_size, self.n_sink, batch_size, length)
        return [
            Cell(*conditions, name, backend)
            for name in self.contenders
            if kind == DECODE or CONTENDERS[name].prefills
            for backend in backends_of(name, self.backends)
        ]


def backends_of(contender: str, backends: Sequence[str]) -> tuple[str, ...]:
    """What computes a contender's attention, in turn."""
    own = CONTENDERS[contender].attention
    return (own,) if own else tuple(backends)


def in_turns(group: Sequence[Cell], repeats: int) -> Iterator[tuple[int, Cell]]:
    """The runs of a group: (repeat, cell)."""
    for repeat in range(repeats):
        for cell in group:
            yield repeat, cell
