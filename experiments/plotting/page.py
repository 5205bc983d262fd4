"""A figure laid out in inches: title, legend, panels one below the other, caption.

Everything has a size that is known before anything is drawn: text is measured and wrapped, the legend gets the
columns that fit, and the page grows to what it holds. So nothing overlaps, with one series or eighteen, and no
layout engine has to search (which also takes most of the time of a small figure).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

from . import style

PT = 1 / 72
MARGIN = 0.07
COLUMN_IN = style.WIDTH_IN - 2 * MARGIN
MAX_BODY_IN = 9.6  # what fits on a page with legend and caption
LINE = 1.28  # line height in units of the font size
_HANDLE_PT = 19.0
_HANDLE_GAP_PT = 4.0
_COLUMN_GAP_PT = 8.0
# Lines break at spaces (not at no-break ones) and after hyphens between letters.
_PIECES = re.compile(r".*?(?:(?<=[^\W\d]-)(?=[^\W\d])| +|$)")


@dataclass(frozen=True)
class Panel:
    """The room of one axes, inches: its own height and what its labels need around it."""

    height: float
    below: float
    above: float = 0.05
    left: float = 0.47
    right: float = 0.06

    @property
    def total(self) -> float:
        """Height with everything around."""
        return self.above + self.height + self.below


@dataclass(frozen=True)
class Legend:
    """Handles and their labels; filled column by column."""

    handles: Sequence[Artist]
    labels: Sequence[str]
    max_columns: int = 3


@lru_cache(maxsize=4096)
def text_width(text: str, size: float, bold: bool = False) -> float:
    """Width of one line of text, in points."""
    font = FontProperties(family=style.RC["font.family"], size=size, weight="bold" if bold else "normal")
    return text_to_path.get_text_width_height_descent(text, font, False)[0]


def pieces(text: str) -> list[str]:
    """The parts of a text between which a line may break."""
    return [piece for piece in _PIECES.findall(text) if piece]


def wrap(text: str, width: float, size: float, bold: bool = False) -> list[str]:
    """Break text into lines of at most ``width`` points; within words only where it must be."""
    lines: list[str] = []
    line = ""
    for piece in pieces(text):
        if text_width((line + piece).strip(" "), size, bold) <= width:
            line += piece
            continue
        if line.strip():
            lines.append(line.strip(" "))
        while text_width(piece.strip(" "), size, bold) > width and len(piece) > 1:
            cut = _longest_prefix(piece, width, size, bold)
            lines.append(piece[:cut])
            piece = piece[cut:]
        line = piece
    return [*lines, line.strip(" ")] if line.strip() or not lines else lines


def _longest_prefix(word: str, width: float, size: float, bold: bool) -> int:
    cut = 1
    while cut + 1 < len(word) and text_width(word[: cut + 1], size, bold) <= width:
        cut += 1
    return cut


def legend_columns(labels: Sequence[str], width: float, at_most: int) -> int:
    """How many columns of a legend fit side by side into ``width`` points."""
    entry = max(text_width(label, style.SIZE_LEGEND) for label in labels)
    entry += _HANDLE_PT + _HANDLE_GAP_PT + _COLUMN_GAP_PT
    return max(1, min(at_most, len(labels), int((width + _COLUMN_GAP_PT) // entry)))


def in_columns(panels: Sequence[Panel], starts: Sequence[int]) -> list[list[Panel]]:
    """Panels in one column, or in two where one would be longer than a page.

    ``starts``: where the second column may begin: the indices of panels that begin something.
    """
    total = sum(panel.total for panel in panels)
    inner = [i for i in starts if 0 < i < len(panels)]
    if total <= MAX_BODY_IN or not inner:
        return [list(panels)]
    cut = min(inner, key=lambda i: abs(sum(panel.total for panel in panels[:i]) - total / 2))
    return [list(panels[:cut]), list(panels[cut:])]


def make_page(
    columns: Sequence[Sequence[Panel]],
    *,
    title: str,
    subtitle: str = "",
    legend: Legend | None = None,
    caption: Sequence[str] = (),
    notes: Sequence[str] = (),
    widths: Sequence[float] | None = None,
) -> tuple[Figure, list[Axes]]:
    """Make a figure with one axes per panel.

    Args:
        columns: Panels from top to bottom, column by column.
        caption: Paragraphs below the panels: what was measured, on what.
        notes: Paragraphs below the caption: what is missing.
        widths: Inches per column, margins excluded; by default each has half a page.

    Returns:
        The figure and its axes, column by column.
    """
    widths = widths or [COLUMN_IN] * len(columns)
    width = sum(widths) + 2 * MARGIN
    inner = sum(widths) / PT
    head = _lines([title], inner, style.SIZE_TITLE, style.INK, "bold")
    head += _lines([subtitle], inner, style.SIZE_NOTE, style.QUIET)
    foot = _lines(caption, inner, style.SIZE_NOTE, style.QUIET)
    foot += _lines(notes, inner, style.SIZE_NOTE, style.INK)
    legend_height, legend_cols = _legend_height(legend, inner)

    body = max(sum(panel.total for panel in column) for column in columns)
    height = 2 * MARGIN + _lines_height(head) + legend_height + body + _lines_height(foot) + (0.05 if foot else 0)

    figure = Figure(figsize=(width, height))
    y = _write(figure, head, height - MARGIN)
    if legend is not None:
        _draw_legend(figure, legend, legend_cols, y)
    y -= legend_height
    axes = []
    x = MARGIN
    for column, column_width in zip(columns, widths, strict=True):
        top = y
        for panel in column:
            bottom = top - panel.above - panel.height
            room = (x + panel.left, bottom, column_width - panel.left - panel.right, panel.height)
            axes.append(figure.add_axes(_relative(room, width, height)))
            top -= panel.total
        x += column_width
    _write(figure, foot, y - body - (0.05 if foot else 0))
    return figure, axes


def _relative(room: tuple[float, float, float, float], width: float, height: float) -> tuple[float, ...]:
    x, y, w, h = room
    return (x / width, y / height, w / width, h / height)


def _lines(paragraphs: Sequence[str], width: float, size: float, colour: str, weight: str = "normal") -> list[tuple]:
    lines = [line for text in paragraphs if text for line in wrap(text, width, size, weight == "bold")]
    return [(line, size, colour, weight) for line in lines]


def _lines_height(lines: Sequence[tuple]) -> float:
    return sum(size * LINE * PT for _, size, _, _ in lines)


def _write(figure: Figure, lines: Sequence[tuple], top: float) -> float:
    """Write lines from ``top`` (inches) downwards; -> the y below them."""
    width, height = figure.get_size_inches()
    for text, size, colour, weight in lines:
        top -= size * LINE * PT
        baseline = top + 0.28 * size * PT
        figure.text(MARGIN / width, baseline / height, text, size=size, color=colour, weight=weight, va="baseline")
    return top


def _legend_height(legend: Legend | None, width: float) -> tuple[float, int]:
    if legend is None or not legend.labels:
        return 0.0, 1
    columns = legend_columns(legend.labels, width, legend.max_columns)
    rows = -(-len(legend.labels) // columns)
    return (rows * style.SIZE_LEGEND * 1.45 + 5) * PT, columns


def _draw_legend(figure: Figure, legend: Legend, columns: int, top: float) -> None:
    width, height = figure.get_size_inches()
    if not legend.labels:
        return
    figure.legend(
        legend.handles,
        legend.labels,
        loc="upper left",
        bbox_to_anchor=(MARGIN / width, (top - 2 * PT) / height),
        ncols=columns,
        borderaxespad=0,
        borderpad=0,
        labelspacing=0.28,
        columnspacing=_COLUMN_GAP_PT / style.SIZE_LEGEND,
        handlelength=_HANDLE_PT / style.SIZE_LEGEND,
        handletextpad=_HANDLE_GAP_PT / style.SIZE_LEGEND,
    )
