"""What figures hold: series, labels, values, hatches, and marks for what is missing. By the records, not by pixels."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.colors import to_hex
from plot_fixtures.synthetic import block, write_losses, write_older, write_set

from experiments.plot_ablation_results import ablation_keys, ablation_lines, missing_lines, plot_ablation
from experiments.plot_comprehensive_results import draw as draw_comprehensive
from experiments.plot_comprehensive_results import kernel_charts, plot_kernel_ratio
from experiments.plot_decode_loop_comparison import decode_loop_charts, decode_loop_records
from experiments.plot_fixed_eval_results import draw, plot_metric, plot_summary
from experiments.plot_stream_curves import missing_curves, plot_stream_curves
from experiments.plotting.captions import caption
from experiments.plotting.curves import bin_edges, memory_line, perplexity_line
from experiments.plotting.metrics import METRICS, short_number
from experiments.plotting.reading import read_results
from experiments.plotting.records import LossCurve, Series
from experiments.plotting.series import bar_chart, describe_missing
from experiments.plotting.style import BACKENDS, METHODS


def drawn_bars(figure):
    """(label, height, colour, hatch) of every bar, by axes."""
    return [
        [
            (c.get_label(), p.get_height() + p.get_y(), to_hex(p.get_facecolor()).upper(), p.get_hatch() or "")
            for c in ax.containers
            for p in c
        ]
        for ax in figure.axes
    ]


def legend_labels(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def texts(figure):
    return " ".join(text.get_text() for text in figure.texts).replace("\xa0", " ")


def test_bars_have_the_values_colours_and_hatches_of_their_series(tmp_path):
    records = read_results(write_set(tmp_path, ["pg19"], ["baseline", "streaming"], ["math", "flash"])).records
    figure = plot_metric(records, "runtime_sec")
    (bars,) = drawn_bars(figure)
    expected = [
        (f"{METHODS[m].label} ({b})", block(m, b)["runtime_sec"], METHODS[m].colour, BACKENDS[b].hatch)
        for m in ("baseline", "streaming")
        for b in ("math", "flash")
    ]
    assert [(label, colour, hatch) for label, _, colour, hatch in bars] == [(e[0], e[2], e[3]) for e in expected]
    assert [height for _, height, _, _ in bars] == pytest.approx([e[1] for e in expected])
    assert sorted(legend_labels(figure)) == sorted(e[0] for e in expected)
    assert figure.axes[0].get_ylabel() == "runtime (s)"
    assert BACKENDS["math"].hatch != BACKENDS["flash"].hatch


def test_short_times_are_drawn_in_milliseconds(tmp_path):
    root = write_set(tmp_path, ["pg19"], ["baseline"], ["math"], time_scale=0.01, repeats=1)
    figure = plot_metric(read_results(root).records, "prefill_sec")
    assert figure.axes[0].get_ylabel() == "prefill time (ms)"
    ((bar,),) = drawn_bars(figure)
    assert bar[1] == pytest.approx(1e3 * block("baseline", "math", repeats=1, time_scale=0.01)["prefill_sec"])


def test_speedup_leaves_the_baseline_out_and_draws_its_line(tmp_path):
    records = read_results(write_set(tmp_path, ["pg19"])).records
    figure = plot_metric(records, "speedup")
    assert not any(label.startswith("Baseline") for label in legend_labels(figure))
    lines = [line for line in figure.axes[0].lines if list(line.get_ydata()) == [1.0, 1.0]]
    assert len(lines) == 1


def test_error_bars_span_the_repeats(tmp_path):
    records = read_results(write_set(tmp_path, ["pg19"], ["baseline", "streaming"], ["math"])).records
    chart = bar_chart(records, METRICS["speedup"])
    (bar,) = chart.bars[Series("streaming", "math")]
    base, own = block("baseline", "math")["runs"], block("streaming", "math")["runs"]
    ratios = [b["runtime_sec"] / o["runtime_sec"] for b, o in zip(base, own, strict=True)]
    assert bar.low == pytest.approx(min(*ratios, bar.value))
    assert bar.high == pytest.approx(max(*ratios, bar.value))
    figure = plot_metric(records, "speedup")
    spans = [list(line.get_ydata()) for line in figure.axes[0].lines]
    assert [pytest.approx(bar.low), pytest.approx(bar.high)] in spans


def test_missing_cells_are_named_and_marked_never_drawn_as_nought(tmp_path):
    root = write_set(
        tmp_path,
        ["pg19", "wikitext"],
        ["baseline", "kvpress"],
        ["math", "flash"],
        skip=[("pg19", "kvpress", "flash")],
        drop=[("wikitext", "kvpress", "math")],
    )
    records = read_results(root).records
    chart = bar_chart(records, METRICS["perplexity"])
    assert chart.bars[Series("kvpress", "flash")][0] is None
    assert describe_missing(chart.missing, chart.datasets) == [
        "KVPress (math) on WikiText-103: no result",
        "KVPress (flash) on PG19: skipped: kvpress is not installed",
    ]
    figure = plot_metric(records, "perplexity")
    (bars,) = drawn_bars(figure)
    assert len(bars) == 6
    assert all(height > 0 for _, height, _, _ in bars)
    marks = [line for line in figure.axes[0].lines if line.get_marker() == "x"]
    assert len(marks) == 2
    assert "KVPress (flash) on PG19: skipped: kvpress is not installed" in texts(figure)


def test_a_backend_that_one_method_lacks_everywhere_is_missing(tmp_path):
    root = write_set(
        tmp_path, ["pg19"], ["baseline", "streaming"], ["math", "flash"], drop=[("pg19", "streaming", "flash")]
    )
    missing = bar_chart(read_results(root).records, METRICS["runtime_sec"]).missing
    assert [(cell.series.label, cell.reason, cell.whole) for cell in missing] == [
        ("StreamingLLM (flash)", "no result", True)
    ]


def test_older_data_sets_are_not_missing_from_new_series(tmp_path):
    write_set(tmp_path, ["demo_narrative"], ["baseline", "streaming"], ["math", "flash"])
    write_older(tmp_path / "fixed_eval", ["wikitext"])
    records = [r for r in read_results(tmp_path).records if r.series.mode is None]
    chart = bar_chart(records, METRICS["perplexity"])
    assert chart.missing == ()
    assert [s.label for s in chart.slots[chart.datasets.index("wikitext")]] == [
        "Baseline",
        "StreamingLLM",
        "StreamingLLM (original)",
        "KVPress",
    ]


def test_modes_have_figures_of_their_own(tmp_path):
    drawings = {d.name: d.figure for d in draw(read_results(write_older(tmp_path)))}
    assert legend_labels(drawings["fixed_eval_perplexity_decode_loop"]) == [
        "Baseline, decode loop",
        "StreamingLLM, decode loop",
    ]
    assert "StreamingLLM, decode loop" not in legend_labels(drawings["fixed_eval_perplexity"])
    assert legend_labels(drawings["fixed_eval_speedup_chunked"]) == ["StreamingLLM (original), chunked"]


def test_random_weights_draw_speed_and_no_perplexity(tmp_path):
    results = read_results(write_set(tmp_path, ["pg19"], weights="random"))
    drawings = {d.name: d for d in draw(results)}
    assert drawings["fixed_eval_perplexity"].figure is None
    assert "random weights" in drawings["fixed_eval_perplexity"].missing[0]
    assert drawings["fixed_eval_runtime"].figure is not None
    labels = [ax.get_ylabel() for ax in plot_summary(results.records).axes]
    assert labels == ["runtime (s)", f"speedup ({METRICS['speedup'].unit})", "prefill time (ms)"]
    assert "random weights" in texts(drawings["fixed_eval_runtime"].figure)


def test_wide_ranges_go_on_a_log_axis(tmp_path):
    records = read_results(write_set(tmp_path, ["pg19"], ["baseline", "dense"], ["math"])).records
    assert plot_metric(records, "perplexity").axes[0].get_yscale() == "log"  # 30 against 310
    assert plot_metric(records, "runtime_sec").axes[0].get_yscale() == "linear"


def test_kernel_ratio_is_math_over_the_other(tmp_path):
    results = read_results(write_set(tmp_path, ["pg19"], ["baseline", "streaming"], ["math", "flash"]))
    prefill, decode = kernel_charts(results.records)
    math, flash = block("streaming", "math"), block("streaming", "flash")
    series = Series("streaming", "flash")
    assert prefill.bars[series][0].value == pytest.approx(math["prefill_sec"] / flash["prefill_sec"])
    assert decode.bars[series][0].value == pytest.approx(math["tpot_ms"] / flash["tpot_ms"])
    assert [s.label for s in prefill.series] == ["Baseline (flash)", "StreamingLLM (flash)"]
    assert plot_kernel_ratio(results.records) is not None


def test_one_backend_has_no_kernel_ratio_and_says_so(tmp_path):
    results = read_results(write_set(tmp_path, ["pg19"], backends=["flash"]))
    drawing = next(d for d in draw_comprehensive(results) if d.name == "comprehensive_kernel_ratio")
    assert drawing.figure is None
    assert "flash" in drawing.missing[0]


def test_the_matrix_shows_every_series_in_every_panel(tmp_path):
    results = read_results(write_set(tmp_path, ["pg19"], skip=[("pg19", "kvpress", "flash")]))
    figure = next(d.figure for d in draw_comprehensive(results) if d.name == "comprehensive_pg19")
    assert len(figure.axes) == 8
    assert len(legend_labels(figure)) == 6
    for bars, ax in zip(drawn_bars(figure), figure.axes, strict=True):
        assert len(bars) == 5
        assert "skipped" in [text.get_text() for text in ax.texts]


def test_the_decode_loop_takes_new_files_and_older_ones_that_say_so(tmp_path):
    write_set(tmp_path, ["demo_narrative"], ["baseline", "streaming"], ["math"])
    write_older(tmp_path / "fixed_eval", ["wikitext"])
    records = decode_loop_records(read_results(tmp_path))
    assert {r.series.label for r in records} == {
        "Baseline (math)",
        "StreamingLLM (math)",
        "Baseline, decode loop",
        "StreamingLLM, decode loop",
    }
    keys = [chart.metric.key for chart in decode_loop_charts(records)]
    assert keys == ["decode_toks_per_sec", "tpot_ms", "first_token_latency_sec", "perplexity", "runtime_sec"]


def test_ablations_have_a_line_per_backend(tmp_path):
    results = read_results(write_set(tmp_path, ["pg19"], backends=["math", "flash"]))
    rows = [row for row in results.ablations if row.ablation == "n_sink"]
    lines = ablation_lines(rows, "perplexity")
    assert [line.series.label for line in lines] == ["StreamingLLM (math)", "StreamingLLM (flash)"]
    assert lines[0].x == (0, 1, 2, 4, 8, 16)
    assert lines[0].y[0] > lines[0].y[1]
    assert ablation_keys(rows) == ["perplexity", "decode_toks_per_sec", "kv_cache_mb"]
    figure = plot_ablation(rows)
    styles = {line.get_label(): (line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}
    assert styles["StreamingLLM (math)"][0] == styles["StreamingLLM (flash)"][0] == METHODS["streaming"].colour
    assert styles["StreamingLLM (math)"][1] != styles["StreamingLLM (flash)"][1]


def test_settings_that_evict_nothing_are_marked(tmp_path):
    results = read_results(write_set(tmp_path, ["pg19"], backends=["math"]))
    rows = [row for row in results.ablations if row.ablation == "window_size"]
    assert [row.setting for row in rows if not row.evicts] == [1024]
    assert "nothing is evicted" in texts(plot_ablation(rows))
    assert missing_lines(rows) == []
    assert missing_lines([*rows[:2], *read_other_backend(rows[:1])]) == [
        "StreamingLLM (flash), window_size 64: no result"
    ]


def read_other_backend(rows):
    return [replace(row, series=Series("streaming", "flash")) for row in rows]


def test_perplexity_by_position_is_exp_of_the_mean_loss():
    nll = np.concatenate([np.full(63, 2.0), np.full(1936, 3.0)])
    line = perplexity_line(LossCurve("pg19", Series("dense", "math"), nll, np.arange(1, 2000)))
    assert line.y[0] == pytest.approx(np.exp((63 * 2 + 3) / 64))
    assert line.y[-1] == pytest.approx(np.exp(3.0))
    assert all(a < b for a, b in zip(line.x, line.x[1:], strict=False))


@pytest.mark.parametrize("length", [2, 30, 65, 100, 768, 4096, 1_000_000])
def test_bins_cover_the_stream_without_slivers(length):
    edges = bin_edges(length)
    widths = np.diff(edges)
    assert edges[0] == 1
    assert edges[-1] == length
    assert (widths > 0).all()
    assert len(widths) == 1 or widths.min() >= 64
    assert len(widths) < 60


def test_memory_is_flat_when_the_cache_is_full_and_grows_when_nothing_is_evicted(tmp_path):
    results = read_results(write_set(tmp_path, ["pg19"], ["baseline", "streaming", "dense"], ["math"]))
    lines = {r.series.method: memory_line(r, 100_000) for r in results.records}
    assert lines["streaming"].y[-1] == pytest.approx(257 * 16384 / 1e6)
    assert lines["streaming"].y[0] == pytest.approx(2 * 16384 / 1e6)
    assert lines["dense"].y[-1] == pytest.approx(100_001 * 16384 / 1e6)
    assert set(lines["baseline"].y) == {0.0}


def test_stream_curves_name_methods_without_losses(tmp_path):
    root = write_set(tmp_path, ["pg19"], ["baseline", "streaming"], ["math"], losses=False)
    assert plot_stream_curves(read_results(root)) is None
    write_losses(root / "final" / "pg19_main_backend-math.streaming.nll.npz", "streaming")
    results = read_results(root)
    assert [cell.series.label for cell in missing_curves(results)] == ["Baseline (math)"]
    figure = plot_stream_curves(results)
    assert legend_labels(figure) == ["StreamingLLM (math)"]
    assert len(figure.axes) == 2
    assert "Baseline (math)" in texts(figure)


def test_the_caption_says_model_device_dtype_cache_and_repeats(tmp_path):
    records = read_results(write_set(tmp_path, ["pg19"], ["baseline"], ["math"])).records
    text = caption(records).replace("\xa0", " ")
    for part in (
        "demo",
        "Synthetic CPU",
        "float32",
        "cache 4 + 252 tokens",
        "4,096 tokens of text",
        "median of 3 runs",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0264, "0.026"),
        (0.9996, "1.00"),
        (23.44, "23.4"),
        (768, "768"),
        (999.6, "1.00k"),
        (1234567, "1.23M"),
    ],
)
def test_numbers_have_three_digits(value, text):
    assert short_number(value) == text
