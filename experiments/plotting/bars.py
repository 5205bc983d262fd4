"""Grouped bars: data sets on the x axis, methods as colours, backends side by side by hatch.

Where the bars of all data sets do not fit side by side at a readable width, the data sets go into several rows with
one common scale.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from . import style
from .metrics import axis_unit, short_number, tick_number
from .page import COLUMN_IN, LINE, PT, Legend, Panel, in_columns, make_page, pieces, text_width, wrap
from .records import Series
from .series import Bar, BarChart, bar_style, colour, legend_order, tag

MIN_BAR_PT = 4.6  # narrower, and a hatch is no longer seen
MIN_LABELLED_BAR_PT = 6.6  # narrower, and values on bars run into each other
METHOD_GAP = 0.35  # in widths of a bar
DATASET_GAP = 1.3
_LEFT, _RIGHT = 0.47, 0.06
_INNER_PT = COLUMN_IN / PT
_AXES_PT = _INNER_PT - (_LEFT + _RIGHT) / PT


def bar_handles(series: Sequence[Series]) -> Legend:
    """The legend: a box per series, backends of a method next to each other."""
    series, columns = legend_order(series, _INNER_PT)
    handles = [Patch(**bar_style(s)) for s in series]
    return Legend(handles, [s.label for s in series], columns)


@dataclass(frozen=True)
class _Row:
    """Some data sets of a chart, side by side. ``units``: what the row's full width is, in bars."""

    chart: BarChart
    indices: tuple[int, ...]
    units: float
    first: bool

    @property
    def bar_pt(self) -> float:
        return _AXES_PT / self.units

    @property
    def label_lines(self) -> list[list[str]]:
        return [_label_lines(self.chart, i, self.bar_pt) for i in self.indices]


