"""Perplexity and speed against window_size and against n_sink, a line per backend.

    python experiments/plot_ablation_results.py
    python experiments/plot_ablation_results.py --results-dir results/h100 --output-dir figures/h100

Writes ablation_window_size and ablation_n_sink (with the data set in the name where there are several).
"""

import sys
from pathlib import Path

if not __package__:  # as a script, on a machine where the project is not installed: drawing needs no torch
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from experiments.plotting.captions import caption
from experiments.plotting.files import ABLATIONS
from experiments.plotting.lines import Line, draw_lines, line_handles, line_styles, number_axis
from experiments.plotting.page import new_page, safe_name
from experiments.plotting.script import Drawing, main
from experiments.plotting.style import BAND, METRICS, QUIET, dataset_label, short_number
from experiments.plotting.table import Results, backends_of_each, series_of, why_missing

SPEED = ("decode_toks_per_sec", "runtime_sec")  # the first of these that the files have
X_LABELS = {"window_size": "window_size (recent tokens kept; log axis)", "n_sink": "n_sink (first tokens kept)"}
TITLES = {"window_size": "How large a window", "n_sink": "How many sinks"}
PANEL_IN = 1.4


def ablation_keys(rows: pd.DataFrame) -> list[str]:
    """The metrics that these rows have: perplexity, speed, memory."""
    have = rows.columns[rows.notna().any()]
    return [key for key in ("perplexity", *[k for k in SPEED if k in have][:1], "kv_cache_mb") if key in have]


def missing_settings(rows: pd.DataFrame) -> list[str]:
    """Settings without a perplexity or a time, with the reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for key in ablation_keys(rows):
        for row in rows[rows[key].isna()].itertuples():
            found.setdefault((row.label, why_missing(row, key)), []).append(str(row.setting))
    kind = rows["ablation"].iloc[0]
    return [f"{label}, {kind} {', '.join(dict.fromkeys(s))}: {reason}" for (label, reason), s in found.items()]


def plot_ablation(rows: pd.DataFrame) -> Figure | None:
    """One ablation on one data set: a panel per metric; None where no row has a value."""
    keys = ablation_keys(rows)
    if not keys:
        return None
    kind, dataset = rows[["ablation", "dataset"]].iloc[0]
    series = series_of(rows)
    styles = line_styles(series)
    conditions = " · ".join(filter(None, [caption(rows, without=("cache",)), held_constant(rows)]))
    idle = rows.loc[~rows["evicts"].astype(bool), "setting"]
    figure, axes = new_page(
        len(keys),
        1,
        PANEL_IN,
        title=f"{TITLES[kind]}{', ' + dataset_label(dataset) if dataset else ''}",
        handles=line_handles(series, styles),
        across=backends_of_each(series),
        caption=[conditions, "Grey: the text fits into the cache, nothing is evicted." if len(idle) else ""],
        missing=missing_settings(rows),
        sharex=True,
    )
    for ax, key in zip(axes[:, 0], keys, strict=True):
        _draw_panel(ax, rows, key, series, styles)
        if len(idle):
            ax.axvspan(idle.min(), 2 * rows["setting"].max(), color=BAND, zorder=0.5, lw=0)
    _setting_axis(axes[-1, 0], kind, sorted(rows["setting"].unique()))
    axes[-1, 0].set_xlabel(X_LABELS[kind])
    return figure


def draw(results: Results) -> list[Drawing]:
    """All figures of this script."""
    drawings = []
    for kind in ABLATIONS:
        rows = results.table[results.table["ablation"] == kind]
        datasets = rows["dataset"].unique()
        for dataset in datasets:
            mine = rows[rows["dataset"] == dataset]
            name = f"ablation_{kind}" + (f"_{safe_name(dataset)}" if len(datasets) > 1 and dataset else "")
            lines = [f"ablation of {line}" for line in missing_settings(mine)]
            drawings.append(Drawing(name, plot_ablation(mine), lines))
    return drawings


def _draw_panel(ax: Axes, rows: pd.DataFrame, key: str, series: list, styles: dict[str, dict]) -> None:
    values = rows[key].dropna()
    label, factor = METRICS[key].axis_label(values.max())
    lines = []
    for one in series:
        mine = rows[(rows["label"] == one.label) & rows[key].notna()]
        low, high = (factor * mine[f"{key}_{end}"] for end in ("low", "high"))
        lines.append(Line(one, mine["setting"], factor * mine[key], low, high))
    draw_lines(ax, lines, styles)
    number_axis(ax, "y", factor * values, log_ratio=10)
    if ax.get_yscale() == "linear" and key != "perplexity":
        ax.set_ylim(0, 1.1 * factor * rows[[key, f"{key}_high"]].max(axis=None))
    for setting in rows.loc[rows[key].isna(), "setting"]:
        ax.plot(setting, 0.05, "x", color=QUIET, ms=3.2, mew=0.9, transform=ax.get_xaxis_transform())
    ax.set(title=METRICS[key].title, ylabel=label)


def _setting_axis(ax: Axes, kind: str, settings: list[int]) -> None:
    """Powers of two at equal distances; nought, for sinks, one step before 1."""
    ax.set_xscale("symlog", base=2, linthresh=1) if kind == "n_sink" else ax.set_xscale("log", base=2)
    low, high = settings[0], settings[-1]
    ax.set_xlim(low - 0.3 if low < 1 else low / 1.25, high * 1.25 if high else 1)
    shown, last = [], -1.0
    for value in settings:  # ticks far enough apart for their numbers
        place = ax.transAxes.inverted().transform(ax.transData.transform((value, 0)))[0]
        if place - last > 0.075:
            shown.append(value)
            last = place
    ax.xaxis.set_major_locator(FixedLocator(shown))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" if x < 1e4 else short_number(x)))


def held_constant(rows: pd.DataFrame) -> str:
    """Which size is the same in all settings; nothing where the files do not say or none is."""
    sizes = rows[["n_sink", "window_size"]].assign(cache_size=rows["n_sink"] + rows["window_size"])
    for name in sizes.columns.drop(rows["ablation"].iloc[0]):
        if sizes[name].notna().all() and sizes[name].nunique() == 1:
            return f"{name}\xa0{sizes[name].iloc[0]:,.0f}"
    return ""


if __name__ == "__main__":
    sys.exit(main(draw, __doc__))
