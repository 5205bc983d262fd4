"""Bars: a panel per metric, data sets one below the other, methods as rows, backends as the bars of a row, by hatch.

Lying bars have room for their values, so numbers can be read from every figure. All panels of a figure have the same
rows, named once at the left.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, SymmetricalLogLocator

from . import style
from .captions import caption, missing_lines
from .page import new_page, tag, text_width, wrap
from .style import ARROWS, METRICS, Metric, short_number, tick_number
from .table import SERIES, backends_of_each, series_of

BAR_IN = 6.6 / 72  # a bar's width, which its value has to fit into
METHOD_GAP, HEADING_LINE = 0.55, 1.5  # in widths of a bar
LABELS_IN = 0.36  # what the title and the ticks of a panel take
VALUE_IN = 0.36  # room for a value at a bar's end
PAGE_IN = 9.6  # panels that would be longer go side by side on a page of twice the width


def bar_figure(cells: pd.DataFrame, keys: Sequence[str], title: str, notes: Sequence[str] = ()) -> Figure | None:
    """A figure of some metrics; None where no cell has a value.

    Args:
        cells: Rows of the table of results.
        title: The data set's name follows, where there is one only.
        notes: Paragraphs for the caption.
    """
    keys = [key for key in keys if cells[key].notna().any()]
    if not keys:
        return None
    series, datasets = series_of(cells), list(cells["dataset"].unique())
    names_in = max(text_width(style.METHODS[row.method].label, style.SIZE_TICK) for row in series) + 0.15
    for most, width_in in ((2, style.HALF_PAGE_IN), (4, 2 * style.HALF_PAGE_IN)):
        columns = min(most, len(keys))
        panel_in = (width_in - names_in) / columns - 0.1
        headings = {d: wrap(style.dataset_label(d), panel_in, style.SIZE_LABEL, bold=True) for d in datasets}
        middles, heading_ends = _places(cells, headings if len(datasets) > 1 else {})
        end = middles.iloc[-1] + 0.5 + METHOD_GAP / 2
        lines = -(-len(keys) // columns)
        if lines * (end * BAR_IN + LABELS_IN) <= PAGE_IN:
            break
    better = dict.fromkeys(f"{ARROWS[METRICS[key].better]} {METRICS[key].better} is better" for key in keys)
    figure, axes = new_page(
        lines,
        columns,
        end * BAR_IN + LABELS_IN,
        title=", ".join(filter(None, [title, *map(style.dataset_label, datasets[: len(datasets) == 1])])),
        handles=[Patch(label=row.label, **bar_style(row)) for row in series],
        across=backends_of_each(series),
        caption=[caption(cells), ", ".join(better), *notes],
        missing=missing_lines(cells, keys, longest=90),
        width_in=width_in,
    )
    for ax in axes.flat[len(keys) :]:
        ax.remove()
    names = middles.groupby([cells["dataset"], cells["method"]], sort=False).mean()
    for i, (ax, key) in enumerate(zip(axes.flat, keys, strict=False)):
        _draw_panel(ax, cells.assign(y=middles), METRICS[key], panel_in)
        for dataset, y in heading_ends.items():
            ax.text(0.015, y - 0.35, "\n".join(headings[dataset]), weight="bold", **_in_panel(ax))
        ax.yaxis.set_visible(i % columns == 0)
        if i % columns == 0:
            ax.set_yticks(names, [style.METHODS[method].label for _, method in names.index])
            ax.tick_params(axis="y", length=0)
            ax.yaxis.grid(visible=False)
        ax.set_ylim(end, 0)
    return figure


def bar_style(row: object) -> dict:
    """How the bars of a series are drawn, and their patch in the legend.

    The edge is dark where no backend is stated, so that ``StreamingLLM`` is not ``StreamingLLM (math)``.
    """
    return {
        "facecolor": style.METHODS[row.method].colour,
        "hatch": style.BACKENDS[row.backend].hatch,
        "edgecolor": "white" if row.stated else style.INK,
        "linewidth": 0.4,
    }


def scale_kind(metric: Metric, values: pd.Series) -> str:
    """The scale that values need: ``linear``, ``log``, or ``symlog`` where they may be negative."""
    sizes = values[values != 0].abs()
    if sizes.empty or sizes.max() / sizes.min() <= metric.log_ratio:
        return "linear"
    if not metric.signed:
        return "log"
    # Increases of a few per cent next to ones of thousands; around nought alone a wide ratio says nothing.
    return "symlog" if sizes.max() > 100 else "linear"


def _places(cells: pd.DataFrame, headings: dict[str, list[str]]) -> tuple[pd.Series, dict[str, float]]:
    """Where rows stand from the top, in widths of a bar -> the middles of the bars, and where headings end."""
    new_text = cells["dataset"] != cells["dataset"].shift()
    new_method = new_text | (cells["method"] != cells["method"].shift())
    head = cells["dataset"].map(lambda dataset: HEADING_LINE * len(headings.get(dataset, ()))) * new_text
    middles = (1 + METHOD_GAP * new_method + head).cumsum() - 0.5 - METHOD_GAP / 2
    return middles, dict(zip(cells["dataset"][new_text], middles[new_text] - 0.5, strict=True)) if headings else {}


def _scale_axis(ax: Axes, metric: Metric, cells: pd.DataFrame, panel_in: float) -> tuple[float, float]:
    """Give a panel of about this width its title and x axis; -> where bars begin, and the factor of their values."""
    values = cells[metric.key].dropna()
    title, factor = metric.axis_label(values.abs().max())
    spans = factor * cells[[metric.key, f"{metric.key}_low", f"{metric.key}_high"]]
    low, high = spans.min(axis=None), spans.max(axis=None)
    kind = scale_kind(metric, values)
    floor = low / 2.5 if kind == "log" else 0.0
    if kind != "linear":
        ax.set_xscale(kind, **({} if kind == "log" else {"linthresh": 1.0}))
    transform = ax.xaxis.get_transform()
    ends = [floor or min(0.0, 1.03 * low), max(high, floor, metric.reference or 0.0)]
    start, stop = transform.transform(ends)
    ax.set_xlim(*transform.inverted().transform([start, start + ((stop - start) or 1.0) / (1 - VALUE_IN / panel_in)]))
    locators = {"linear": MaxNLocator(nbins=3), "symlog": SymmetricalLogLocator(base=10, linthresh=1)}
    decades = (1.0,) if floor and high / floor > 50 else (1.0, 3.0)
    ax.xaxis.set_major_locator(locators.get(kind) or LogLocator(subs=decades, numticks=4))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick_number(value)))
    ax.set_title(title)
    if metric.reference is not None:
        ax.axvline(metric.reference, color=style.METHODS["baseline"].colour, lw=0.9, zorder=1.5)
    return floor, factor


def _draw_panel(ax: Axes, cells: pd.DataFrame, metric: Metric, panel_in: float) -> None:
    """Draw the bars of one metric; ``cells["y"]``: their middles."""
    floor, factor = _scale_axis(ax, metric, cells, panel_in)
    keys = [metric.key, f"{metric.key}_low", f"{metric.key}_high"]
    figures = cells[keys].to_numpy() * factor
    for row, (value, low, high) in zip(cells[["label", *SERIES, "status", "y"]].itertuples(), figures, strict=True):
        text = {"va": "center_baseline", "size": style.SIZE_VALUE}
        if np.isnan(value):
            word = {"ok": "see below", "absent": "no result"}.get(row.status, row.status)
            look = style.METHODS[row.method].colour
            ax.plot(0.03, row.y, "x", color=look, ms=3.0, mew=0.9, transform=ax.get_yaxis_transform())
            ax.text(0.05, row.y, f"\xa0{word}", color=style.QUIET, **text, **_in_panel(ax))
            continue
        bar = Rectangle((floor, row.y - 0.5), value - floor, 1.0, label=row.label, **bar_style(row))
        end = np.nanmax([value, high, floor])
        artists = [ax.add_artist(bar), ax.text(end, row.y, f"\xa0{short_number(value)}", in_layout=False, **text)]
        if not np.isnan(low):
            artists += ax.plot([low, high], [row.y, row.y], color=style.INK, lw=0.8, solid_capstyle="butt")
        for artist in artists:
            tag(artist, row.method, row.backend)


def _in_panel(ax: Axes) -> dict:
    """For text over lines: x is in shares of the axes, within which there is room for it."""
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.3}
    return {"transform": ax.get_yaxis_transform(), "bbox": paper, "in_layout": False}
