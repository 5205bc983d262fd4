"""A folder of result files -> a ``ResultSet``.

The folder is the one that holds the files, or the root above ``final/`` and ``fixed_eval/``. Every JSON in it is
either understood, or named as a problem: broken (not JSON), or foreign (not a result file). What each kind of file
holds is in ``parsing.py``; here are the walk, and the choice where two files hold the same cell.
"""

import json
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from .names import FileName, parse_name
from .parsing import FormatError, parse_ablation, parse_main, parse_single
from .records import LossCurve, Problem, Record, ResultSet, Series, with_comparisons, with_derived
from .style import BACKENDS

SUBFOLDERS = ("fixed_eval", "final")


def result_folders(root: Path) -> list[Path]:
    """The folders whose files belong to ``root``: its ``fixed_eval/`` and ``final/``, or else ``root`` itself."""
    below = [root / name for name in SUBFOLDERS if (root / name).is_dir()]
    return below or [root]


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


def read_results(root: Path) -> ResultSet:
    """Read all result files of a root. Raises ``FileNotFoundError`` where the folder does not exist."""
    if not root.is_dir():
        raise FileNotFoundError(f"no such folder: {root}")
    paths = [p for folder in result_folders(root) for p in sorted(folder.iterdir()) if p.is_file()]
    cells: list[tuple[int, Record]] = []
    ablations, curves, problems, notices = [], [], [], []
    num_files = 0
    for path in paths:
        if path.name.startswith(".") or not path.name.endswith((".json", ".nll.npz")):
            continue
        name = parse_name(path.stem)
        try:
            if path.name.endswith(".nll.npz"):
                curves.append(_read_curve(path, name))
            elif (data := _load(path)) is not None:
                kind = name.kind if name else None
                if kind == "ablation":
                    ablations += parse_ablation(data, name, path)
                elif kind == "main":
                    cells += [(1, record) for record in parse_main(data, name, path)]
                else:
                    cells += parse_single(data, name, path)
            num_files += 1
        except FormatError as error:
            problems.append(Problem(path, str(error)))
    records = _one_per_cell(cells, notices)
    return ResultSet(
        root=root,
        records=with_comparisons(with_derived(record) for record in records),
        ablations=tuple(ablations),
        curves=_name_curves(curves, [record for rank, record in cells if rank == 1]),
        problems=tuple(problems),
        notices=tuple(notices),
        num_files=num_files,
    )


def _load(path: Path) -> dict:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # a JSON error and a decoding error are ValueErrors
        raise FormatError(f"broken: not JSON ({error})") from error
    except OSError as error:
        raise FormatError(f"cannot be read ({error.strerror})") from error
    if not isinstance(data, dict):
        raise FormatError(f"foreign: a result file is an object, not a {type(data).__name__}")
    return data


def _read_curve(path: Path, name: FileName | None) -> LossCurve:
    if name is None or name.kind != "nll":
        raise FormatError("foreign: not named <dataset>_main[_backend-<backend>].<method>.nll.npz")
    if name.backend is not None and name.backend not in BACKENDS:
        raise FormatError(f"unknown backend {name.backend!r}; known: {', '.join(BACKENDS)}")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            nll, position = arrays["nll"], arrays["position"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise FormatError(f"broken: not an .npz with nll and position ({error})") from error
    if nll.ndim != 1 or nll.shape != position.shape or nll.size == 0:
        raise FormatError(f"broken: nll {nll.shape} and position {position.shape} are not one vector each")
    if not np.isfinite(nll).all() or (np.diff(position) <= 0).any():
        raise FormatError("broken: losses are not finite, or positions do not grow")
    series = Series(name.method, name.backend or "math", name.backend is not None)
    return LossCurve(name.dataset, series, nll.astype(np.float64), position.astype(np.int64), path)


def _one_per_cell(cells: Iterable[tuple[int, Record]], notices: list[str]) -> list[Record]:
    """Of several records of one cell, the one from its own file, else the main file's; differences are named.

    Rank 0 is a method's own file, 1 a main file, 2 a block that an older file holds for comparison.
    """
    chosen: dict[tuple, tuple[int, Record]] = {}
    for rank, record in cells:
        key = (record.dataset, record.series)
        if key not in chosen or rank < chosen[key][0]:
            previous = chosen.get(key)
            chosen[key] = (rank, record)
        else:
            previous = (rank, record)
        if previous and _differ(previous[1], chosen[key][1]):
            notices.append(
                f"{record.dataset}, {record.series.label}: {chosen[key][1].source} is drawn; "
                f"{previous[1].source} holds other figures for it"
            )
    return [record for _, record in sorted(chosen.values(), key=lambda c: (c[1].dataset, c[1].series.order))]


def _differ(one: Record, other: Record) -> bool:
    keys = ("perplexity", "runtime_sec", "prefill_sec")
    return any(one.values.get(k) != other.values.get(k) for k in keys if k in one.values and k in other.values)


def _name_curves(curves: list[LossCurve], main_records: list[Record]) -> tuple[LossCurve, ...]:
    """Give a curve its file's series, since the backend in a main file's field goes before its name's suffix."""
    stated = {(r.source.stem, r.series.method): r.series for r in main_records}
    return tuple(
        replace(c, series=stated.get((c.source.name.split(".")[0], c.series.method), c.series)) for c in curves
    )
