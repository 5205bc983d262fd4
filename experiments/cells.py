"""Finished cells, kept: nothing that is finished is ever run again.

A cell's record is written when it is finished, atomically, under a name that holds a hash of everything that could
change its figures; a record with another hash is never used.
"""

import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np

from experiments.measuring import Outcome
from experiments.plan import Cell
from experiments.storage import hash_of, now, read_json, set_aside, write_json, write_npz

CELL_SCHEMA = 2


class CellStore:
    """The finished cells of one model, as files in one folder; without a folder nothing is kept."""

    def __init__(self, folder: Path | None):
        self.folder = folder

    def path(self, cell: Cell, config_hash: str) -> Path:
        """Where the cell's record is, or would be."""
        sizes = f"s{cell.n_sink}w{cell.window_size}n{cell.tokens}"
        name = f"{cell.dataset}_{cell.backend}_{cell.method}_{cell.engine}_{sizes}_{cell.scoring}_r{cell.repeat}"
        return self.folder / f"{name}_{config_hash[:16]}.json"

    def save(self, outcome: Outcome, config: dict) -> None:
        """Keep a finished cell; `config` is its hash's preimage. Its losses are written first: a record that is there
        is complete."""
        if self.folder is None:
            return
        config_hash = hash_of(config)
        path = self.path(outcome.cell, config_hash)
        write_npz(path.with_suffix(".npz"), nll=outcome.nll, position=outcome.position)
        value = {"cell_schema": CELL_SCHEMA, "cell": asdict(outcome.cell), "config_hash": config_hash}
        value |= {"config": config, "run": outcome.run, "wall_sec": outcome.wall_sec, "timestamp": now()}
        write_json(path, value)

    def load(self, cell: Cell, config_hash: str) -> dict | None:
        """The run of a finished cell, or None; raises ValueError where its file is broken or another's."""
        if self.folder is None:
            return None
        path = self.path(cell, config_hash)
        try:
            value = read_json(path)
        except FileNotFoundError:
            return None
        if value.get("cell_schema") != CELL_SCHEMA or value.get("config_hash") != config_hash:
            raise ValueError("not the record of this cell")
        if value.get("cell") != asdict(cell) or not isinstance(value.get("run"), dict):
            raise ValueError("not the record of this cell")
        try:
            self.load_losses(cell, config_hash)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"its losses cannot be read ({error})") from None
        return value["run"]

    def load_losses(self, cell: Cell, config_hash: str) -> tuple[np.ndarray, np.ndarray]:
        """The cell's losses in nats and the positions of their tokens."""
        with np.load(self.path(cell, config_hash).with_suffix(".npz"), allow_pickle=False) as arrays:
            return arrays["nll"], arrays["position"]

    def set_aside(self, cell: Cell, config_hash: str) -> Path:
        """Move a broken record out of the way; returns where it is now."""
        return set_aside(self.path(cell, config_hash), "unreadable")

    def earlier_times(self) -> dict[tuple[str, ...], list[float]]:
        """Seconds per token of all finished cells, whatever their configuration, by kind: for estimates only."""
        times: dict[tuple[str, ...], list[float]] = {}
        for path in sorted(self.folder.glob("*.json")) if self.folder is not None and self.folder.is_dir() else ():
            try:
                value = read_json(path)
                cell = Cell(**value["cell"])
                times.setdefault(cell.kind, []).append(float(value["wall_sec"]) / cell.tokens)
            except (ValueError, KeyError, TypeError):  # named where it would be used
                continue
        return times
