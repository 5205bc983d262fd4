"""Perplexity and memory against the position in the stream: what eviction costs, and what not evicting costs.

    python experiments/run_final_experiments.py --save-token-nll --methods baseline streaming window dense ...
    python experiments/plot_stream_curves.py

Writes stream_curves. Needs losses per token, which a run stores next to its results with --save-token-nll.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

if not __package__:  # as a script, on a machine where the project is not installed: drawing needs no torch
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.plotting.captions import caption
from experiments.plotting.curves import MIN_BIN_TOKENS, memory_line, perplexity_line, without_curve
from experiments.plotting.lines import Line, draw_lines, line_handles, log_limits, number_axis, wide
from experiments.plotting.metrics import TIMES
from experiments.plotting.page import Panel, in_columns, make_page
from experiments.plotting.records import LossCurve, Record, ResultSet
from experiments.plotting.script import Drawing, main
from experiments.plotting.series import Missing, describe_missing, sorted_datasets
from experiments.plotting.style import QUIET, SIZE_LABEL, SIZE_NOTE, dataset_label

POSITION = "position in the stream (tokens)"
NO_LOSSES = "no losses were stored (--save-token-nll)"


def plot_stream_curves(results: ResultSet) -> Figure | None:
    """A panel of perplexity per data set, and one of memory; None where no losses were stored."""
    curves = sorted(results.curves, key=lambda c: (c.dataset, c.series.order))
    if not curves:
        return None
    datasets = sorted_datasets(curves)
    records = [r for r in results.records if r.dataset in datasets and r.status == "ok"]
    length = max(int(c.position[-1]) + 1 for c in curves)
    panels = [Panel(1.22, 0.2, 0.2) for _ in datasets] + [Panel(0.95, 0.2, 0.2)]
    columns = in_columns(panels, range(len(panels)))
    for column in columns:
        column[-1] = replace(column[-1], below=0.36)  # room for the label of the axis
    figure, axes = make_page(
        columns,
        title="A stream longer than the cache",
        subtitle="perplexity: lower is better; dotted: the cache is full",
        legend=line_handles(sorted({c.series for c in curves}, key=lambda s: s.order)),
        caption=[_caption(records)],
        notes=[f"{TIMES} {line}" for line in describe_missing(missing_curves(results), datasets, 90)],
    )
    cache_size = _one({r.conditions.cache_size for r in records})
    for ax, dataset in zip(axes, datasets, strict=False):
        draw_perplexity(ax, [c for c in curves if c.dataset == dataset], length)
        ax.set_title(f"Perplexity, {dataset_label(dataset)}", loc="left", size=SIZE_LABEL, pad=3, weight="bold")
    shown = {c.series for c in curves}
    draw_memory(axes[-1], [r for r in records if r.series in shown], length)
    for ax in axes:
        ax.set_xlim(*log_limits([MIN_BIN_TOKENS / 2, length], 0.02))
        number_axis(ax, "x", log=True)
        if cache_size:
            ax.axvline(cache_size, color=QUIET, lw=0.8, ls=":", zorder=1)
    for last in accumulate(map(len, columns)):
        axes[last - 1].set_xlabel(POSITION)
    return figure


def draw_perplexity(ax: Axes, curves: Sequence[LossCurve], length: int) -> None:
    """Perplexity by position on one data set."""
    lines = [perplexity_line(curve) for curve in curves]
    values = [y for line in lines for y in line.y]
    draw_lines(ax, lines, markers_every=4 if length > 1000 else 2, dataset=curves[0].dataset)
    if wide(values):
        ax.set_yscale("log")
        ax.set_ylim(*log_limits(values))
    number_axis(ax, "y", log=wide(values))
    ax.set_ylabel("perplexity")


def draw_memory(ax: Axes, records: Sequence[Record], length: int) -> None:
    """Keys and values by position: of the first data set that has them, since the text makes no difference."""
    lines: dict[object, Line] = {}
    for record in records:
        line = memory_line(record, length)
        if line is not None:
            lines.setdefault(record.series, line)
    ax.set_title("Memory: keys and values held between steps", loc="left", size=SIZE_LABEL, pad=3, weight="bold")
    ax.set_ylabel("MB")
    if not lines:
        ax.text(0.5, 0.5, "not in the result files", transform=ax.transAxes, ha="center", size=SIZE_NOTE, color=QUIET)
        ax.set_yticks([])
        return
    draw_lines(ax, sorted(lines.values(), key=lambda line: line.series.order), markers_every=16)
    top = max(y for line in lines.values() for y in line.y)
    ax.set_ylim(-0.05 * top, 1.1 * top)
    number_axis(ax, "y")


def missing_curves(results: ResultSet) -> list[Missing]:
    """The cells of the drawn data sets whose losses are not there, with the reason."""
    missing = []
    for record in without_curve(results.records, results.curves):
        reason = record.missing_reason("perplexity") if "perplexity" not in record.values else NO_LOSSES
        missing.append(Missing(record.dataset, record.series, reason))
    return missing


def draw(results: ResultSet) -> list[Drawing]:
    """All figures of this script."""
    if not results.curves:
        return [Drawing("stream_curves", None, (f"curves over the stream: {NO_LOSSES}",))]
    lines = describe_missing(missing_curves(results), sorted_datasets(results.curves))
    return [Drawing("stream_curves", plot_stream_curves(results), tuple(f"losses: {line}" for line in lines))]


def _caption(records: Sequence[Record]) -> str:
    text = caption(records, vary=("tokens",), repeats=False)
    return f"{text} · mean\xa0loss\xa0over\xa0bins\xa0of\xa0{MIN_BIN_TOKENS}\xa0tokens\xa0or\xa0more" if text else ""


def _one(values: set) -> int | None:
    return values.pop() if len(values) == 1 else None


if __name__ == "__main__":
    sys.exit(main(draw, __doc__.splitlines()[0]))
