"""One look for every figure: labels, colours, hatches, line styles, sizes.

Colours are Okabe and Ito's, which people with any common colour blindness can tell apart, with grey for the
baseline. A method has one colour everywhere. A backend changes no colour: it is told by hatch (bars), line style and
marker face (lines), and so survives black-and-white printing.

Figures are made at the width at which they are read, half a page, so sizes below are the sizes on paper.
"""

from dataclasses import dataclass

WIDTH_IN = 3.4  # half a page
PNG_DPI = 220

SIZE_TITLE = 8.5
SIZE_LABEL = 7.0
SIZE_TICK = 6.5
SIZE_LEGEND = 6.5
SIZE_VALUE = 5.5
SIZE_NOTE = 6.0

INK = "#222222"
QUIET = "#666666"
GRID = "#DDDDDD"
BAND = "#EEEEEE"


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
    "baseline": MethodStyle("Baseline", "#7F7F7F", "s"),
    "streaming": MethodStyle("StreamingLLM", "#0072B2", "o"),
    "mit": MethodStyle("StreamingLLM (original)", "#56B4E9", "v"),
    "kvpress": MethodStyle("KVPress", "#E69F00", "^"),
    "window": MethodStyle("Window", "#CC79A7", "D"),
    "dense": MethodStyle("Dense", "#D55E00", "X"),
}

BACKENDS = {
    "math": BackendStyle("", "-", True, 3.4),
    "flash": BackendStyle("//////", (0, (4, 1.6)), False, 5.2),
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

MODE_LABELS = {
    "chunked": "chunked",
    "decode_loop": "decode loop",
    "kvpress_official": "kvpress official",
}

RC = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so a figure looks the same on every machine
    "font.size": SIZE_LABEL,
    "text.color": INK,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.labelsize": SIZE_LABEL,
    "axes.labelpad": 2.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": SIZE_TICK,
    "ytick.labelsize": SIZE_TICK,
    "xtick.major.size": 2,
    "ytick.major.size": 2,
    "xtick.minor.size": 1.2,
    "ytick.minor.size": 1.2,
    "xtick.major.width": 0.5,
    "ytick.major.width": 0.5,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "xtick.major.pad": 2,
    "ytick.major.pad": 2,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.6,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": SIZE_LEGEND,
    "figure.dpi": 100,
    "savefig.dpi": PNG_DPI,
    "pdf.fonttype": 42,
    "svg.hashsalt": "streaming-llm",  # else the ids in an SVG differ from run to run
    "text.usetex": False,
    "path.simplify": True,
}


def series_label(method: str, backend: str | None, mode: str | None = None) -> str:
    """The label of a series: ``StreamingLLM (flash)``; ``StreamingLLM`` where the files state no backend."""
    label = METHODS[method].label
    if backend is not None:
        label = f"{label[:-1]}, {backend})" if label.endswith(")") else f"{label} ({backend})"
    return f"{label}, {MODE_LABELS[mode]}" if mode else label


def dataset_label(key: str) -> str:
    """How a data set's key reads on an axis."""
    return DATASET_LABELS.get(key, key.replace("_", " "))
