"""Perplexity and speed against window_size and against n_sink, a line per backend.

    python experiments/plot_ablation_results.py
    python experiments/plot_ablation_results.py --results-dir results/h200 --output-dir figures/h200

Writes ablation_window_size and ablation_n_sink (with the data set in the name where there are several).
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # as a script, on a machine where the project is not installed: drawing needs no torch
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.plotting.captions import caption
from experiments.plotting.lines import Line, draw_lines, line_handles, log_limits, number_axis, wide
from experiments.plotting.metrics import METRICS, TIMES, axis_unit
from experiments.plotting.names import ABLATION_TYPES
from experiments.plotting.page import Panel, make_page
from experiments.plotting.records import AblationRow, ResultSet
from experiments.plotting.script import Drawing, main
from experiments.plotting.series import safe_name
from experiments.plotting.style import BAND, QUIET, SIZE_LABEL, dataset_label

# Perplexity, and the first of these that the files have; then memory.
SPEED_KEYS = ("decode_toks_per_sec", "runtime_sec")
X_LABELS = {
    "window_size": "window_size (recent tokens kept; log axis)",
    "n_sink": "n_sink (first tokens kept)",
}
TITLES = {"window_size": "How large a window", "n_sink": "How many sinks"}


def ablation_keys(rows: Sequence[AblationRow]) -> list[str]:
    """The metrics that these rows have."""
    have = {key for row in rows for key in row.values}
    speed = [key for key in SPEED_KEYS if key in have][:1]
    return [key for key in ("perplexity", *speed, "kv_cache_mb") if key in have]


def ablation_lines(rows: Sequence[AblationRow], key: str) -> list[Line]:
    """A line per backend through the settings that have a value, in the metric's own unit."""
    lines = []
    for series in sorted({row.series for row in rows}, key=lambda s: s.order):
        mine = sorted((r for r in rows if r.series == series and key in r.values), key=lambda r: r.setting)
        if mine:
            spans = [_span(row, key) for row in mine]
            x, y = tuple(float(r.setting) for r in mine), tuple(r.values[key] for r in mine)
            lines.append(Line(series, x, y, tuple(s[0] for s in spans), tuple(s[1] for s in spans)))
    return lines


def missing_lines(rows: Sequence[AblationRow]) -> list[str]:
    """Settings without a perplexity or a time, with the reason."""
    lines = []
    for key in ablation_keys(rows):
        for row in rows:
            if key not in row.values:
                lines.append(f"{row.series.label}, {row.ablation} {row.setting}: {row.missing_reason(key)}")
    settings = {row.setting for row in rows}
    for series in sorted({row.series for row in rows}, key=lambda s: s.order):
        absent = sorted(settings - {row.setting for row in rows if row.series == series})
        if absent:
            lines.append(f"{series.label}, {rows[0].ablation} {', '.join(map(str, absent))}: no result")
    return list(dict.fromkeys(lines))


def plot_ablation(rows: Sequence[AblationRow]) -> Figure | None:
    """One ablation on one data set: a panel per metric; None where no row has a value."""
    keys = ablation_keys(rows)
    if not keys:
        return None
    kind, dataset = rows[0].ablation, rows[0].dataset
    panels = [Panel(1.05, 0.16, 0.2) for _ in keys[:-1]] + [Panel(1.05, 0.36, 0.2)]
    notes = [f"{TIMES} {line}" for line in missing_lines(rows)]
    if any(not row.evicts for row in rows):
        notes.append("Grey: the text fits into the cache, nothing is evicted.")
    figure, axes = make_page(
        [panels],
        title=f"{TITLES[kind]}{', ' + dataset_label(dataset) if dataset else ''}",
        legend=line_handles(sorted({row.series for row in rows}, key=lambda s: s.order)),
        caption=[_caption(rows)],
        notes=notes,
    )
    for ax, key in zip(axes, keys, strict=True):
        _draw_panel(ax, rows, key)
    axes[-1].set_xlabel(X_LABELS[kind])
    return figure


