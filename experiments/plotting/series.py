"""Which series and cells a figure holds, and which it should hold but does not.

Pure data: ``bar_chart`` turns records into a ``BarChart``, which is what a figure draws and what tests look at.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from matplotlib.artist import Artist

from .metrics import Metric
from .page import legend_columns
from .records import Record, Series
from .style import BACKENDS, INK, METHODS, dataset_label


@dataclass(frozen=True)
class Bar:
    """One value with the range of its repeats (None: no repeats), in the metric's own unit."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Missing:
    """A cell without a value. ``whole``: it has none at all, not only none for this metric."""

    dataset: str
    series: Series
    reason: str
    whole: bool = False


@dataclass(frozen=True)
class BarChart:
    """Bars by series and data set.

    ``bars[series][i]`` is the bar on ``datasets[i]``, None where there is no value. ``slots[i]`` are the series that
    have a place there, with a bar or with a mark for the missing one.
    """

    metric: Metric
    datasets: tuple[str, ...]
    series: tuple[Series, ...]
    bars: dict[Series, tuple[Bar | None, ...]]
    slots: tuple[tuple[Series, ...], ...]
    missing: tuple[Missing, ...]

    @property
    def values(self) -> list[float]:
        """All values drawn."""
        return [bar.value for bars in self.bars.values() for bar in bars if bar is not None]

    def missing_lines(self) -> list[str]:
        """What is missing, for the console: a cell that has nothing at all without the metric's name."""
        whole = [cell for cell in self.missing if cell.whole]
        part = [cell for cell in self.missing if not cell.whole]
        lines = describe_missing(whole, self.datasets)
        return lines + [f"{self.metric.title}: {line}" for line in describe_missing(part, self.datasets)]


def colour(series: Series) -> str:
    """The method's colour, whatever the backend."""
    return METHODS[series.method].colour


def hatch(series: Series) -> str:
    """The backend's hatch."""
    return BACKENDS[series.backend].hatch


def outline(series: Series) -> str:
    """The edge of bars: dark where no backend is stated, so that ``StreamingLLM`` is not ``StreamingLLM (math)``."""
    return INK if not series.backend_stated else "white"


def bar_style(series: Series) -> dict:
    """How the bars of a series and their patch in the legend are drawn."""
    return {"facecolor": colour(series), "hatch": hatch(series), "edgecolor": outline(series), "linewidth": 0.4}


def tag(artist: Artist, series: Series, dataset: str = "") -> None:
    """Name what an artist shows: becomes the id of its group in an SVG, by which the report filters figures."""
    count = len(artist.axes.get_children())
    number = f"{artist.figure.axes.index(artist.axes)}-{count}"
    artist.set_gid("--".join(("cell", series.method, series.backend, safe_name(dataset), number)))


def safe_name(text: str) -> str:
    """A data set's key as part of an id or of a file's name."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in text)


def modes(records: Iterable[Record]) -> list[str | None]:
    """The modes among the records, None (today's files, and older ones without a mode) first."""
    return sorted({r.series.mode for r in records}, key=lambda mode: mode or "")


def sorted_series(records: Iterable[Record]) -> tuple[Series, ...]:
    """The series among the records, in drawing order."""
    return tuple(sorted({r.series for r in records}, key=lambda s: s.order))


def sorted_datasets(records: Iterable[Record]) -> tuple[str, ...]:
    """The data sets among the records, by name."""
    return tuple(sorted({r.dataset for r in records}))


def expected_series(records: Sequence[Record]) -> tuple[Series, ...]:
    """Every method with every backend, within each family of series.

    An evaluation runs the whole product, so what is in the product and in no file is missing.
    """
    out = set()
    for family in {r.series.family for r in records}:
        mine = [r.series for r in records if r.series.family == family]
        stated, mode = family
        methods, backends = {s.method for s in mine}, {s.backend for s in mine}
        out |= {Series(m, b, stated, mode or None) for m in methods for b in backends}
    return tuple(sorted(out, key=lambda s: s.order))


def bar_chart(records: Sequence[Record], metric: Metric) -> BarChart:
    """The bars of one metric. A series without any value is left out of the bars and stays in ``missing``.

    A data set counts as missing from a series only where some series of the same family has it.
    """
    by_cell = {(r.series, r.dataset): r for r in records}
    datasets = sorted_datasets(records)
    in_family = {(r.series.family, r.dataset) for r in records}
    bars, missing = {}, []
    for series in expected_series(records):
        if series.method == "baseline" and not metric.with_baseline:
            continue
        row = []
        for dataset in datasets:
            record = by_cell.get((series, dataset))
            value = record.values.get(metric.key) if record and record.status == "ok" else None
            row.append(None if value is None else _bar(record, metric.key, value))
            if value is None and (series.family, dataset) in in_family:
                reason = record.missing_reason(metric.key) if record else "no result"
                missing.append(Missing(dataset, series, reason, record is None or record.status != "ok"))
        if any(bar is not None for bar in row):
            bars[series] = tuple(row)
    slots = tuple(tuple(s for s in bars if (s.family, dataset) in in_family) for dataset in datasets)
    return BarChart(metric, datasets, tuple(bars), bars, slots, tuple(missing))


def _bar(record: Record, key: str, value: float) -> Bar:
    samples = [run[key] for run in record.runs if key in run]
    if len(samples) < 2:
        return Bar(value)
    return Bar(value, min(*samples, value), max(*samples, value))


def describe_missing(missing: Sequence[Missing], datasets: Sequence[str], max_reason: int | None = None) -> list[str]:
    """Name missing cells, one line for each reason: ``KVPress (flash) on PG19: no result``.

    A series that misses on all data sets, of several, is named without them.
    """
    reasons: dict[str, dict[Series, list[str]]] = {}
    for cell in missing:
        reasons.setdefault(cell.reason, {}).setdefault(cell.series, []).append(cell.dataset)
    lines = []
    for reason, by_series in reasons.items():
        by_where: dict[tuple[str, ...], list[str]] = {}
        for series, where in by_series.items():
            by_where.setdefault(tuple(where), []).append(series.label)
        named = []
        for where, labels in by_where.items():
            everywhere = set(where) >= set(datasets) and len(datasets) > 1
            on = "" if everywhere else " on " + ", ".join(dataset_label(d) for d in where)
            named.append(", ".join(labels) + on)
        short = reason if max_reason is None or len(reason) <= max_reason else reason[: max_reason - 1].rstrip() + "…"
        lines.append(f"{'; '.join(named)}: {short}")
    return lines


def legend_order(series: Sequence[Series], width: float) -> tuple[list[Series], int]:
    """-> the series as a legend takes them, column by column, and how many columns it has at most.

    Where every method has every backend and the columns fit, a column per backend and a row per method.
    """
    backends = sorted({s.backend for s in series}, key=list(BACKENDS).index)
    columns = legend_columns([s.label for s in series], width, 3)
    if 1 < len(backends) <= columns and len(series) == len(backends) * len({s.method for s in series}):
        return [s for b in backends for s in series if s.backend == b], len(backends)
    return list(series), columns
