"""A folder of result files -> one tidy table: a row for each cell of the evaluation and each setting of an ablation.

Columns that say which cell it is: ``CELL``; ``ablation`` is empty (and ``setting`` 0) but for ablations, ``stated``
says whether the file names its backend, ``mode`` is one of older files. Then ``label``, the figures (a column per
key of the result files, NaN where there is none, with the range of raw runs in ``<key>_low`` and ``<key>_high``), the
conditions, and ``status``: ``ok``, ``skipped``, ``failed``, or ``absent`` for a cell that no file holds although the
rest of its product (methods x backends x data sets) is there. ``why_missing`` says why a figure is NaN.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from .files import ALIASES, CONDITIONS, SIZES, FormatError, read_json, read_losses
from .style import BACKENDS, METHODS, MODE_LABELS, series_label

SUBFOLDERS = ("fixed_eval", "final")
SERIES = ["method", "backend", "stated", "mode"]
CELL = ["ablation", "setting", "dataset", *SERIES]
FIGURES = list(ALIASES)
REFERENCE_BACKEND = "math"
_COLUMNS = [*CELL, "repeat", *FIGURES, *CONDITIONS, *SIZES, "evicts", "environment"]
_COLUMNS += ["status", "reason", "reasons", "source"]


@dataclass(frozen=True)
class Results:
    """Everything that a folder of result files holds."""

    root: Path
    table: pd.DataFrame
    losses: tuple[dict, ...] = ()  # see files.read_losses
    problems: tuple[tuple[Path, str], ...] = ()  # files that could not be used
    notices: tuple[str, ...] = ()
    num_files: int = 0  # recognised result files

    @property
    def cells(self) -> pd.DataFrame:
        """The evaluation's part of the table, without the ablations."""
        return self.table[self.table["ablation"] == ""]


def find_roots(top: Path, max_depth: int = 3) -> list[Path]:
    """All result roots at and below ``top`` (``results``, ``results/cpu``, ``results/cpu/pythia-70m``, ...).

    Hidden folders (a run's cells) and ``superseded`` ones are left out.
    """
    found = [top] if any((top / name).is_dir() for name in SUBFOLDERS) else []
    if max_depth > 0 and top.is_dir():
        for folder in sorted(p for p in top.iterdir() if p.is_dir()):
            if folder.name[0] not in "._" and folder.name not in (*SUBFOLDERS, "superseded"):
                found += find_roots(folder, max_depth - 1)
    return found


def read_results(root: Path) -> Results:
    """Read all result files of a root: of its ``fixed_eval/`` and ``final/``, or else of ``root`` itself.

    Raises:
        FileNotFoundError: The folder does not exist.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no such folder: {root}")
    folders = [root / name for name in SUBFOLDERS if (root / name).is_dir()] or [root]
    paths = [p for folder in folders for p in sorted(folder.iterdir()) if p.is_file() and p.name[0] != "."]
    rows, losses, problems, num_files = [], [], [], 0
    for path in paths:
        try:
            if path.name.endswith(".nll.npz"):
                losses.append(read_losses(path))
            elif path.name.endswith(".json"):
                rows += [row | {"source": path} for row in read_json(path)]
            else:
                continue
            num_files += 1
        except FormatError as error:
            problems.append((path, str(error)))
    # The backend in a main file's field goes before its name's suffix, for the losses beside it too.
    mains = {(row["source"].stem, row["method"]): row for row in rows if row["rank"] == 1}
    for loss in losses:
        loss |= {key: row[key] for row in [mains.get((loss["main"], loss["method"]), loss)] for key in SERIES}
        loss["label"] = _label(loss)
    losses.sort(key=_order)
    rows, notices = _one_per_cell(rows)
    return Results(root, build_table(rows), tuple(losses), tuple(problems), tuple(notices), num_files)


def build_table(rows: Sequence[dict]) -> pd.DataFrame:
    """The rows of files (see ``files.read_json``), each cell in one file only, as the table."""
    rows = sorted([*rows, *_absent(rows)], key=_order)
    samples = pd.DataFrame(rows, columns=_COLUMNS).astype(dict.fromkeys(FIGURES, float))
    _derive(samples)
    _compare(samples)
    cells = samples[samples["repeat"] == 0].set_index(CELL)
    runs = samples[samples["repeat"] > 0].groupby(CELL)[FIGURES]
    several = runs.count() > 1
    low, high = (spread.where(several).reindex(cells.index) for spread in (runs.min(), runs.max()))
    low, high = np.minimum(low, cells[FIGURES]), np.maximum(high, cells[FIGURES])
    cells["repeats"] = runs.size().reindex(cells.index).fillna(1).clip(lower=1)
    cells = cells.join(low.add_suffix("_low")).join(high.add_suffix("_high")).reset_index()
    cells["label"] = [_label(row) for row in cells[SERIES].to_dict("records")]
    return cells.drop(columns="repeat")


def why_missing(row: object, key: str) -> str:
    """Why a row of the table (as ``itertuples`` gives it) has no ``key``."""
    if row.status == "ok":
        return row.reasons.get(key, "not in the file")
    return f"{row.status}: {row.reason}" if row.reason and row.status != "absent" else row.reason or row.status


def series_of(rows: pd.DataFrame) -> list:
    """One row for each method and backend among rows of the table, in drawing order, as ``itertuples`` gives them."""
    series = rows[["label", *SERIES]].drop_duplicates("label").itertuples()
    return sorted(series, key=lambda row: _order({**row._asdict(), "dataset": ""}))


def backends_of_each(series: Sequence) -> int:
    """How many backends every method among ``series`` has; 0 where they do not all have the same."""
    backends, methods = {row.backend for row in series}, {(row.method, row.stated, row.mode) for row in series}
    return len(backends) if len(series) == len(backends) * len(methods) else 0


def _label(row: dict) -> str:
    return series_label(row["method"], row["backend"] if row["stated"] else None, row["mode"])


def _order(row: dict) -> tuple:
    """Method by method as in ``style.METHODS``, backends side by side."""
    where = row.get("ablation", ""), row["dataset"], list(METHODS).index(row["method"]), not row["stated"]
    modes = ["", *MODE_LABELS]
    last = list(BACKENDS).index(row["backend"]), modes.index(row["mode"]), row.get("setting", 0), row.get("repeat", 0)
    return (*where, *last)


def _one_per_cell(rows: Sequence[dict]) -> tuple[list[dict], list[str]]:
    """Of several files of one cell, that of the lowest rank (its own, before a main file); differences are named."""
    chosen: dict[tuple, dict] = {}
    for row in sorted((row for row in rows if row["repeat"] == 0), key=lambda row: row["rank"]):
        chosen.setdefault(tuple(row[key] for key in CELL), row)
    kept, notices = [], []
    for row in rows:
        first = chosen[tuple(row[key] for key in CELL)]
        if (row["source"], row["rank"]) == (first["source"], first["rank"]):
            kept.append(row)
        elif row["repeat"] == 0:
            keys = {"perplexity", "runtime_sec", "prefill_sec"} & row.keys() & first.keys()
            if any(row[key] != first[key] for key in keys):
                which = f"{row['dataset']}, {_label(row)}"
                notices.append(f"{which}: {first['source']} is drawn; {row['source']} holds other figures for it")
    return kept, notices


def _absent(rows: Sequence[dict]) -> Iterator[dict]:
    """The cells that are missing from the product of an evaluation's (or an ablation's) methods, backends, ...."""
    groups: dict[tuple, set] = {}
    for row in rows:
        text = row["dataset"] if row["ablation"] else ""  # ablations of two texts need not have the same settings
        group = groups.setdefault((row["ablation"], text, row["stated"], row["mode"]), set())
        group.add((row["setting"], row["dataset"], row["method"], row["backend"]))
    for (ablation, _, stated, mode), have in groups.items():
        for setting, dataset, method, backend in set(product(*map(set, zip(*have, strict=True)))) - have:
            cell = {"setting": setting, "dataset": dataset, "method": method, "backend": backend}
            cell |= {"ablation": ablation, "stated": stated, "mode": mode, "repeat": 0}
            yield cell | {"status": "absent", "reason": "no result", "reasons": {}, "evicts": True}


def _derive(samples: pd.DataFrame) -> None:
    """Add the figures that follow from a row's own by definition, where its file leaves them out."""
    s = samples
    s["ttft_sec"] = s["ttft_sec"].fillna(s["prefill_sec"] + s["first_token_latency_sec"])
    s["decode_sec"] = s["decode_sec"].fillna(s["runtime_sec"] - s["prefill_sec"])
    seconds, tokens = (s[key].where(s[key] > 0) for key in ("decode_sec", "decode_tokens"))
    s["tpot_ms"] = s["tpot_ms"].fillna(1e3 * seconds / tokens)
    s["decode_toks_per_sec"] = s["decode_toks_per_sec"].fillna(tokens / seconds)


