"""One look for every figure: labels, colours, hatches, line styles, sizes.

Colours are Okabe and Ito's, which people with any common colour blindness can tell apart, with grey for the
baseline. A method has one colour everywhere. A backend changes no colour: it is told by hatch (bars), dashes and
marker (lines), and so survives black-and-white printing.

Figures are made at the width at which they are read, half a page or a page, so sizes below are the sizes on paper.
"""

from dataclasses import dataclass

HALF_PAGE_IN = 3.4
SIZE_TITLE, SIZE_LABEL, SIZE_TICK, SIZE_VALUE, SIZE_NOTE = 8.5, 7.0, 6.5, 5.5, 6.0
INK, QUIET, GRID, BAND = "#222222", "#666666", "#dddddd", "#eeeeee"


@dataclass(frozen=True)
class MethodStyle:
    """How a method is called and drawn."""

    label: str
    colour: str
    marker: str


@dataclass(frozen=True)
class BackendStyle:
    """How a backend shows: on bars by hatch, on lines by dashes and by a filled or hollow marker."""

    hatch: str
    linestyle: str | tuple[int, tuple[float, ...]]
    filled: bool
    marker_size: float  # points; rings of growing size, so that none hides another


# In the order in which figures show them.
METHODS = {
    "baseline": MethodStyle("Baseline", "#7f7f7f", "s"),
    "streaming": MethodStyle("StreamingLLM", "#0072b2", "o"),
    "mit": MethodStyle("StreamingLLM (original)", "#56b4e9", "v"),
    "kvpress": MethodStyle("KVPress", "#e69f00", "^"),
    "window": MethodStyle("Window", "#cc79a7", "D"),
    "dense": MethodStyle("Dense", "#d55e00", "X"),
    "gapped": MethodStyle("Gapped", "#009e73", "P"),
    "rerotated": MethodStyle("Re-rotated", "#a6761d", "h"),
}

BACKENDS = {
    "math": BackendStyle("", "-", True, 3.4),
    "flash": BackendStyle("////", (0, (4, 1.6)), False, 5.2),
    "cudnn": BackendStyle("-----", (0, (1, 1.2)), False, 7.0),
    "efficient": BackendStyle("xxxxxx", (0, (4, 1.2, 1, 1.2)), False, 8.8),
}
# Lines of older files that name no backend: neither math's nor flash's.
UNSTATED_LINESTYLE = (0, (6, 1, 1, 1))

DATASET_LABELS = {
    "wikitext": "WikiText-103",
    "pg19": "PG19",
    "demo_encyclopaedia": "Demo encyclopaedia",
    "demo_narrative": "Demo narrative",
}
MODE_LABELS = {"chunked": "chunked", "decode_loop": "decode loop", "kvpress_official": "kvpress official"}

RC = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so a figure looks the same on every machine
    "font.size": SIZE_LABEL,
    "text.color": INK,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.labelsize": SIZE_TICK,
    "axes.labelpad": 2.0,
    "axes.linewidth": 0.6,
    "axes.titlelocation": "left",
    "axes.titlepad": 3.0,
    "axes.titlesize": SIZE_LABEL,
    "axes.titley": 1.0,  # else matplotlib searches for it, which takes long
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    **{f"{axis}tick.{key}": value for axis in "xy" for key, value in {
        "color": QUIET, "labelcolor": INK, "labelsize": SIZE_TICK, "major.size": 2, "major.width": 0.5, "major.pad": 2,
    }.items()},
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": SIZE_TICK,
    "legend.borderpad": 0,
    "legend.borderaxespad": 0.7,
    "legend.labelspacing": 0.28,
    "legend.columnspacing": 1.2,
    "legend.handletextpad": 0.6,
    "figure.dpi": 220,  # the layout is made at the resolution of the PNG
    "savefig.dpi": "figure",
    "text.hinting": "none",  # at this resolution glyphs need none, and all formats have the same
    "pdf.fonttype": 42,
    "svg.hashsalt": "streaming-llm",  # else the ids in an SVG differ from run to run
}  # fmt: skip


def series_label(method: str, backend: str | None, mode: str = "") -> str:
    """The label of a series: ``StreamingLLM (flash)``; ``StreamingLLM`` where the files state no backend."""
    label = METHODS[method].label
    if backend is not None:
        label = f"{label[:-1]}, {backend})" if label.endswith(")") else f"{label} ({backend})"
    return f"{label}, {MODE_LABELS[mode]}" if mode else label


def dataset_label(key: str) -> str:
    """How a data set's key reads on an axis."""
    return DATASET_LABELS.get(key, key.replace("_", " "))
