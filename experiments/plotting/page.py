"""A page of panels: title and legend above them, caption below, all laid out by matplotlib's constrained layout.

The title is the legend's, and the caption the figure's label of the x axis: these are what constrained layout keeps
room for outside the axes. Only the page's height and the wrapping of text are worked out here.
"""

import io
import re
import textwrap
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import matplotlib as mpl
import numpy as np
from jinja2 import Environment, FileSystemLoader
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.textpath import text_to_path

from . import style
from .style import TIMES

FORMATS = ("png", "pdf", "svg")
MARGIN_IN = 0.06
_HANDLE = 3.0  # a legend's handle and the gaps around it, in units of the font size
_GAPS = 1.8
# Dates and versions that matplotlib would write by itself: off, so that the same figure has the same bytes.
_METADATA = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "svg": {"Date": None, "Creator": None},
}


@lru_cache(maxsize=4096)
def text_width(text: str, size: float, bold: bool = False) -> float:
    """Width of one line of text, in inches."""
    font = FontProperties(family=style.RC["font.family"], size=size, weight="bold" if bold else "normal")
    return text_to_path.get_text_width_height_descent(text, font, False)[0] / 72


def wrap(text: str, inches: float, size: float, bold: bool = False) -> list[str]:
    """Break text into lines that fit; within words only where it must be."""
    lines, characters = [text] if text else [], len(text)
    while characters > 1 and max(text_width(line, size, bold) for line in lines) > inches:
        characters = min(characters - 1, int(1.1 * len(text) * inches / text_width(text, size, bold)))
        lines = textwrap.wrap(text, characters)
    return lines


def new_page(
    rows: int,
    columns: int,
    panel_in: float,
    *,
    title: str,
    handles: Sequence[Artist],
    caption: Iterable[str] = (),
    missing: Iterable[str] = (),
    width_in: float = style.HALF_PAGE_IN,
    across: int = 0,
    **subplots: object,
) -> tuple[Figure, np.ndarray]:
    """Make a figure with a grid of panels.

    Args:
        panel_in: Height of a row of panels with its labels, inches.
        handles: The legend's, with their labels.
        caption: Paragraphs: what was measured, on what.
        missing: What is missing, a paragraph each.
        across: Where so many handles in a row belong together and there is room for them side by side, they are.
        subplots: For ``Figure.subplots``.

    Returns:
        The figure and its axes ``[rows, columns]``.
    """
    inner = width_in - 2 * MARGIN_IN
    head = wrap(title, inner, style.SIZE_TITLE, bold=True)
    notes = [*caption, *(f"{TIMES} {line}" for line in missing)]
    foot = [line for text in notes for line in wrap(text, inner, style.SIZE_NOTE)]
    entry = max(text_width(h.get_label(), style.SIZE_TICK) for h in handles) + (_HANDLE + _GAPS) * style.SIZE_TICK / 72
    columns_fit = max(1, min(int(inner / entry), len(handles)))
    if 1 < across <= columns_fit:  # legends are filled column by column
        handles, columns_fit = [h for i in range(across) for h in handles[i::across]], across
    lines = [len(head) * style.SIZE_TITLE, -(-len(handles) // columns_fit) * style.SIZE_TICK * 1.1]
    lines.append(len(foot) * style.SIZE_NOTE)
    height = rows * panel_in + sum(lines) * 1.3 / 72 + 6 * MARGIN_IN
    layout = ConstrainedLayoutEngine(w_pad=MARGIN_IN / 2, h_pad=MARGIN_IN, wspace=0, hspace=0)
    figure = Figure((width_in, height), layout=layout)
    FigureCanvasAgg(figure)  # which measures text for the layout
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=columns_fit,
        handlelength=_HANDLE,
        title="\n".join(head),
        title_fontproperties={"size": style.SIZE_TITLE, "weight": "bold"},
        alignment="left",
    )
    figure.supxlabel("\n".join(foot), x=MARGIN_IN / width_in, ha="left", size=style.SIZE_NOTE, color=style.QUIET)
    return figure, figure.subplots(rows, columns, squeeze=False, **subplots)


def render(figure: Figure, suffix: str, **rc: object) -> bytes:
    """The bytes of a figure in one of ``FORMATS``, the same each time. ``rc``: settings beside the common style."""
    buffer = io.BytesIO()
    with mpl.rc_context({**style.RC, **rc}):
        if (layout := figure.get_layout_engine()) is not None:  # once, for all formats
            layout.execute(figure)
            figure.set_layout_engine(None)
        fast = {"pil_kwargs": {"compress_level": 3}} if suffix == "png" else {}
        figure.savefig(buffer, format=suffix, metadata=_METADATA[suffix], **fast)
    return buffer.getvalue()


def embedded(figure: Figure, name: str, group: str) -> str:
    """A figure as an ``<svg>`` of a page that holds several, with ids of its own; text stays text."""
    svg = render(figure, "svg", **{"svg.fonttype": "none", "savefig.transparent": True}).decode("utf-8")
    svg = re.sub(r"\s*<metadata>.*?</metadata>|\s*<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{safe_name(group)}-{name}-", svg)
    role = f' role="img" aria-label="{name.replace("_", " ")}"'
    return re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', role, svg, count=1)


def fill_template(template: str, **values: object) -> str:
    """A page from a template of this folder."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(template).render(**values)


def tag(artist: Artist, method: str, backend: str) -> None:
    """Name what an artist shows: becomes the id of its group in an SVG, by which the report filters figures."""
    panel, number = artist.figure.axes.index(artist.axes), artist.axes.get_children().index(artist)
    artist.set_gid(f"cell--{method}--{backend}--{panel}-{number}")


def save(figure: Figure, name: str, folder: Path, formats: Iterable[str]) -> list[Path]:
    """Write ``<folder>/<name>.<format>`` for each format; -> the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for suffix in formats:
        paths.append(folder / f"{name}.{suffix}")
        paths[-1].write_bytes(render(figure, suffix))
    return paths


def safe_name(text: str) -> str:
    """A data set's key as part of a file's name or of an id."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in text)