def draw(results: ResultSet) -> list[Drawing]:
    """All figures of this script."""
    drawings = []
    for kind in ABLATION_TYPES:
        rows = [row for row in results.ablations if row.ablation == kind]
        datasets = sorted({row.dataset or "" for row in rows})
        for dataset in datasets:
            mine = [row for row in rows if (row.dataset or "") == dataset]
            name = f"ablation_{kind}" + (f"_{safe_name(dataset)}" if len(datasets) > 1 and dataset else "")
            lines = tuple(f"ablation of {line}" for line in missing_lines(mine))
            drawings.append(Drawing(name, plot_ablation(mine), lines))
    return drawings


def _draw_panel(ax: Axes, rows: Sequence[AblationRow], key: str) -> None:
    metric = METRICS[key]
    lines = ablation_lines(rows, key)
    factor, unit = axis_unit(metric.unit, max(y for line in lines for y in line.y))
    scaled = [_scaled(line, factor) for line in lines]
    values = [y for line in scaled for y in line.y]
    draw_lines(ax, scaled, dataset=rows[0].dataset or "")
    settings = sorted({row.setting for row in rows})
    _setting_axis(ax, rows[0].ablation, settings)
    if wide(values, 10.0):
        ax.set_yscale("log")
        ax.set_ylim(*log_limits(values))
    number_axis(ax, "y", log=wide(values, 10.0))
    if not wide(values, 10.0) and key != "perplexity":
        ax.set_ylim(0, 1.1 * max(values))
    idle = [row.setting for row in rows if not row.evicts]
    if idle:
        ax.axvspan(min(idle), ax.get_xlim()[1], color=BAND, zorder=0.5, lw=0)
    for row in rows:
        if key not in row.values:
            base = ax.get_xaxis_transform()
            ax.plot([row.setting], [0.05], "x", color=QUIET, ms=3.2, mew=0.9, transform=base)
    ax.set_title(metric.title, loc="left", size=SIZE_LABEL, pad=3, weight="bold")
    ax.set_ylabel(f"{metric.axis} ({unit})" if unit else metric.axis)


def _setting_axis(ax: Axes, kind: str, settings: Sequence[int]) -> None:
    """Powers of two at equal distances; nought, for sinks, one step before 1."""
    ax.set_xscale("symlog", base=2, linthresh=1) if kind == "n_sink" else ax.set_xscale("log", base=2)
    low, high = settings[0], settings[-1]
    ax.set_xlim(low - 0.3 if low < 1 else low / 1.25, high * 1.25 if high else 1)
    shown, last = [], None
    for value in settings:  # ticks far enough apart for their numbers
        place = ax.transAxes.inverted().transform(ax.transData.transform((value, 0)))[0]
        if last is None or place - last > 0.075:
            shown.append(value)
            last = place
    number_axis(ax, "x", ticks=shown)


def _scaled(line: Line, factor: float) -> Line:
    def scale(values):
        return tuple(None if v is None else v * factor for v in values)

    return Line(line.series, line.x, scale(line.y), scale(line.low), scale(line.high))


def _span(row: AblationRow, key: str) -> tuple[float | None, float | None]:
    samples = [run[key] for run in row.runs if key in run]
    return (min(samples), max(samples)) if len(samples) > 1 else (None, None)


def _caption(rows: Sequence[AblationRow]) -> str:
    return " · ".join(part for part in (caption(rows, vary=("cache",)), held_constant(rows)) if part)


def held_constant(rows: Sequence[AblationRow]) -> str:
    """Which size is the same in all settings; nothing where the files do not say or none is."""
    for name in ("n_sink", "window_size", "cache_size"):
        values = {getattr(row, name) for row in rows}
        if name != rows[0].ablation and len(values) == 1 and None not in values:
            return f"{name}\xa0{values.pop():,}"
    return ""


if __name__ == "__main__":
    sys.exit(main(draw, __doc__.splitlines()[0]))
