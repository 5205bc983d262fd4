"""Pieces of work whose outcome is kept: an experiment is made of them, and goes on where it stopped."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

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

    @cached_property
    def key(self) -> str:
        """The same for pieces that are the same."""
        return hash_of(self.config)


class Experiment(ABC):
    """A table or figure of the paper; `reference` says where it is there."""

    name: str
    title: str
    reference: str

    def why_not(self, setting) -> str | None:
        """Why it cannot be had of a model; None if it can."""
        return None

    @abstractmethod
    def pieces(self, setting) -> list[Piece]:
        """What has to be computed, in order."""

    @abstractmethod
    def result(self, setting, found: dict[str, Found]) -> dict:
        """What the result file says, from what the pieces found."""
