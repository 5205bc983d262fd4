"""The report: one page that needs nothing else, made by ``report.html.j2`` of the table of results and of figures."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from . import style
from .captions import caption, memory_note
from .page import embedded, fill_template, safe_name
from .script import Drawing
from .style import MINUS, TIMES, short_number
from .table import Results, series_of, why_missing

DASH = "\N{EN DASH}"
# Key -> heading, unit, factor from the files' unit.
RESULT_COLUMNS = {
    "perplexity": ("Perplexity", "", 1),
    "ppl_increase_percent": ("Increase", "%", 1),
    "speedup": ("Speedup", TIMES, 1),
    "runtime_sec": ("Runtime", "s", 1),
    "prefill_sec": ("Prefill", "ms", 1e3),
    "ttft_sec": ("TTFT", "ms", 1e3),
    "decode_toks_per_sec": ("Decode", "tokens/s", 1),
    "tpot_ms": ("TPOT", "ms", 1),
    "kv_cache_mb": ("KV cache", "MB", 1),
    "peak_memory_mb": ("Peak memory", "MB", 1),
}
ABLATION_COLUMNS = {"n_sink": ("n_sink", "", 1), "window_size": ("window_size", "", 1)} | {
    key: RESULT_COLUMNS[key]
    for key in ("perplexity", "decode_toks_per_sec", "runtime_sec", "prefill_sec", "kv_cache_mb")
}
_FILE = ("config_hash", "data_sha256", "timestamp")


def picture(drawing: Drawing, run: str, datasets: Iterable[str]) -> dict:
    """A drawing of a run as it stands in the page; ``dataset`` is that of a figure of one data set, as in ids."""
    dataset = next((d for d in datasets if drawing.name == f"comprehensive_{d}"), "")
    wide = drawing.figure.get_size_inches()[0] > style.HALF_PAGE_IN
    svg = embedded(drawing.figure, drawing.name, run)
    return {"name": drawing.name, "svg": svg, "dataset": safe_name(dataset), "wide": wide}


@dataclass(frozen=True)
class Run:
    """The results of one root with their figures, under the name that the report gives them."""

    name: str
    results: Results
    pictures: Sequence[dict] = ()  # see `picture`
    missing: Sequence[str] = ()  # what no figure could show, and files that could not be read

    @property
    def conditions(self) -> str:
        """What was measured, on what."""
        rows, cells = self.results.table, self.results.cells
        return " · ".join(filter(None, [caption(cells if len(cells) else rows, ["repeats"]), memory_note(cells)]))


def build_page(runs: Sequence[Run]) -> str:
    """The page on some runs, in their order."""
    rows = pd.DataFrame([row | {"run": run.name} for run in runs for row in run.results.table.to_dict("records")])
    rows = rows[rows["status"] != "absent"]
    conditions = pd.Series([json.dumps([row.run, _conditions(row)]) for row in rows.itertuples()], rows.index, str)
    rows = rows.assign(conditions=pd.factorize(conditions)[0] + 1)
    where = ["Data set", "Run"] if len(runs) > 1 else ["Data set"]
    cells, ablations = rows[rows["ablation"] == ""], rows[rows["ablation"] != ""]
    return fill_template(
        "report.html.j2",
        several=len(runs) > 1,
        colours={method: look.colour for method, look in style.METHODS.items()},
        runs=runs,
        glance=glance,
        missing=any(run.missing for run in runs),
        filters=_filters(rows, several=len(runs) > 1),
        has_spread=(rows["repeats"] > 1).any(),
        tables=[
            _table("results", "Results", cells, ["Method", "Backend", *where], RESULT_COLUMNS),
            _table("ablations", "Ablations", ablations, ["Ablation of", "Backend", *where], ABLATION_COLUMNS),
        ],
        environments=[_environment(number, group) for number, group in rows.groupby("conditions")],
    )


def glance(results: Results) -> list[dict]:
    """Each series against the baseline with the same backend, and what it holds; ranges are over the data sets."""
    cells = results.cells[(results.cells["status"] == "ok") & (results.cells["method"] != "baseline")]
    units = {"speedup": TIMES, "ppl_increase_percent": "\xa0%", "kv_cache_mb": "\xa0MB"}
    lines = []
    for series in series_of(cells):
        mine = cells[cells["label"] == series.label]
        ranges = [_range(mine[key].dropna(), unit, signed="%" in unit) for key, unit in units.items()]
        lines.append({"label": series.label, "method": series.method, "backend": series.backend, "ranges": ranges})
    return lines


def format_value(value: float) -> str:
    """A figure as a table shows it: some four significant digits."""
    size = abs(value)
    if size >= 1e6:
        return short_number(value)
    return f"{value:,.{0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 1 else 3}f}".replace("-", MINUS)


def _range(values: pd.Series, unit: str, signed: bool) -> str:
    ends = [f"{'+' if signed and v >= 0 else ''}{short_number(v)}" for v in (values.min(), values.max()) if v == v]
    return f"{' to '.join(dict.fromkeys(ends))}{unit}" if ends else DASH


def _table(name: str, title: str, rows: pd.DataFrame, texts: Sequence[str], columns: dict[str, tuple]) -> dict:
    columns = {key: column for key, column in columns.items() if rows[key].notna().any()}
    heads = [(text, "", "") for text in texts] + [(title, unit, "number") for title, unit, _ in columns.values()]
    lines = [_row(row, columns) for row in rows.itertuples()]
    return {"name": name, "title": title, "heads": heads, "rows": lines}


def _row(row: object, columns: dict[str, tuple]) -> dict:
    """A row: its texts, its figures as (number to sort by, text, range of repeats), and why some are absent."""
    name = row.ablation or style.series_label(row.method, None, row.mode)
    numbers, absent = [], {}
    for key, (title, _, factor) in columns.items():
        value, *ends = (getattr(row, k, np.nan) * factor for k in (key, f"{key}_low", f"{key}_high"))
        if np.isnan(value):
            numbers.append(("", DASH, ""))
            absent.setdefault(why_missing(row, key), []).append(title.lower())
            continue
        text = f"{value:,.0f}" if key in ("n_sink", "window_size") else format_value(value)
        spread = " to ".join(map(format_value, ends)) if ends[0] < ends[1] else ""
        numbers.append((repr(value), text, spread))
    notes = [f"{', '.join(titles)}: {reason}" for reason, titles in absent.items() if reason != "not in the file"]
    if row.status != "ok":
        notes = [why_missing(row, "")]
    if not row.evicts:
        notes.insert(0, "evicts nothing: the text fits into the cache")
    return {
        "texts": [name, row.backend if row.stated else "not stated", style.dataset_label(row.dataset), row.run],
        "numbers": numbers,
        "conditions": row.conditions,
        "note": "; ".join(notes),
        "data": {"run": row.run, "dataset": safe_name(row.dataset), "method": row.method, "backend": row.backend},
    }


def _filters(rows: pd.DataFrame, several: bool) -> list[tuple[str, str, list[tuple[str, str, str]]]]:
    """Groups of boxes: key, title and (value, label, colour) of each box."""
    methods = [(key, look.label, look.colour) for key, look in style.METHODS.items() if key in set(rows["method"])]
    backends = [(key, key, "") for key in style.BACKENDS if key in set(rows["backend"])]
    datasets = [(safe_name(key), style.dataset_label(key), "") for key in rows["dataset"].unique() if key]
    runs = [(key, key, "") for key in rows["run"].unique()]
    groups = [("dataset", "Data set", datasets), ("method", "Method", methods), ("backend", "Backend", backends)]
    return [("run", "Run", runs), *groups] if several else groups


def _conditions(row: object) -> dict:
    """What a row was measured under, as far as its file says."""
    own = {key: getattr(row, key) for key in ("model", "weights", "device", "dtype")}
    pairs = {**{key: value for key, value in own.items() if isinstance(value, str)}, **row.environment}
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in pairs.items() if v is not None and v != ""}


def _environment(number: int, rows: pd.DataFrame) -> dict:
    """One set of conditions, and the files that were measured under it."""
    files = {source.name: [text or "" for text in texts] for source, *texts in rows[["source", *_FILE]].to_numpy()}
    return {
        "number": number,
        "run": rows["run"].iloc[0],
        "datasets": " ".join(sorted({safe_name(key) for key in rows["dataset"]})),
        "backends": " ".join(sorted(set(rows["backend"]))),
        "entries": _conditions(next(rows.itertuples())),
        "files": sorted(files.items()),
    }
