"""One look for every figure: labels, colours, hatches, line styles, sizes; and the table of what can be drawn.

Colours are Okabe and Ito's, which people with any common colour blindness can tell apart, with grey for the
baseline. A method has one colour everywhere. A backend changes no colour: it is told by hatch (bars), dashes and
marker (lines), and so survives black-and-white printing.

Figures are made at the width at which they are read, half a page or a page, so sizes below are the sizes on paper.
"""

from collections.abc import Callable
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


MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
ARROWS = {"lower": "\N{DOWNWARDS ARROW}", "higher": "\N{UPWARDS ARROW}"}
_SUFFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Metric:
    """One column of the table of results, and how it is drawn. ``unit`` is that of the result files."""

    key: str
    title: str
    axis: str  # short enough for a small panel
    unit: str = ""
    better: str = "lower"  # or "higher"
    reference: float | None = None  # the baseline's own value, where the metric compares with the baseline
    log_ratio: float = 40.0  # a wider range of values goes on a log axis, else the small ones cannot be read
    signed: bool = False  # may be negative

    def axis_label(self, largest: float) -> tuple[str, float]:
        """-> name, unit and the better direction of an axis, and the factor from the files' unit to the axis's.

        Times whose largest is below 1 read better in the next smaller unit.
        """
        smaller = {"s": "ms", "ms": "µs"}.get(self.unit) if 0 < largest < 1 else None
        unit = smaller or self.unit
        words = f"{self.axis} ({unit})" if unit else self.axis
        return f"{words} {ARROWS[self.better]}", 1e3 if smaller else 1.0


METRICS = {
    metric.key: metric
    for metric in (
        Metric("perplexity", "Perplexity", "perplexity", log_ratio=10.0),
        Metric(
            "ppl_increase_percent", "Perplexity increase over the baseline", "increase", "%", reference=0, signed=True
        ),
        Metric("runtime_sec", "Runtime: prefill and decode", "runtime", "s"),
        Metric("speedup", "Speedup over the baseline, whole run", "speedup", TIMES, "higher", reference=1),
        Metric("prefill_sec", "Prefill: until the prompt is in", "prefill", "s"),
        Metric("ttft_sec", "Time to first token: prefill and one step", "TTFT", "s"),
        Metric("first_token_latency_sec", "First decode step", "first step", "s"),
        Metric("decode_sec", "Decode: after the prefill", "decode", "s"),
        Metric("decode_toks_per_sec", "Decode throughput", "decode", "tokens/s", "higher"),
        Metric("tpot_ms", "Time per decoded token", "time per token", "ms"),
        Metric("peak_memory_mb", "Peak memory", "peak memory", "MB"),
        Metric("kv_cache_mb", "Keys and values held at the end", "KV cache", "MB"),
        Metric("math_over_prefill", "Prefill, time with math / time with it", "prefill", TIMES, "higher", 1),
        Metric("math_over_decode", "Decode step, time with math / time with it", "decode step", TIMES, "higher", 1),
    )
}


def short_number(value: float) -> str:
    """Three significant digits, at most five characters and a sign: 0.512, 23.4, 768, 1.23k, 4.10M."""
    if abs(value) >= 1e15:
        return f"{value:.0e}".replace("-", MINUS)
    if abs(value) < 5e-4:
        return "0"

    def three_digits(value: float) -> str:
        return f"{value:.{sum(abs(value) < limit for limit in (99.95, 9.995, 0.9995))}f}"

    return _shortened(value, 0.9995, three_digits)


def tick_number(value: float) -> str:
    """An axis tick: no trailing noughts, k and M for thousands and millions."""
    return _shortened(value, 1.0, "{:g}".format)


def _shortened(value: float, share: float, write: Callable[[float], str]) -> str:
    limit, suffix = next((s for s in _SUFFIXES if abs(value) >= share * s[0]), (1.0, ""))
    return f"{write(value / limit)}{suffix}".replace("-", MINUS)
