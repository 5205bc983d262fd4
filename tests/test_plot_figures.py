"""What figures hold: series, labels, values, hatches, marks for what is missing. By their artists, not by pixels."""

from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_hex
from plot_fixtures.synthetic import block, write_losses, write_older, write_set

from experiments import plot_comprehensive_results as comprehensive
from experiments import plot_decode_loop_comparison as decode_loop
from experiments import plot_fixed_eval_results as fixed_eval
from experiments.plot_ablation_results import ablation_keys, missing_settings, plot_ablation
from experiments.plot_stream_curves import bin_edges, memory_line, missing, perplexity_line, plot_stream_curves
from experiments.plotting import style
from experiments.plotting.captions import caption
from experiments.plotting.script import draw_styled
from experiments.plotting.style import BACKENDS, METHODS, MINUS, TIMES, short_number
from experiments.plotting.table import read_results


@pytest.fixture(autouse=True)
def styled():
    with mpl.rc_context(style.RC):
        yield


def draw(script, results):
    """Name -> drawing of all figures of a script."""
    return {drawing.name: drawing for drawing in draw_styled(script.draw, results)}


def fixed_figure(root, name):
    return draw(fixed_eval, read_results(root))[f"fixed_eval_{name}"].figure


def bars(ax):
    """(label, value, colour, hatch) of every bar, from top to bottom."""
    drawn = [p for p in ax.patches if p.get_label() and not p.get_label().startswith("_")]
    rows = [(p.get_label(), p.get_x() + p.get_width(), to_hex(p.get_facecolor()), p.get_hatch() or "") for p in drawn]
    return [row for _, row in sorted(zip([p.get_y() for p in drawn], rows, strict=True))]


