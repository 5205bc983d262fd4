"""The whole matrix: every method, backend and metric, a page per data set; and what the kernel changes.

    python experiments/plot_comprehensive_results.py
    python experiments/plot_comprehensive_results.py --results-dir results/h200 --output-dir figures/h200 --format pdf

Writes comprehensive_<dataset> (with the mode of older results in the name), and comprehensive_kernel_ratio: how many
times longer a method takes with the math kernel than with another, for prefill and for decode.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

if not __package__:  # as a script, on a machine where the project is not installed: drawing needs no torch
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from matplotlib.figure import Figure

from experiments.plotting.bars import figure_of_charts
from experiments.plotting.captions import caption, peak_memory_note
from experiments.plotting.metrics import TIMES, Metric
from experiments.plotting.records import Record, ResultSet
from experiments.plotting.rows import figure_of_rows, matrix_charts
from experiments.plotting.script import Drawing, main
from experiments.plotting.series import BarChart, bar_chart, describe_missing, modes, sorted_datasets
from experiments.plotting.style import MODE_LABELS, dataset_label

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
REFERENCE_BACKEND = "math"
# Phase -> the times that tell it, the first that both files have.
PHASES = {
    "prefill": Metric("prefill", "Prefill", "math / other", TIMES, reference=1.0),
    "decode": Metric("decode", "Decode, per token", "math / other", TIMES, reference=1.0),
}
PHASE_TIMES = {"prefill": ("prefill_sec",), "decode": ("tpot_ms", "decode_sec")}


def plot_matrix(records: Sequence[Record]) -> Figure | None:
    """All metrics of one data set; None where no record has any."""
    charts = matrix_charts(records, MATRIX)
    if not charts:
        return None
    mode = records[0].series.mode
    missing = tuple(dict.fromkeys(cell for chart in charts for cell in chart.missing if cell.whole))
    return figure_of_rows(
        charts,
        records,
        title=dataset_label(records[0].dataset) + (f", {MODE_LABELS[mode]}" if mode else ""),
        caption=[caption(records), peak_memory_note(records)],
        notes=[f"{TIMES} {line}" for line in describe_missing(missing, charts[0].datasets, 90)],
    )


def kernel_ratios(records: Sequence[Record]) -> list[Record]:
    """For each record with another backend than math: time with math / time with it, as ``prefill`` and ``decode``.

    Raw run i is compared with raw run i: repeats are interleaved, so these two ran next to each other.
    """
    reference = {(r.dataset, r.series): r for r in records if r.series.backend == REFERENCE_BACKEND}
    out = []
    for record in records:
        if record.series.backend == REFERENCE_BACKEND:
            continue
        base = reference.get((record.dataset, replace(record.series, backend=REFERENCE_BACKEND)))
        values, runs, reasons = {}, (), {}
        if base is not None:
            values = _ratios(base.values, record.values)
            if len(base.runs) == len(record.runs):
                runs = tuple(_ratios(b, own) for b, own in zip(base.runs, record.runs, strict=True))
        for phase, (key, *_) in PHASE_TIMES.items():
            if phase not in values:
                own_fault = base is not None and not any(k in record.values for k in PHASE_TIMES[phase])
                reasons[phase] = record.missing_reason(key) if own_fault else f"no time with {REFERENCE_BACKEND}"
        out.append(replace(record, values=values, runs=runs, reasons=reasons))
    return out


def kernel_charts(records: Sequence[Record]) -> list[BarChart]:
    """The two phases, as far as there is a backend to compare."""
    ratios = kernel_ratios(records)
    return [chart for chart in (bar_chart(ratios, metric) for metric in PHASES.values()) if chart.values]


def plot_kernel_ratio(records: Sequence[Record]) -> Figure | None:
    """What the kernel switch is for; None where all results have one backend."""
    charts = kernel_charts(records)
    if not charts:
        return None
    missing = tuple(dict.fromkeys(cell for chart in charts for cell in chart.missing))
    return figure_of_charts(
        charts,
        title="Time with math / time with another kernel",
        subtitle="above the line: the kernel that the legend names is faster than math",
        caption=[caption(records)],
        notes=[f"{TIMES} {line}" for line in describe_missing(missing, charts[0].datasets, 90)],
    )


def draw(results: ResultSet) -> list[Drawing]:
    """All figures of this script."""
    drawings = []
    for mode in modes(results.records):
        of_mode = [r for r in results.records if r.series.mode == mode]
        for dataset in sorted_datasets(of_mode):
            records = [r for r in of_mode if r.dataset == dataset]
            lines = [line for chart in matrix_charts(records, MATRIX) for line in chart.missing_lines()]
            name = f"comprehensive_{dataset}{f'_{mode}' if mode else ''}"
            drawings.append(Drawing(name, plot_matrix(records), tuple(lines)))
    stated = [r for r in results.records if r.series.backend_stated]
    lines = [line for chart in kernel_charts(stated) for line in chart.missing_lines()]
    if stated and not kernel_charts(stated):
        lines = [f"math against another kernel: all results have the backend {stated[0].series.backend}"]
    drawings.append(Drawing("comprehensive_kernel_ratio", plot_kernel_ratio(stated), tuple(lines)))
    return drawings


def _ratios(base: dict, own: dict) -> dict[str, float]:
    out = {}
    for phase, keys in PHASE_TIMES.items():
        key = next((k for k in keys if base.get(k, 0) > 0 and own.get(k, 0) > 0), None)
        if key is not None:
            out[phase] = base[key] / own[key]
    return out


if __name__ == "__main__":
    sys.exit(main(draw, __doc__.splitlines()[0]))
