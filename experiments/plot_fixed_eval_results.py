"""Bars by data set: what each method costs in perplexity and gains in time, backends side by side.

    python experiments/plot_fixed_eval_results.py
    python experiments/plot_fixed_eval_results.py --results-dir results/h100 --output-dir figures/h100 --format png pdf

Writes fixed_eval_{perplexity,ppl_increase,runtime,speedup,ttft,prefill}, and fixed_eval_summary with the main four on
one page. Results of an older mode (chunked, decode_loop, ...) get figures of their own, with the mode in the name.
"""

import sys
from pathlib import Path

if not __package__:  # as a script, on a machine where the project is not installed: drawing needs no torch
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.plotting.bars import bar_figure
from experiments.plotting.captions import missing_lines
from experiments.plotting.script import Drawing, main
from experiments.plotting.style import METRICS, MODE_LABELS
from experiments.plotting.table import Results

FIGURES = {
    "perplexity": "perplexity",
    "ppl_increase": "ppl_increase_percent",
    "runtime": "runtime_sec",
    "speedup": "speedup",
    "ttft": "ttft_sec",
    "prefill": "prefill_sec",
}
SUMMARY = ("perplexity", "runtime_sec", "speedup", "prefill_sec")


def draw(results: Results) -> list[Drawing]:
    """All figures of this script."""
    drawings = []
    for mode, cells in results.cells.groupby("mode"):
        suffix, words = (f"_{mode}", f", {MODE_LABELS[mode]}") if mode else ("", "")
        for name, key in FIGURES.items():
            # Where the metric compares with the baseline, the baseline is the line.
            rows = cells if METRICS[key].reference is None else cells[cells["method"] != "baseline"]
            notes = [] if METRICS[key].reference is None else ["line: the baseline with the same backend"]
            figure = bar_figure(rows, [key], METRICS[key].title + words, notes)
            drawings.append(Drawing(f"fixed_eval_{name}{suffix}", figure, missing_lines(rows, [key])))
        title = "Quality and speed at a glance" if cells["perplexity"].notna().any() else "Speed at a glance"
        figure = bar_figure(cells, SUMMARY, f"{title}{words}")
        drawings.append(Drawing(f"fixed_eval_summary{suffix}", figure))
    return drawings


if __name__ == "__main__":
    sys.exit(main(draw, __doc__))