def legend_labels(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def words(figure):
    """Everything that is written around and in the panels."""
    texts = [*figure.texts, *(text for ax in figure.axes for text in ax.texts)]
    return " ".join(text.get_text() for text in texts).replace("\xa0", " ").replace("\n", " ")


def test_bars_have_the_values_colours_and_hatches_of_their_series(tmp_path):
    figure = fixed_figure(write_set(tmp_path, ["pg19"], ["baseline", "streaming"], ["math", "flash"]), "runtime")
    (ax,) = figure.axes
    expected = [
        (f"{METHODS[m].label} ({b})", block(m, b)["runtime_sec"], METHODS[m].colour, BACKENDS[b].hatch)
        for m in ("baseline", "streaming")
        for b in ("math", "flash")
    ]
    assert [(bar[0], *bar[2:]) for bar in bars(ax)] == [(e[0], *e[2:]) for e in expected]
    assert [bar[1] for bar in bars(ax)] == pytest.approx([e[1] for e in expected])
    assert sorted(legend_labels(figure)) == sorted(e[0] for e in expected)
    assert ax.get_title(loc="left") == "runtime (s) ↓"
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["Baseline", "StreamingLLM"]
    assert [text.get_text().strip() for text in ax.texts] == [short_number(e[1]) for e in expected]
    assert BACKENDS["math"].hatch != BACKENDS["flash"].hatch


def test_short_times_are_drawn_in_milliseconds(tmp_path):
    root = write_set(tmp_path, ["pg19"], ["baseline"], ["math"], time_scale=0.01, repeats=1)
    (ax,) = fixed_figure(root, "prefill").axes
    assert ax.get_title(loc="left") == "prefill (ms) ↓"
    seconds = block("baseline", "math", repeats=1, time_scale=0.01)["prefill_sec"]
    assert bars(ax)[0][1] == pytest.approx(1e3 * seconds)


def test_speedup_leaves_the_baseline_out_and_draws_its_line(tmp_path):
    figure = fixed_figure(write_set(tmp_path, ["pg19"]), "speedup")
    assert not any(label.startswith("Baseline") for label in legend_labels(figure))
    assert sum(list(line.get_xdata()) == [1.0, 1.0] for line in figure.axes[0].lines) == 1


def test_whiskers_span_the_repeats(tmp_path):
    root = write_set(tmp_path, ["pg19"], ["baseline", "streaming"], ["math"])
    row = read_results(root).cells.iloc[1]
    spans = [list(line.get_xdata()) for line in fixed_figure(root, "speedup").axes[0].lines]
    assert [row["speedup_low"], row["speedup_high"]] in spans


def test_missing_cells_are_named_and_marked_never_drawn_as_nought(tmp_path):
    root = write_set(
        tmp_path,
        ["pg19", "wikitext"],
        ["baseline", "kvpress"],
        ["math", "flash"],
        skip=[("pg19", "kvpress", "flash")],
        drop=[("wikitext", "kvpress", "math")],
    )
    drawing = draw(fixed_eval, read_results(root))["fixed_eval_perplexity"]
    named = ["KVPress (flash) on PG19: skipped: kvpress is not installed", "KVPress (math) on WikiText-103: no result"]
    assert list(drawing.missing) == named
    (ax,) = drawing.figure.axes
    assert len(bars(ax)) == 6
    assert all(value > 0 for _, value, _, _ in bars(ax))
    assert sum(line.get_marker() == "x" for line in ax.lines) == 2
    assert all(text in words(drawing.figure) for text in (*named, "skipped", "no result"))


def test_a_backend_that_one_method_lacks_everywhere_is_missing(tmp_path):
    drop = [("pg19", "streaming", "flash")]
    results = read_results(write_set(tmp_path, ["pg19"], ["baseline", "streaming"], ["math", "flash"], drop=drop))
    assert list(draw(fixed_eval, results)["fixed_eval_runtime"].missing) == ["StreamingLLM (flash) on PG19: no result"]


def test_older_data_sets_are_not_missing_from_new_series(tmp_path):
    write_set(tmp_path, ["demo_narrative"], ["baseline", "streaming"], ["math", "flash"])
    write_older(tmp_path / "fixed_eval", ["wikitext"])
    drawing = draw(fixed_eval, read_results(tmp_path))["fixed_eval_perplexity"]
    assert not drawing.missing
    older = ["Baseline", "StreamingLLM", "StreamingLLM (original)", "KVPress"]
    assert [label for label, *_ in bars(drawing.figure.axes[0])][4:] == older


def test_modes_have_figures_of_their_own(tmp_path):
    drawings = draw(fixed_eval, read_results(write_older(tmp_path)))
    labels = {name: legend_labels(drawing.figure) for name, drawing in drawings.items() if drawing.figure}
    assert labels["fixed_eval_perplexity_decode_loop"] == ["Baseline, decode loop", "StreamingLLM, decode loop"]
    assert "StreamingLLM, decode loop" not in labels["fixed_eval_perplexity"]
    assert labels["fixed_eval_speedup_chunked"] == ["StreamingLLM (original), chunked"]


def test_random_weights_draw_speed_and_no_perplexity(tmp_path):
    drawings = draw(fixed_eval, read_results(write_set(tmp_path, ["pg19"], weights="random")))
    assert drawings["fixed_eval_perplexity"].figure is None
    assert "random weights" in drawings["fixed_eval_perplexity"].missing[0]
    titles = [ax.get_title(loc="left") for ax in drawings["fixed_eval_summary"].figure.axes]
    assert titles == ["runtime (s) ↓", f"speedup ({TIMES}) ↑", "prefill (ms) ↓"]
    assert "random weights" in words(drawings["fixed_eval_runtime"].figure)


def test_wide_ranges_go_on_a_log_axis(tmp_path):
    root = write_set(tmp_path, ["pg19"], ["baseline", "dense"], ["math"])
    assert fixed_figure(root, "perplexity").axes[0].get_xscale() == "log"  # 30 against 310
    assert fixed_figure(root, "runtime").axes[0].get_xscale() == "linear"


def test_kernel_ratio_is_math_over_the_other(tmp_path):
    results = read_results(write_set(tmp_path, ["pg19"], ["baseline", "streaming"], ["math", "flash"]))
    prefill, decode = draw(comprehensive, results)["comprehensive_kernel_ratio"].figure.axes
    assert [label for label, *_ in bars(prefill)] == ["Baseline (flash)", "StreamingLLM (flash)"]
    math, flash = block("streaming", "math"), block("streaming", "flash")
    assert bars(prefill)[1][1] == pytest.approx(math["prefill_sec"] / flash["prefill_sec"])
    assert bars(decode)[1][1] == pytest.approx(math["tpot_ms"] / flash["tpot_ms"])


def test_one_backend_has_no_kernel_ratio_and_says_so(tmp_path):
    results = read_results(write_set(tmp_path, ["pg19"], backends=["flash"]))
    drawing = draw(comprehensive, results)["comprehensive_kernel_ratio"]
    assert drawing.figure is None
    assert "flash" in drawing.missing[0]


def test_the_matrix_shows_every_series_in_every_panel(tmp_path):
    results = read_results(write_set(tmp_path, ["pg19"], skip=[("pg19", "kvpress", "flash")]))
    figure = draw(comprehensive, results)["comprehensive_pg19"].figure
    assert len(figure.axes) == 8
    assert len(legend_labels(figure)) == 6
    for ax in figure.axes:
        assert len(bars(ax)) == 5
        assert "skipped" in [text.get_text().strip() for text in ax.texts]


def test_the_decode_loop_takes_new_files_and_older_ones_that_say_so(tmp_path):
    write_set(tmp_path, ["demo_narrative"], ["baseline", "streaming"], ["math"])
    write_older(tmp_path / "fixed_eval", ["wikitext"])
    figure = draw(decode_loop, read_results(tmp_path))["decode_loop_comparison"].figure
    assert set(legend_labels(figure)) == {
        "Baseline (math)", "StreamingLLM (math)", "Baseline, decode loop", "StreamingLLM, decode loop",
    }  # fmt: skip
    titles = [ax.get_title(loc="left").split(" (")[0] for ax in figure.axes]
    assert titles == ["decode", "time per token", "first step", "perplexity ↓", "runtime"]


def ablation(root, kind):
    table = read_results(root).table
    return table[table["ablation"] == kind]


def test_ablations_have_a_line_per_backend(tmp_path):
    rows = ablation(write_set(tmp_path, ["pg19"], backends=["math", "flash"]), "n_sink")
    assert ablation_keys(rows) == ["perplexity", "decode_toks_per_sec", "kv_cache_mb"]
    figure = plot_ablation(rows)
    math, flash = (line for line in figure.axes[0].lines if not line.get_label().startswith("_"))
    assert [math.get_label(), flash.get_label()] == ["StreamingLLM (math)", "StreamingLLM (flash)"]
    assert list(math.get_xdata()) == [0, 1, 2, 4, 8, 16]
    assert math.get_ydata()[0] > math.get_ydata()[1]
    assert math.get_color() == flash.get_color() == METHODS["streaming"].colour
    assert math.get_linestyle() != flash.get_linestyle()
    # The curves lie on one path, and both show: the upper one is narrower, its gaps are white, its rings wider.
    assert math.get_linewidth() > flash.get_linewidth()
    assert flash.get_gapcolor() == "white"
    assert math.get_markersize() < flash.get_markersize()
    assert flash.get_markerfacecolor() == "none"


def test_settings_that_evict_nothing_are_marked_and_absent_ones_named(tmp_path):
    rows = ablation(write_set(tmp_path, ["pg19"], backends=["math", "flash"]), "window_size")
    assert set(rows.loc[~rows["evicts"].astype(bool), "setting"]) == {1024}
    assert "nothing is evicted" in words(plot_ablation(rows))
    assert missing_settings(rows) == []
    absent = (rows["setting"] == 64) & (rows["backend"] == "flash")
    gap = rows.assign(status=rows["status"].mask(absent, "absent"), perplexity=rows["perplexity"].mask(absent))
    assert missing_settings(gap) == ["StreamingLLM (flash), window_size 64: absent"]
    assert sum(line.get_marker() == "x" for line in plot_ablation(gap).axes[0].lines) == 1


def test_perplexity_by_position_is_exp_of_the_mean_loss():
    nll = np.concatenate([np.full(63, 2.0), np.full(1936, 3.0)])
    line = perplexity_line(SimpleNamespace(nll=nll, position=np.arange(1, 2000)))
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
    lines = {row.method: memory_line(row, 100_000) for row in results.cells.itertuples()}
    assert lines["streaming"].y[-1] == pytest.approx(257 * 16384 / 1e6)
    assert lines["streaming"].y[0] == pytest.approx(2 * 16384 / 1e6)
    assert lines["dense"].y[-1] == pytest.approx(100_001 * 16384 / 1e6)
    assert set(lines["baseline"].y) == {0.0}


def test_stream_curves_name_methods_without_losses(tmp_path):
    root = write_set(tmp_path, ["pg19"], ["baseline", "streaming"], ["math"], losses=False)
    assert plot_stream_curves(read_results(root)) is None
    write_losses(root / "final" / "pg19_main_backend-math.streaming.nll.npz", "streaming")
    results = read_results(root)
    assert missing(results) == ["Baseline (math) on PG19: no losses were stored (--save-token-nll)"]
    figure = plot_stream_curves(results)
    assert legend_labels(figure) == ["StreamingLLM (math)"]
    assert len(figure.axes) == 2
    assert "Baseline (math)" in words(figure)


def test_curves_on_one_path_take_turns_in_stripes(tmp_path):
    methods = ["baseline", "streaming", "window", "dense"]
    figure = plot_stream_curves(read_results(write_set(tmp_path, ["pg19"], methods, ["math", "flash"])))
    assert [ax.get_title(loc="left") for ax in figure.axes[:2]] == [
        "Perplexity, PG19 (math)",
        "Perplexity, PG19 (flash)",
    ]
    for ax in figure.axes[:2]:
        curves = [line for line in ax.lines if not line.get_label().startswith("_")]
        stripes = [line for line in ax.lines if line.get_label().startswith("_") and len(line.get_xdata()) > 2]
        assert [line.get_color() for line in stripes] == [METHODS[method].colour for method in methods]
        dashes = [line._unscaled_dash_pattern for line in stripes]
        period = sum(dashes[0][1])
        assert [offset for offset, _ in dashes] == pytest.approx([-i * period / 4 % period for i in range(4)])
        starts = [line.get_markevery()[0] for line in curves]
        assert len(set(starts)) == len(curves)  # no marker covers another


def test_the_caption_says_model_device_dtype_cache_and_repeats(tmp_path):
    cells = read_results(write_set(tmp_path, ["pg19"], ["baseline"], ["math"])).cells
    text = caption(cells).replace("\xa0", " ")
    parts = "demo", "Synthetic CPU", "float32", "cache 4 + 252 tokens", "4,096 tokens of text", "median of 3 runs"
    assert all(part in text for part in parts)


def test_numbers_have_three_digits():
    values = (0, 0.0264, 0.9996, 23.44, 768, 999.6, 1234567, -12.34)
    assert list(map(short_number, values)) == ["0", "0.026", "1.00", "23.4", "768", "1.00k", "1.23M", f"{MINUS}12.3"]