def _compare(samples: pd.DataFrame) -> None:
    """Add the figures that compare two cells, where files leave them out; raw run i is compared with raw run i.

    ``speedup`` and ``ppl_increase_percent``: with the baseline of the same data set, backend, mode and decode engine,
    never another's. ``math_over_prefill`` and ``math_over_decode``: with the same method on the math kernel.
    """
    on = ["ablation", "setting", "dataset", "stated", "mode", "repeat"]
    baseline, math = samples["method"] == "baseline", samples["backend"] == REFERENCE_BACKEND
    for key, source in (("speedup", "runtime_sec"), ("ppl_increase_percent", "perplexity")):
        any_engine = _partner(samples, baseline, [*on, "backend"], source)
        base = _partner(samples, baseline, [*on, "backend", "engine"], source)
        own = samples[source].where(samples[source] > 0)
        ratio = base / own if key == "speedup" else 100 * (own / base - 1)
        samples[key] = samples[key].fillna(ratio.where(base > 0))
        no_base = ["no baseline with the same backend", "the baseline ran on another decode engine"]
        _explain(samples, key, source, np.select([any_engine.isna(), base.isna()], no_base, ""))
    compared = samples["stated"].astype(bool) & ~math
    for phase, sources in (("prefill", ["prefill_sec"]), ("decode", ["tpot_ms", "decode_sec"])):
        key = f"math_over_{phase}"
        for source in sources:
            base = _partner(samples, math, [*on, "method"], source)
            ratio = (base / samples[source]).where(compared & (base > 0) & (samples[source] > 0))
            samples[key] = samples[key].fillna(ratio)
        _explain(samples, key, sources[0], np.where(base.isna(), f"no time with {REFERENCE_BACKEND}", ""))


def _partner(samples: pd.DataFrame, among: pd.Series, on: list[str], key: str) -> pd.Series:
    """For each row the figure of that row ``among`` these which agrees with it in ``on``; else NaN."""
    partners = samples.loc[among, [*on, key]].drop_duplicates(on)
    return samples[on].merge(partners, on=on, how="left")[key].set_axis(samples.index)


def _explain(samples: pd.DataFrame, key: str, source: str, why: np.ndarray) -> None:
    """Say why ``key``, which is made from ``source``, is absent, where the file itself does not."""
    for reasons, value, text in zip(samples["reasons"], samples[source], why, strict=True):
        own = reasons.get(source, "not in the file") if np.isnan(value) else f"{source} is not positive"
        reasons.setdefault(key, text or own)
