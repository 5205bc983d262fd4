"""A figure as SVG that can stand in a page: ids of its own, the page's colours, marks that the page can filter."""

import html
import re

from matplotlib.figure import Figure

from . import style
from .output import render

# Text, axes and paper follow the page's theme; the methods' colours stay.
_THEME = {
    style.INK: "var(--ink)",
    style.QUIET: "var(--quiet)",
    style.GRID: "var(--grid)",
    style.BAND: "var(--band)",
    "#ffffff": "var(--paper)",
}
_PROLOGUE = re.compile(r"^.*?(?=<svg\b)", re.DOTALL)
_METADATA = re.compile(r"\s*<metadata>.*?</metadata>|\s*<style type=\"text/css\">.*?</style>", re.DOTALL)
_ID = re.compile(r'\bid="([^"]+)"')
_REFERENCE = re.compile(r'(url\(#|xlink:href="#)')
_CELL = re.compile(r'<g id="[^"]*?cell--([^"]*?)--([^"]*?)--([^"]*?)--[^"]*">')
_STYLE = re.compile(r'style="([^"]*)"')
_SIZE = re.compile(r'(<svg\b[^>]*?) width="([\d.]+)pt" height="[\d.]+pt"')


def inline_svg(figure: Figure, prefix: str, label: str) -> str:
    """The ``<svg>`` element of a figure.

    Args:
        prefix: Goes before every id, so that several figures can stand in one page.
        label: What a screen reader says.
    """
    rc = {"svg.fonttype": "none", "savefig.transparent": True}  # text stays text
    text = render(figure, "svg", **rc).decode("utf-8")
    text = _METADATA.sub("", _PROLOGUE.sub("", text, count=1))
    text = _ID.sub(rf'id="{prefix}\1"', text)
    text = _REFERENCE.sub(rf"\g<1>{prefix}", text)
    text = _CELL.sub(r'<g class="cell" data-method="\1" data-backend="\2" data-dataset="\3">', text)
    text = _STYLE.sub(lambda match: f'style="{_themed(match[1])}"', text)
    named = rf'\1 role="img" aria-label="{html.escape(label)}" data-width="\2"'
    return re.sub(r"\n\s*", "\n", _SIZE.sub(named, text, count=1)).strip()


def _themed(css: str) -> str:
    for colour, variable in _THEME.items():
        css = css.replace(colour.lower(), variable)
    return css.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
