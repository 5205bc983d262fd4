"""The decode loop, one token at a time: rate, time per token, first step and perplexity, backends side by side.

    python experiments/plot_decode_loop_comparison.py
    python experiments/plot_decode_loop_comparison.py --results-dir results/h200 --format pdf

Writes decode_loop_comparison. Today's results all come from the decode loop; of the older ones, those whose name
says decode_loop are drawn, as series of their own.
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
from experiments.plotting.series import BarChart, bar_chart, describe_missing

KEYS = ("decode_toks_per_sec", "tpot_ms", "first_token_latency_sec", "perplexity")
# What older files have in place of a time per token.
OLDER_KEYS = ("runtime_sec",)


def decode_loop_records(results: ResultSet) -> list[Record]:
    """The records that were measured in a decode loop."""
    return [
        r
        for r in results.records
        if r.series.mode == "decode_loop" or (r.series.mode is None and r.series.backend_stated)
    ]


def decode_loop_charts(records: Sequence[Record]) -> list[BarChart]:
    """One chart per metric that any record has."""
    older = any(r.status == "ok" and "tpot_ms" not in r.values for r in records)
    charts = [bar_chart(records, METRICS[key]) for key in (KEYS + OLDER_KEYS if older else KEYS)]
    return [chart for chart in charts if chart.values]


def plot_decode_loop(records: Sequence[Record]) -> Figure | None:
    """All metrics of the decode loop on one page; None where no record has any."""
    charts = decode_loop_charts(records)
    if not charts:
        return None
    missing = tuple(dict.fromkeys(cell for chart in charts for cell in chart.missing))
    return figure_of_charts(
        charts,
        title="The decode loop, token by token",
        caption=[caption(records)],
        notes=[f"{TIMES} {line}" for line in describe_missing(missing, charts[0].datasets, 90)],
    )


def draw(results: ResultSet) -> list[Drawing]:
    """All figures of this script."""
    records = decode_loop_records(results)
    lines = [line for chart in decode_loop_charts(records) for line in chart.missing_lines()]
    return [Drawing("decode_loop_comparison", plot_decode_loop(records), tuple(lines))]


if __name__ == "__main__":
    sys.exit(main(draw, __doc__.splitlines()[0]))
