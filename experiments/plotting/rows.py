"""Horizontal bars: one data set, a panel per metric, methods as rows, backends as the bars of a row.

Lying bars have room for their values, so this is the figure to read numbers from. All panels have the same rows, and
the rows are named once, at the left.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

from . import style
from .bars import bar_handles, uses_log
from .lines import number_axis
from .metrics import METRICS, axis_unit, short_number
from .page import COLUMN_IN, PT, Panel, make_page, text_width
from .records import Record, Series
from .series import BarChart, bar_chart, bar_style, colour, expected_series, tag

BAR_PT = 6.6  # a bar's width, which its value has to fit into
METHOD_GAP = 0.55  # in widths of a bar
_VALUE_PT = 23.0  # room for a value at a bar's end
_BETWEEN_IN = 0.12


def matrix_charts(records: Sequence[Record], keys: Sequence[str]) -> list[BarChart]:
    """A chart per metric that any record has; the baseline has its row in each, also where others refer to it."""
    charts = [bar_chart(records, replace(METRICS[key], with_baseline=True)) for key in keys]
    return [chart for chart in charts if chart.values]


def figure_of_rows(
    charts: Sequence[BarChart],
    records: Sequence[Record],
    *,
    title: str,
    caption: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Figure:
    """The panels in two columns. ``charts`` hold one data set each, the same one."""
    series = expected_series(records)
    labels = method_rows(series)
    left = max(text_width(style.METHODS[m].label, style.SIZE_TICK) for m in labels) * PT + 0.08
    axes_width = (COLUMN_IN - left - _BETWEEN_IN - 0.04) / 2
    height = _units(series) * BAR_PT * PT
    first = [Panel(height, 0.2, 0.19, left, _BETWEEN_IN / 2) for _ in charts[::2]]
    second = [Panel(height, 0.2, 0.19, _BETWEEN_IN / 2, 0.04) for _ in charts[1::2]]
    widths = [left + axes_width + _BETWEEN_IN / 2, _BETWEEN_IN / 2 + axes_width + 0.04]
    figure, axes = make_page(
        [first, second] if second else [first],
        title=title,
        legend=bar_handles(series),
        caption=caption,
        notes=notes,
        widths=widths if second else [COLUMN_IN],
    )
    placed = [*charts[::2], *charts[1::2]]
    for i, (ax, chart) in enumerate(zip(axes, placed, strict=True)):
        width_pt = (axes_width if second else COLUMN_IN - left - 0.04) / PT
        _draw_panel(ax, chart, series, width_pt, labels if i < len(first) else ())
    return figure


def method_rows(series: Sequence[Series]) -> tuple[str, ...]:
    """The methods among series, in drawing order: the rows."""
    return tuple(dict.fromkeys(s.method for s in series))


def _units(series: Sequence[Series]) -> float:
    return len(series) + METHOD_GAP * len(method_rows(series))


def _draw_panel(ax: Axes, chart: BarChart, series: Sequence[Series], width_pt: float, labels: Sequence[str]) -> None:
    factor, unit = axis_unit(chart.metric.unit, max(map(abs, chart.values)))
    low, high = _limits(chart, factor, width_pt)
    log = low > 0
    if log:
        ax.set_xscale("log")
    ax.set_xlim(low, high)
    centres, y = {}, METHOD_GAP / 2
    for i, s in enumerate(series):
        if i and s.method != series[i - 1].method:
            y += METHOD_GAP
        centres.setdefault(s.method, []).append(y + 0.5)
        _draw_bar(ax, y, chart, s, factor, low)
        y += 1
    ax.set_ylim(_units(series), 0)
    ax.grid(visible=False, axis="y")
    ax.grid(visible=True, axis="x")
    number_axis(ax, "x", log=log)
    few = LogLocator(subs=(1.0,) if high / low > 50 else (1.0, 3.0), numticks=4) if log else MaxNLocator(nbins=3)
    ax.xaxis.set_major_locator(few)
    ax.tick_params(axis="y", length=0)
    ax.yaxis.set_major_locator(FixedLocator([sum(c) / len(c) for c in centres.values()]) if labels else NullLocator())
    if labels:
        ax.set_yticklabels([style.METHODS[m].label for m in labels])
    name = chart.metric.short or chart.metric.axis
    title = f"{name} ({unit})" if unit else name
    ax.set_title(title, loc="left", size=style.SIZE_LABEL, pad=2.5, weight="bold")


def _draw_bar(ax: Axes, y: float, chart: BarChart, series: Series, factor: float, floor: float) -> None:
    bar = chart.bars[series][0] if series in chart.bars else None
    text = {"va": "center_baseline", "size": style.SIZE_VALUE, "textcoords": "offset points"}
    if bar is None:
        reason = next((cell.reason for cell in chart.missing if cell.series == series), "no result")
        short = reason.split(":")[0] if reason.startswith(("skipped", "failed")) else reason
        short = short if len(short) <= 16 else "not measured"
        base = ax.get_yaxis_transform()  # x in shares of the axes
        ax.plot([0.03], [y + 0.5], "x", color=colour(series), ms=3.0, mew=0.9, transform=base)
        ax.annotate(short, (0.03, y + 0.5), xytext=(4, 0), xycoords=base, color=style.QUIET, **text)
        return
    value = bar.value * factor
    (patch,) = ax.barh(
        y,
        value - floor,
        height=1.0,
        left=floor,
        align="edge",
        label=series.label,
        **bar_style(series),
    )
    tag(patch, series, chart.datasets[0])
    end = value
    if bar.low is not None:
        span = [bar.low * factor, bar.high * factor]
        (whisker,) = ax.plot(span, [y + 0.5, y + 0.5], "-", color=style.INK, lw=0.8, solid_capstyle="butt")
        tag(whisker, series, chart.datasets[0])
        end = max(value, span[1])
    number = ax.annotate(short_number(value), (end, y + 0.5), xytext=(2, 0), color=style.INK, **text)
    tag(number, series, chart.datasets[0])


def _limits(chart: BarChart, factor: float, width_pt: float) -> tuple[float, float]:
    """The x axis, with room for the values at the bars' ends; from above nought where it has to be a log axis."""
    drawn = [bar for bars in chart.bars.values() for bar in bars if bar is not None]
    high = max(max(b.value, b.high or b.value) for b in drawn) * factor
    low = min(min(b.value, b.value if b.low is None else b.low) for b in drawn) * factor
    share = 1 - _VALUE_PT / width_pt
    if uses_log(chart) == "log" and low > 0:
        bottom = math.log10(low) - 0.4
        return 10**bottom, 10 ** (bottom + (math.log10(high) - bottom) / share)
    return min(0.0, low), (high or 1.0) / share
