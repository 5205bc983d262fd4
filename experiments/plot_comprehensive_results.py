"""The whole matrix: every method, backend and metric, a page per data set; and what the kernel changes.

    python experiments/plot_comprehensive_results.py
    python experiments/plot_comprehensive_results.py --results-dir results/h100 --output-dir figures/h100 --format pdf

Writes comprehensive_<dataset> (with the mode of older results in the name), and comprehensive_kernel_ratio: how many
times longer a method takes with the math kernel than with another, for prefill and for decode.
"""

import sys
from pathlib import Path

if not __package__:  # as a script, on a machine where the project is not installed: drawing needs no torch
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.plotting.bars import bar_figure
from experiments.plotting.captions import memory_note, missing_lines
from experiments.plotting.script import Drawing, main
from experiments.plotting.style import MODE_LABELS
from experiments.plotting.table import REFERENCE_BACKEND, Results

MATRIX = (
    "perplexity",
    "speedup",
    "runtime_sec",
    "decode_toks_per_sec",
    "prefill_sec",
    "ttft_sec",
    "kv_cache_mb",
    "peak_memory_mb",
)
RATIOS = ("math_over_prefill", "math_over_decode")


def draw(results: Results) -> list[Drawing]:
    """All figures of this script."""
    drawings = []
    for (mode, dataset), cells in results.cells.groupby(["mode", "dataset"]):
        words = f", {MODE_LABELS[mode]}" if mode else ""
        keys = [key for key in MATRIX if cells[key].notna().any()]
        figure = bar_figure(cells, keys, f"All metrics{words}", [memory_note(cells)])
        name = f"comprehensive_{dataset}{f'_{mode}' if mode else ''}"
        drawings.append(Drawing(name, figure, missing_lines(cells, keys)))
    # What the kernel switch is for; nothing to show where all results have one backend.
    stated = results.cells[results.cells["stated"].astype(bool)]
    others = stated[stated["backend"] != REFERENCE_BACKEND]
    note = "right of the line: the kernel that the legend names is faster than math"
    figure = bar_figure(others, RATIOS, "Time with math / time with another kernel", [note])
    lines = missing_lines(others, RATIOS) if figure else []
    if len(stated) and not figure:
        lines = [f"math against another kernel: all results have the backend {stated['backend'].iloc[0]}"]
    return [*drawings, Drawing("comprehensive_kernel_ratio", figure, lines)]


if __name__ == "__main__":
    sys.exit(main(draw, __doc__))
