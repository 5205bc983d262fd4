"""Finished work, kept: nothing that is finished is ever run again.

A record is written when a piece of work is finished, atomically, under a name that holds a hash of everything that
could change what was found; a record with another hash is never used.
"""

import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from experiments.progress import Times
from experiments.storage import hash_of, now, read_json, set_aside, write_json, write_npz

_SCHEMA = 3


@dataclass(frozen=True)
class Found:
    """What a piece of work found: JSON values, and arrays."""

    values: dict
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


class KeptWork:
    """The finished work of one model, as files in one folder; without a folder nothing is kept.

    A piece of work has a `stem`, which names its record, a number of `tokens`, and a `kind` (a tuple of strings):
    pieces of one kind take about equally long for each token.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder

    def path(self, work, config_hash: str) -> Path:
        """Where its record is, or would be."""
        return self.folder / f"{work.stem}_{config_hash[:16]}.json"

    def save(self, work, config: dict, found: Found, wall_sec: float) -> None:
        """Keep what was found; `config` is its hash's preimage. Arrays are written first: a record is complete."""
        if self.folder is None:
            return
        config_hash = hash_of(config)
        path = self.path(work, config_hash)
        write_npz(path.with_suffix(".npz"), **found.arrays)
        value = {"schema": _SCHEMA, "kind": work.kind, "tokens": work.tokens, "config_hash": config_hash}
        write_json(path, value | {"config": config, "found": found.values, "wall_sec": wall_sec, "timestamp": now()})

    def load(self, work, config_hash: str) -> Found | None:
        """What was found, or None; raises ValueError where a file is broken or another's."""
        if self.folder is None or not (path := self.path(work, config_hash)).exists():
            return None
        value = read_json(path)
        if (value.get("schema"), value.get("config_hash")) != (_SCHEMA, config_hash):
            raise ValueError("not the record of this piece of work")
        try:
            with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
                return Found(value["found"], dict(arrays))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"its arrays cannot be read ({error})") from None

    def find(self, work, config_hash: str, say: Callable[[str], None], move_broken: bool = True) -> Found | None:
        """As `load`; a broken record is named, and moved out of the way where that is allowed."""
        try:
            return self.load(work, config_hash)
        except ValueError as error:
            path = self.path(work, config_hash)
            where = f"; it is kept as {set_aside(path, 'unreadable')}" if move_broken else ""
            say(f"broken: {path} ({error}){where}; it counts as missing")
            return None

    def earlier_times(self) -> Times:
        """How long finished work took, whatever its configuration: for estimates only."""
        times: Times = {}
        for path in sorted(self.folder.glob("*.json")) if self.folder is not None else ():
            try:
                value = read_json(path)
                times.setdefault(tuple(value["kind"]), []).append(value["wall_sec"] / value["tokens"])
            except (ValueError, KeyError, TypeError, ZeroDivisionError):  # named where it would be used
                continue
        return times
