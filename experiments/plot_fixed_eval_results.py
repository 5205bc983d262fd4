"""Bars by data set: what each method costs in perplexity and gains in time, backends side by side.

    python experiments/plot_fixed_eval_results.py
    python experiments/plot_fixed_eval_results.py --results-dir results/h200 --output-dir figures/h200 --format png pdf

Writes fixed_eval_{perplexity,ppl_increase,runtime,speedup,ttft,prefill}, and fixed_eval_summary with the main four on
one page. Results of an older mode (chunked, decode_loop, ...) get figures of their own, with the mode in the name.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # as a script, on a machine where the project is not installed: drawing needs no torch
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from matplotlib.figure import Figure

from experiments.plotting.bars import figure_of_charts
from experiments.plotting.captions import caption
from experiments.plotting.metrics import METRICS, TIMES
from experiments.plotting.records import Record, ResultSet
from experiments.plotting.script import Drawing, main
from experiments.plotting.series import BarChart, bar_chart, describe_missing, modes
from experiments.plotting.style import MODE_LABELS

FIGURES = {
    "perplexity": "perplexity",
    "ppl_increase": "ppl_increase_percent",
    "runtime": "runtime_sec",
    "speedup": "speedup",
    "ttft": "ttft_sec",
    "prefill": "prefill_sec",
}
SUMMARY = ("perplexity", "runtime_sec", "speedup", "prefill_sec")
# In a figure a reason is kept short; the console has all of it.
REASON_CHARS = 90


def plot_metric(records: Sequence[Record], key: str) -> Figure | None:
    """One metric, by data set, method and backend; None where no record has it."""
    return _figure([bar_chart(records, METRICS[key])], records, METRICS[key].title, METRICS[key].subtitle)


def plot_summary(records: Sequence[Record]) -> Figure | None:
    """The main metrics on one page."""
    return _figure([bar_chart(records, METRICS[key]) for key in SUMMARY], records, "Quality and speed at a glance")


def draw(results: ResultSet) -> list[Drawing]:
    """All figures of this script."""
    drawings = []
    for mode in modes(results.records):
        records = [r for r in results.records if r.series.mode == mode]
        suffix = f"_{mode}" if mode else ""
        for name, key in FIGURES.items():
            chart = bar_chart(records, METRICS[key])
            figure = plot_metric(records, key)
            drawings.append(Drawing(f"fixed_eval_{name}{suffix}", figure, tuple(chart.missing_lines())))
        drawings.append(Drawing(f"fixed_eval_summary{suffix}", plot_summary(records)))
    return drawings


def _figure(charts: list[BarChart], records: Sequence[Record], title: str, subtitle: str = "") -> Figure | None:
    charts = [chart for chart in charts if chart.values]
    if not charts:
        return None
    mode = records[0].series.mode
    missing = tuple(dict.fromkeys(cell for chart in charts for cell in chart.missing))
    lines = describe_missing(missing, charts[0].datasets, REASON_CHARS)
    return figure_of_charts(
        charts,
        title=f"{title}, {MODE_LABELS[mode]}" if mode else title,
        subtitle=subtitle,
        caption=[text for text in [caption(records)] if text],
        notes=[f"{TIMES} {line}" for line in lines],
    )


if __name__ == "__main__":
    sys.exit(main(draw, __doc__.splitlines()[0]))
