"""Pieces of work whose outcome is kept: an experiment is made of them, and goes on where it stopped."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from experiments.kept import Found
from experiments.storage import hash_of

PIECES = ".pieces"


@dataclass(frozen=True)
class Piece:
    """One computation. Pieces of equal `config` are the same; `name` tells it from others of its experiment.

    `config`: JSON values that could change what is found, beside what is common to a model's pieces. `kind`: pieces
    of one kind take about equally long for each of their `tokens`.
    """

    name: str
    config: dict
    compute: Callable[[], Found]
    kind: tuple[str, ...]
    tokens: int

    @property
    def stem(self) -> str:
        """Names its record."""
        return "".join(c if c.isalnum() or c in "-." else "_" for c in "-".join(self.kind[1:]))


class Experiment(Protocol):
    """A table or figure of the paper."""

    name: str
    title: str
    reference: str  # where it is in the paper

    def why_not(self, paper) -> str | None:
        """Why it cannot be had of a model; None if it can."""

    def pieces(self, paper) -> list[Piece]:
        """What has to be computed, in order."""

    def result(self, paper, found: dict[str, Found]) -> dict:
        """What the result file says, from what the pieces found."""


def distinct(pieces: Iterable[Piece]) -> list[Piece]:
    """Pieces without those whose configuration came before."""
    return list({hash_of(piece.config): piece for piece in reversed(list(pieces))}.values())[::-1]
