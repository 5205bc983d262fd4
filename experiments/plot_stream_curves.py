"""Perplexity and memory against the position in the stream: what eviction costs, and what not evicting costs.

    python experiments/run_final_experiments.py --save-token-nll --methods baseline streaming window dense ...
    python experiments/plot_stream_curves.py

Writes stream_curves, a column of panels for each backend. Needs losses per token, which a run stores next to its
results with --save-token-nll.
"""

import sys
from itertools import pairwise
from pathlib import Path

if not __package__:  # as a script, on a machine where the project is not installed: drawing needs no torch
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.plotting.captions import caption, missing_lines
from experiments.plotting.lines import Line, draw_lines, line_handles, line_styles, number_axis
from experiments.plotting.page import new_page, wrap
from experiments.plotting.script import Drawing, main
from experiments.plotting.style import BACKENDS, HALF_PAGE_IN, QUIET, SIZE_LABEL, dataset_label
from experiments.plotting.table import Results, backends_of_each, series_of

NO_LOSSES = "no losses were stored (--save-token-nll)"
MIN_BIN_TOKENS = 64
BIN_RATIO = 2**0.5
MEMORY_POINTS = 96
PANEL_IN = 1.5


def bin_edges(length: int) -> list[int]:
    """Positions that part a stream into bins: of equal width on a log axis, and of at least ``MIN_BIN_TOKENS``.

    The last bin takes a remainder too small for a bin of its own.
    """
    edges = [1]
    while edges[-1] < length:
        edges.append(max(edges[-1] + MIN_BIN_TOKENS, round(edges[-1] * BIN_RATIO)))
    edges[-1] = length
    if len(edges) > 2 and edges[-1] - edges[-2] < MIN_BIN_TOKENS:
        del edges[-2]
    return edges


def perplexity_line(loss: object) -> Line:
    """Perplexity by position: exp of the mean loss in each bin, at the bin's geometric middle."""
    x, y = [], []
    for low, high in pairwise(bin_edges(int(loss.position[-1]) + 1)):
        inside = (loss.position >= low) & (loss.position < high)
        if inside.any():
            x.append(float(np.sqrt(low * (high - 1.0))) if low > 1 else (high - 1) / 2)
            y.append(float(np.exp(loss.nll[inside].mean())))
    return Line(loss, x, y)


def memory_line(row: object, length: int) -> Line:
    """Keys and values held by position, in MB, up to stream position ``length``.

    They grow by ``kv_bytes_per_token`` per token, up to what was held at the end of the run (``kv_cache_mb``); a
    method that held every token it was fed grows on.
    """
    position = np.unique(np.geomspace(1, length, MEMORY_POINTS).round())
    megabytes = (position + 1) * row.kv_bytes_per_token / 1e6
    # The tokens fed to the run that was measured (a sample, where losses were scored apart).
    fed = next(n for n in (row.prompt_tokens + row.decode_tokens, row.num_tokens, length) if n > 0)
    if row.kv_bytes_per_token == 0 or row.kv_cache_mb < 0.99 * (fed - 1) * row.kv_bytes_per_token / 1e6:
        megabytes = np.minimum(megabytes, row.kv_cache_mb)
    return Line(row, position, megabytes)


def missing(results: Results, longest: int = 0) -> list[str]:
    """The cells of the drawn data sets whose losses are not there, with the reason."""
    have = {(loss["dataset"], loss["label"]) for loss in results.losses}
    rows = results.cells[results.cells["dataset"].isin({dataset for dataset, _ in have})]
    rows = rows[[cell not in have for cell in zip(rows["dataset"], rows["label"], strict=True)]]
    measured = rows["perplexity"].notna()
    status, reason = rows["status"].mask(measured, "absent"), rows["reason"].mask(measured, NO_LOSSES)
    return missing_lines(rows.assign(status=status, reason=reason), ["perplexity"], longest)


def plot_stream_curves(results: Results) -> Figure | None:
    """A panel of perplexity for each data set and one of memory, by backend; None where no losses were stored."""
    losses = pd.DataFrame(results.losses)
    if losses.empty:
        return None
    series, datasets = series_of(losses), sorted(losses["dataset"].unique())
    backends = [backend for backend in BACKENDS if backend in set(losses["backend"])]
    styles = [line_styles([row for row in series if row.backend == backend]) for backend in backends]
    cells = results.cells[results.cells["dataset"].isin(datasets)]
    length = max(int(position[-1]) + 1 for position in losses["position"])
    panels = [
        (f"Perplexity, {dataset_label(d)}", "perplexity", [perplexity_line(loss) for loss in rows.itertuples()])
        for d, rows in losses.groupby("dataset")
    ]
    held = cells.dropna(subset=["kv_cache_mb", "kv_bytes_per_token"]).drop_duplicates("label")  # any text: the same
    memory = [memory_line(row, length) for row in held.itertuples() if row.label in set(losses["label"])]
    if memory:
        panels.append(("Memory: keys and values between steps", "MB", memory))
    note = f"mean loss over bins of {MIN_BIN_TOKENS} tokens or more; dotted: the cache is full"
    width_in = HALF_PAGE_IN * min(2, len(backends))
    figure, axes = new_page(
        len(panels),
        len(backends),
        PANEL_IN,
        title="A stream longer than the cache",
        handles=line_handles(series, {label: look for looks in styles for label, look in looks.items()}),
        across=backends_of_each(series),
        caption=[caption(cells, ("tokens", "repeats")), note],
        missing=missing(results, longest=90),
        width_in=width_in,
        sharex=True,
        sharey="row",
    )
    full = (cells["n_sink"] + cells["window_size"]).dropna().unique()
    for row, (title, unit, lines) in zip(axes, panels, strict=True):
        for ax, backend, looks in zip(row, backends, styles, strict=True):
            draw_lines(ax, [x for x in lines if x.series.backend == backend], looks, gap=4 if unit == "MB" else 1)
            heading = f"{title} ({backend})" if len(backends) > 1 else title
            ax.set_title("\n".join(wrap(heading, width_in / len(backends) - 0.5, SIZE_LABEL, bold=True)))
            for size in full:
                ax.axvline(size, color=QUIET, lw=0.8, ls=":", zorder=1)
        row[0].set_ylabel(unit)
        number_axis(row[0], "y", [y for line in lines for y in line.y], log_ratio=np.inf if unit == "MB" else 5)
    number_axis(axes[0, 0], "x", [MIN_BIN_TOKENS / 2, length], log_ratio=1, room=0.02)
    for ax in axes[-1]:
        ax.set_xlabel("position in the stream (tokens)")
    return figure


def draw(results: Results) -> list[Drawing]:
    """All figures of this script."""
    if not results.losses:
        return [Drawing("stream_curves", None, [f"curves over the stream: {NO_LOSSES}"])]
    return [Drawing("stream_curves", plot_stream_curves(results), [f"losses: {line}" for line in missing(results)])]


if __name__ == "__main__":
    sys.exit(main(draw, __doc__))
