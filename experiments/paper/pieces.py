"""Pieces of work whose outcome is kept: an experiment is made of them, and goes on where it stopped."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from experiments.measuring import describe, free_memory
from experiments.storage import hash_of, now, read_json, set_aside, write_json, write_npz

PIECES = ".pieces"
_SCHEMA = 1


@dataclass(frozen=True)
class Found:
    """What a piece found: JSON values, and arrays."""

    values: dict
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


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


class PieceStore:
    """Finished pieces of one model, as files in one folder, under names that hold a hash of their conditions."""

    def __init__(self, folder: Path, common: dict):
        self.folder, self.common = folder, common

    def path(self, piece: Piece) -> Path:
        """Where a piece is kept, or would be."""
        name = "".join(c if c.isalnum() or c in "-." else "_" for c in "-".join(piece.kind[1:]))
        return self.folder / f"{name}_{hash_of(self.common | piece.config)[:16]}.json"

    def load(self, piece: Piece, say: Callable[[str], None], move_broken: bool = True) -> Found | None:
        """What a finished piece found; None where it is not finished. A broken file is named, and moved away."""
        path = self.path(piece)
        if not path.exists():
            return None
        try:
            value = read_json(path)
            if value.get("piece_schema") != _SCHEMA or value.get("config") != self.common | piece.config:
                raise ValueError("not the record of this piece")
            with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
                return Found(value["found"], dict(arrays))
        except (ValueError, KeyError, OSError, EOFError) as error:
            where = f"; it is kept as {set_aside(path, 'unreadable')}" if move_broken else ""
            say(f"broken: {path} ({error}){where}; it counts as missing")
            return None

    def save(self, piece: Piece, found: Found, wall_sec: float) -> None:
        """Keep a finished piece; its arrays are written first."""
        path = self.path(piece)
        write_npz(path.with_suffix(".npz"), **found.arrays)
        value = {"piece_schema": _SCHEMA, "config": self.common | piece.config, "found": found.values}
        value |= {"kind": list(piece.kind), "tokens": piece.tokens, "wall_sec": wall_sec, "timestamp": now()}
        write_json(path, value)

    def earlier_times(self) -> dict[tuple[str, ...], list[float]]:
        """Seconds per token of finished pieces, by kind: for estimates."""
        times: dict[tuple[str, ...], list[float]] = {}
        for path in sorted(self.folder.glob("*.json")):
            try:
                value = read_json(path)
                times.setdefault(tuple(value["kind"]), []).append(value["wall_sec"] / value["tokens"])
            except (ValueError, KeyError, TypeError, ZeroDivisionError):
                continue
        return times


def attempt(piece: Piece) -> tuple[Found | None, str]:
    """What a piece finds, or why it finds nothing: whatever goes wrong concerns this piece, and the others go on."""
    try:
        return piece.compute(), ""
    except Exception as error:
        reason = describe(error)
    free_memory()
    return None, reason


def distinct(pieces: Iterable[Piece]) -> list[Piece]:
    """Pieces without those whose configuration came before."""
    return list({hash_of(piece.config): piece for piece in reversed(list(pieces))}.values())[::-1]