def figure_of_charts(
    charts: Sequence[BarChart],
    *,
    title: str,
    subtitle: str = "",
    caption: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Figure:
    """Bar charts one below the other, with one legend: the metrics of one matrix, or a single metric.

    What would be longer than a page goes into two columns, on a page of twice the width.
    """
    series = sorted({s for chart in charts for s in chart.series}, key=lambda s: s.order)
    rows = [row for chart in charts for row in _rows(chart)]
    several = len(charts) > 1
    panels = []
    for row in rows:
        below = max(map(len, row.label_lines)) * style.SIZE_TICK * LINE * PT + 0.06
        height = 1.55 if len(rows) == 1 else 1.08 if len(rows) <= 6 else 0.78
        panels.append(Panel(height, below, 0.16 if row.first and several else 0.07, _LEFT, _RIGHT))
    figure, axes = make_page(
        in_columns(panels, [i for i, row in enumerate(rows) if row.first]),
        title=title,
        subtitle=subtitle,
        legend=bar_handles(series),
        caption=caption,
        notes=notes,
    )
    for ax, panel, row in zip(axes, panels, rows, strict=True):
        _draw_row(ax, row, panel.height)
        if row.first and several:
            ax.set_title(row.chart.metric.title, loc="left", size=style.SIZE_LABEL, pad=3, weight="bold")
    return figure


def _draw_row(ax: Axes, row: _Row, height: float) -> None:
    """Draw some data sets of a chart. ``height``: the axes' own, inches."""
    chart = row.chart
    factor, unit = axis_unit(chart.metric.unit, max(map(abs, chart.values)))
    log = uses_log(chart)
    labelled = row.bar_pt >= MIN_LABELLED_BAR_PT
    ylim = _limits(chart, factor, log, height, labelled)
    _scale(ax, ylim, log)
    floor = ylim[0] if log == "log" else 0.0
    x = DATASET_GAP / 2
    for index, lines in zip(row.indices, row.label_lines, strict=True):
        start = x
        for i, series in enumerate(chart.slots[index]):
            if i and series.method != chart.slots[index][i - 1].method:
                x += METHOD_GAP
            bar = chart.bars[series][index]
            if bar is None:
                base = ax.get_xaxis_transform()  # y in shares of the axes
                ax.plot([x + 0.5], [0.04], "x", color=colour(series), ms=3.2, mew=0.9, transform=base)
            else:
                _bar(ax, x, bar, series, chart.datasets[index], factor, floor, labelled)
            x += 1
        _label_below(ax, (start + x) / 2, lines)
        x += DATASET_GAP
    ax.set_xlim(0, row.units)
    ax.xaxis.set_major_locator(NullLocator())
    if chart.metric.reference is not None:
        ax.axhline(chart.metric.reference, color=style.METHODS["baseline"].colour, lw=0.9, zorder=1.5)
    ax.set_ylabel(_y_label(chart, unit, height))


def _y_label(chart: BarChart, unit: str, height: float) -> str:
    """Quantity and unit; in its short form where the long one would be longer than the axes."""
    metric = chart.metric
    names = [f"{name} ({unit})" if unit else name for name in (metric.axis, metric.short or metric.axis)]
    return names[0] if text_width(names[0], style.SIZE_LABEL) * PT <= height + 0.05 else names[1]


def _label_below(ax: Axes, x: float, lines: Sequence[str]) -> None:
    """A data set's name under its bars, line by line, so that all names stand on the same lines."""
    for i, line in enumerate(lines):
        ax.annotate(
            line,
            (x, 0),
            xycoords=ax.get_xaxis_transform(),
            xytext=(0, -style.SIZE_TICK * (1.15 + i * LINE)),
            textcoords="offset points",
            ha="center",
            va="baseline",
            size=style.SIZE_TICK,
            annotation_clip=False,
        )


def uses_log(chart: BarChart) -> str:
    """The scale that the values need: ``linear``, ``log``, or ``symlog`` where they may be negative."""
    sizes = [abs(v) for v in chart.values if v]
    if not sizes or max(sizes) / min(sizes) <= chart.metric.log_ratio:
        return "linear"
    if not chart.metric.signed:
        return "log"
    # Increases of a few per cent next to ones of thousands; around nought alone a wide ratio says nothing.
    return "symlog" if max(sizes) > 100 else "linear"


def _bar(
    ax: Axes, x: float, bar: Bar, series: Series, dataset: str, factor: float, floor: float, labelled: bool
) -> None:
    value = bar.value * factor
    (patch,) = ax.bar(
        x,
        value - floor,
        width=1.0,
        bottom=floor,
        align="edge",
        label=series.label,
        **bar_style(series),
    )
    tag(patch, series, dataset)
    top = value
    if bar.low is not None:
        low, high = bar.low * factor, bar.high * factor
        (whisker,) = ax.plot([x + 0.5, x + 0.5], [low, high], "-", color=style.INK, lw=0.8, solid_capstyle="butt")
        tag(whisker, series, dataset)
        top = max(value, high)
    if labelled:
        text = ax.annotate(
            short_number(value),
            (x + 0.5, max(top, 0.0)),
            xytext=(0, 1.8),
            textcoords="offset points",
            ha="center",
            va="bottom",
            rotation=90,
            size=style.SIZE_VALUE,
            color=style.INK,
        )
        tag(text, series, dataset)


def _rows(chart: BarChart) -> list[_Row]:
    """The data sets in rows: as many side by side as stay readable, rows as even as possible, one width of bars."""
    count = len(chart.datasets)
    fit = max((n for n in range(1, count + 1) if _fits(chart, n)), default=1)
    rows = _split(count, fit)
    units = max(sum(_units(chart, i) for i in row) for row in rows)
    return [_Row(chart, row, units, row[0] == 0) for row in rows]


def _split(count: int, per_row: int) -> list[tuple[int, ...]]:
    even = math.ceil(count / math.ceil(count / per_row))
    return [tuple(range(i, min(i + even, count))) for i in range(0, count, even)]


def _fits(chart: BarChart, per_row: int) -> bool:
    """Whether bars are wide enough and no name has to be broken in mid-word."""
    rows = _split(len(chart.datasets), per_row)
    bar_pt = _AXES_PT / max(sum(_units(chart, i) for i in row) for row in rows)
    if bar_pt < MIN_BAR_PT:
        return False
    return all(
        text_width(piece.strip(), style.SIZE_TICK) <= _label_room(chart, i, bar_pt)
        for i, dataset in enumerate(chart.datasets)
        for piece in pieces(style.dataset_label(dataset))
    )


def _units(chart: BarChart, index: int) -> float:
    """Width of one data set, in bars, the gap around it included."""
    methods = len({s.method for s in chart.slots[index]})
    return len(chart.slots[index]) + METHOD_GAP * max(0, methods - 1) + DATASET_GAP


def _label_room(chart: BarChart, index: int, bar_pt: float) -> float:
    return _units(chart, index) * bar_pt - 4


def _label_lines(chart: BarChart, index: int, bar_pt: float) -> list[str]:
    return wrap(style.dataset_label(chart.datasets[index]), _label_room(chart, index, bar_pt), style.SIZE_TICK)


def _limits(chart: BarChart, factor: float, log: str, height: float, labelled: bool) -> tuple[float, float]:
    """The y axis: from nought (log: a little below the smallest), with room for the values above the bars."""
    drawn = [bar for bars in chart.bars.values() for bar in bars if bar is not None]
    tops = [max(b.value, b.value if b.high is None else b.high) * factor for b in drawn]
    lows = [min(b.value, b.value if b.low is None else b.low) * factor for b in drawn]
    reference = chart.metric.reference
    extremes = [*tops, *([reference * factor] if reference is not None else [])]
    room = (0.36 if labelled else 0.06) / height  # inches that the longest value takes, as a share of the axes
    if log == "log":
        low, high = math.log10(min(lows)) - 0.35, math.log10(max(extremes))
        return 10**low, 10 ** (low + (high - low) / (1 - room))
    bottom, top = min([0.0, *lows]), max([0.0, *extremes])
    if log == "symlog":
        return _symlog_inverse(_symlog(bottom)), _symlog_inverse(_symlog(top) / (1 - room))
    span = (top - bottom) or 1.0
    return bottom - (0.03 * span if bottom < 0 else 0), bottom + span / (1 - room)


def _symlog(value: float) -> float:
    """Linear up to 1, then by decades (matplotlib's symlog with linthresh 1, linscale 1)."""
    return value if abs(value) <= 1 else math.copysign(1 + math.log10(abs(value)), value)


def _symlog_inverse(value: float) -> float:
    return value if abs(value) <= 1 else math.copysign(10 ** (abs(value) - 1), value)


def _scale(ax: Axes, ylim: tuple[float, float], log: str) -> None:
    if log == "linear":
        ax.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    elif log == "log":
        ax.set_yscale("log")
        decades = math.log10(ylim[1] / ylim[0])
        ax.yaxis.set_major_locator(LogLocator(numticks=6) if decades >= 2 else LogLocator(subs=(1, 2, 5), numticks=9))
        ax.yaxis.set_minor_locator(NullLocator())
    else:
        ax.set_yscale("symlog", linthresh=1.0)
        top = math.ceil(_symlog(ylim[1]))
        step = max(1, top // 4)
        ax.yaxis.set_major_locator(FixedLocator([0, *(10.0 ** (d - 1) for d in range(1, top + 1, step))]))
        ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick_number(value)))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_ylim(*ylim)
