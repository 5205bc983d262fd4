"""Curves: methods as colours and markers; backends by dashes and by rings around the marker.

All curves on one path show: methods take turns in stripes of their colours, as on a barber's pole (a curve by itself
is of one colour); of a method's backends each is narrower than the one below it, and the gaps of its dashes are white.
Markers of methods sit on different points; those of backends are rings of growing size.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from . import style
from .page import tag
from .style import tick_number

WIDTH_PT, STEP_PT = 1.2, 1.2
STRIPE_PT = 5.0
WHISKER_STEP_PT = 2.4  # whiskers of backends side by side


@dataclass(frozen=True)
class Line:
    """A curve. ``series`` is a row of the table; ``low`` and ``high``: the range of raw runs at each point, or NaN."""

    series: object
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


def line_styles(series: Sequence) -> dict[str, dict]:
    """Label -> keywords of ``Axes.plot``, for series that share a panel."""
    styles = {}
    for i, row in enumerate(series):
        method, backend = style.METHODS[row.method], style.BACKENDS[row.backend]
        above = [other for other in series[i + 1 :] if other.method == row.method]
        below = [other for other in series[:i] if other.method == row.method]
        styles[row.label] = {
            "label": row.label,
            "color": method.colour,
            "gapcolor": "white" if below else None,
            "linestyle": backend.linestyle if row.stated else style.UNSTATED_LINESTYLE,
            "linewidth": WIDTH_PT + STEP_PT * len(above),
            "marker": method.marker,
            "markersize": backend.marker_size + STEP_PT * len(above + below),
            "markerfacecolor": method.colour if backend.filled else "none",
            "markeredgewidth": 0.0 if backend.filled else 0.9,
        }
    return styles


def line_handles(series: Sequence, styles: dict[str, dict]) -> list[Line2D]:
    """The legend's lines, in the order of ``series``."""
    return [Line2D([], [], **styles[row.label]) for row in series]


def draw_lines(ax: Axes, lines: Sequence[Line], styles: dict[str, dict], gap: int = 0) -> None:
    """Draw curves with their whiskers.

    Args:
        styles: See ``line_styles``.
        gap: Curves take turns with their markers, so many points apart; 0: all have markers on all points.
    """
    methods = list(dict.fromkeys(line.series.method for line in lines))
    for i, line in enumerate(lines):
        look = styles[line.series.label]
        every = (i * gap, len(lines) * gap) if gap else None
        artists = ax.plot(line.x, line.y, **look, markevery=every, zorder=2.1)
        if len(methods) > 1:
            stripes = _stripes(look["linestyle"], methods.index(line.series.method), len(methods))
            plain = {"color": look["color"], "linewidth": look["linewidth"], "dash_capstyle": "butt"}
            artists += ax.plot(line.x, line.y, **plain, linestyle=stripes, zorder=2.2)
        shift = ScaledTranslation(WHISKER_STEP_PT * (i - (len(lines) - 1) / 2) / 72, 0, ax.figure.dpi_scale_trans)
        for x, low, high in zip(line.x, line.low, line.high, strict=False):
            if not np.isnan(low):
                whisker = {"color": look["color"], "lw": 0.8, "zorder": 3, "transform": ax.transData + shift}
                artists += ax.plot([x, x], [low, high], "-", **whisker)
        for artist in artists:
            tag(artist, line.series.method, line.series.backend)


def _stripes(linestyle: str | tuple, turn: int, turns: int) -> tuple[float, tuple[float, ...]]:
    """The dashes of a line style of which this is the ``turn``-th of ``turns`` curves' part."""
    on, *rest = linestyle[1] if isinstance(linestyle, tuple) else (STRIPE_PT, 0.0)
    dashes = [on, *rest] * int(np.ceil(STRIPE_PT / (on + sum(rest))))
    period = sum(dashes)
    return -turn * period % (turns * period), (*dashes[:-1], dashes[-1] + (turns - 1) * period)


def number_axis(ax: Axes, which: str, values: Iterable[float], log_ratio: float = np.inf, room: float = 0.06) -> None:
    """Give an axis short numbers (512, 1k, 2.5k), and a log scale where positive values range over ``log_ratio``."""
    axis = getattr(ax, f"{which}axis")
    low, high = min(values), max(values)
    if low > 0 and high / low > log_ratio:
        getattr(ax, f"set_{which}scale")("log")
        pad = max(room * np.log10(high / low), 0.02)
        getattr(ax, f"set_{which}lim")(low / 10**pad, high * 10**pad)
        few = LogLocator(subs=(1.0,) if high / low > 300 else (1.0, 2.0, 5.0), numticks=9)
        axis.set_major_locator(few if high / low > 5 else MaxNLocator(nbins=4))
        axis.set_minor_locator(NullLocator())
    else:
        ax.margins(**{which: 0.1})
        axis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: tick_number(value)))
