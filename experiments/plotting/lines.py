"""Curves: methods as colours and markers; backends by dashes and by rings around the marker.

Math and flash give the same perplexity, so their curves lie on top of each other: the backends' markers are rings of
growing size around the method's filled marker, and all of them stay visible.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from . import style
from .metrics import tick_number, whole_number
from .page import COLUMN_IN, PT, Legend
from .records import Series
from .series import colour, legend_order, tag


@dataclass(frozen=True)
class Line:
    """A curve. ``low`` and ``high``: the range of repeats at each point, where there is one."""

    series: Series
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float | None, ...] = ()
    high: tuple[float | None, ...] = ()


def line_style(series: Series) -> dict:
    """Line and marker of a series, as keywords of ``Axes.plot``."""
    method, backend = style.METHODS[series.method], style.BACKENDS[series.backend]
    dashes = backend.linestyle if series.backend_stated else style.UNSTATED_LINESTYLE
    return {
        "color": method.colour,
        "linestyle": dashes,
        "marker": method.marker,
        "markersize": backend.marker_size,
        "markerfacecolor": method.colour if backend.filled else "none",
        "markeredgecolor": method.colour,
        "markeredgewidth": 0.0 if backend.filled else 0.9,
    }


def line_handles(series: Sequence[Series]) -> Legend:
    """The legend: a line with its marker per series."""
    ordered, columns = legend_order(series, COLUMN_IN / PT)
    handles = [Line2D([], [], **line_style(s)) for s in ordered]
    return Legend(handles, [s.label for s in ordered], columns)


def draw_lines(ax: Axes, lines: Sequence[Line], markers_every: int = 1, dataset: str = "") -> None:
    """Draw curves, the method that matters on top: later methods of ``style.METHODS`` lie below earlier ones.

    Args:
        markers_every: A marker on each n-th point; series start at different points, so markers do not cover
            each other.
        dataset: What the curves were measured on, where that is one data set.
    """
    for i, line in enumerate(lines):
        z = 3 - 0.1 * list(style.METHODS).index(line.series.method)
        if line.series.method == "baseline":
            z = 1.9  # a broad line below the others, which show on it
        width = {"linewidth": 2.6} if line.series.method == "baseline" and len(lines) > 1 else {}
        step = markers_every if markers_every == 1 else (i % markers_every, markers_every)
        (curve,) = ax.plot(
            line.x, line.y, **line_style(line.series), **width, markevery=step, zorder=z, label=line.series.label
        )
        tag(curve, line.series, dataset)
        for x, low, high in zip(line.x, line.low, line.high, strict=False):
            if low is not None and high is not None:
                (whisker,) = ax.plot([x, x], [low, high], "-", color=colour(line.series), lw=0.8, zorder=z)
                tag(whisker, line.series, dataset)


def number_axis(ax: Axes, which: str, log: bool = False, ticks: Sequence[float] | None = None) -> None:
    """Give an axis short numbers (512, 1k, 2.5k), at ``ticks`` or where they fall well."""
    axis = ax.xaxis if which == "x" else ax.yaxis
    if log:
        (ax.set_xscale if which == "x" else ax.set_yscale)("log")
        low, high = ax.get_xlim() if which == "x" else ax.get_ylim()
        axis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 300 else (1.0, 2.0, 5.0), numticks=9))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]))
    if ticks is not None:
        axis.set_major_locator(FixedLocator(list(ticks)))
    number = tick_number if ticks is None else whole_number
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axis.set_minor_formatter(NullFormatter())


def wide(values: Sequence[float], ratio: float = 5.0) -> bool:
    """Whether values need a log axis."""
    positive = [v for v in values if v > 0]
    return bool(positive) and max(positive) / min(positive) > ratio


def log_limits(values: Sequence[float], room: float = 0.06) -> tuple[float, float]:
    """Limits of a log axis that leave ``room`` (a share) at both ends."""
    low, high = math.log10(min(values)), math.log10(max(values))
    pad = max(room * (high - low), 0.02)
    return 10 ** (low - pad), 10 ** (high + pad)
