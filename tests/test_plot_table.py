"""Result files, new and old, mixed and with gaps -> the table: what is read, and what is named as wrong."""

import json

import numpy as np
import pytest
from plot_fixtures.synthetic import block, header, write_json, write_older, write_set

from experiments.plotting.captions import findings, missing_lines
from experiments.plotting.files import parse_name
from experiments.plotting.table import find_roots, read_results, why_missing


def cell(results, label, dataset="pg19"):
    """The one row of a label on a data set."""
    (row,) = results.cells[(results.cells["label"] == label) & (results.cells["dataset"] == dataset)].itertuples()
    return row


def labels(results):
    return list(results.cells["label"])


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        ("wikitext_main_backend-flash", ("main", "wikitext", None, None, "flash")),
        ("demo_narrative_main", ("main", "demo_narrative", None, None, None)),
        ("demo_narrative_window_backend-math", ("single", "demo_narrative", "window", None, "math")),
        ("wikitext_baseline", ("single", "wikitext", "baseline", None, None)),
        ("pg19_20k_kvpress", ("single", "pg19_20k", "kvpress", None, None)),
        ("wikitext_ours_decode_loop", ("single", "wikitext", "streaming", "decode_loop", None)),
        ("pg19_mit_chunked", ("single", "pg19", "mit", "chunked", None)),
        ("wikitext_ours_kvpress_official", ("single", "wikitext", "streaming", "kvpress_official", None)),
        ("my_ours_book_dense", ("single", "my_ours_book", "dense", None, None)),
        ("ablation_window_size", ("ablation", None, None, None, None)),
        ("ablation_n_sink_backend-cudnn", ("ablation", None, None, None, "cudnn")),
        ("a_b_main_backend-math.streaming.nll", ("nll", "a_b", "streaming", None, "math")),
        ("notes", None),
        ("main", None),
    ],
)
def test_names_read_from_the_right(stem, expected):
    name = parse_name(stem)
    assert (name and tuple(map(name.get, ("kind", "dataset", "method", "mode", "backend")))) == expected
    assert expected is None or expected[0] != "ablation" or name["ablation"] in stem


def test_new_files_give_one_row_per_cell(tmp_path):
    results = read_results(write_set(tmp_path, ["pg19"], ["baseline", "streaming"], ["math", "flash"]))
    assert not results.problems
    assert not results.notices
    assert labels(results) == ["Baseline (math)", "Baseline (flash)", "StreamingLLM (math)", "StreamingLLM (flash)"]
    row, source = cell(results, "StreamingLLM (flash)"), block("streaming", "flash")
    for key in ("perplexity", "runtime_sec", "prefill_sec", "ttft_sec", "tpot_ms", "kv_cache_mb"):
        assert getattr(row, key) == source[key]
    assert (row.model, row.dtype, row.n_sink, row.window_size, row.repeats) == ("demo", "float32", 4, 252, 3)
    assert row.speedup == block("baseline", "flash")["runtime_sec"] / source["runtime_sec"]
    assert row.math_over_decode == pytest.approx(block("streaming", "math")["tpot_ms"] / source["tpot_ms"])
    assert row.math_over_prefill == pytest.approx(block("streaming", "math")["prefill_sec"] / source["prefill_sec"])


def test_ranges_span_the_raw_runs(tmp_path):
    results = read_results(write_set(tmp_path, ["pg19"], ["baseline", "streaming"], ["math"]))
    row, runs = cell(results, "StreamingLLM (math)"), block("streaming", "math")["runs"]
    times = [run["runtime_sec"] for run in runs]
    assert (row.runtime_sec_low, row.runtime_sec_high) == (min(times), max(times))
    base = [run["runtime_sec"] for run in block("baseline", "math")["runs"]]
    ratios = [b / own for b, own in zip(base, times, strict=True)]  # run i against run i
    assert row.speedup_low == pytest.approx(min(*ratios, row.speedup))
    assert row.speedup_high == pytest.approx(max(*ratios, row.speedup))


def test_a_single_run_has_no_range(tmp_path):
    row = cell(read_results(write_set(tmp_path, ["pg19"], ["streaming"], ["math"], repeats=1)), "StreamingLLM (math)")
    assert np.isnan(row.runtime_sec_low)
    assert np.isnan(row.runtime_sec_high)


def test_a_speedup_needs_the_baseline_of_the_same_backend_and_engine(tmp_path):
    write_set(tmp_path, ["pg19"], ["baseline", "streaming"], ["math", "flash"], drop=[("pg19", "baseline", "flash")])
    results = read_results(tmp_path)
    assert cell(results, "StreamingLLM (math)").speedup > 1
    flash = cell(results, "StreamingLLM (flash)")
    assert np.isnan(flash.speedup)
    assert why_missing(flash, "speedup") == "no baseline with the same backend"

    path = tmp_path / "fixed_eval" / "pg19_streaming_backend-math.json"
    write_json(path, json.loads(path.read_text()) | {"engine": "graph"})
    other = cell(read_results(tmp_path), "StreamingLLM (math)")
    assert np.isnan(other.speedup)
    assert "engine" in why_missing(other, "speedup")


def test_a_stated_speedup_is_kept(tmp_path):
    data = header("pg19", "math") | {"baseline": block("baseline", "math"), "streaming": block("streaming", "math")}
    data["streaming"]["speedup"] = 3.25
    write_json(tmp_path / "pg19_main_backend-math.json", data)
    assert cell(read_results(tmp_path), "StreamingLLM (math)").speedup == 3.25


@pytest.mark.parametrize(
    ("name", "field", "label"),
    [
        ("pg19_streaming_backend-flash.json", None, "StreamingLLM (flash)"),
        ("pg19_streaming_backend-flash.json", "cudnn", "StreamingLLM (cudnn)"),
        ("pg19_streaming.json", "flash", "StreamingLLM (flash)"),
        ("pg19_streaming.json", None, "StreamingLLM"),
    ],
)
def test_backend_is_the_field_else_the_suffix_else_math(tmp_path, name, field, label):
    data = {"perplexity": 9.0, "total_time": 2.0, "prefill_time": 0.5} | ({"backend": field} if field else {})
    write_json(tmp_path / name, data)
    results = read_results(tmp_path)
    assert labels(results) == [label]
    assert field or "flash" in name or list(results.cells["backend"]) == ["math"]


def test_older_files_keep_bare_labels_and_separate_modes(tmp_path):
    results = read_results(write_older(tmp_path))
    assert not results.problems
    cells = set(zip(results.cells["dataset"], results.cells["label"], strict=True))
    assert {("wikitext", m) for m in ("Baseline", "StreamingLLM", "KVPress", "StreamingLLM (original)")} <= cells
    assert ("pg19_20k", "KVPress") in cells
    assert ("wikitext", "Baseline, decode loop") in cells  # the block beside it
    assert ("pg19", "StreamingLLM (original), chunked") in cells
    ours, source = cell(results, "StreamingLLM", "wikitext"), block("streaming", "math")
    assert (ours.runtime_sec, ours.prefill_sec) == (source["runtime_sec"], source["prefill_sec"])
    loop = cell(results, "StreamingLLM, decode loop", "wikitext")
    assert loop.speedup == cell(results, "Baseline, decode loop", "wikitext").runtime_sec / loop.runtime_sec
    assert np.isnan(cell(results, "StreamingLLM, kvpress official", "wikitext").speedup)
    ablation = results.table[results.table["ablation"] == "window_size"]
    assert list(ablation["setting"]) == [128, 256, 512]
    assert set(ablation["label"]) == {"StreamingLLM"}


def test_mixed_folders_keep_old_and_new_apart(tmp_path):
    write_set(tmp_path, ["wikitext"], ["baseline", "streaming"], ["math"])
    write_older(tmp_path / "fixed_eval", ["wikitext"])
    results = read_results(tmp_path)
    assert labels(results).count("StreamingLLM") == labels(results).count("StreamingLLM (math)") == 1
    assert "absent" not in set(results.cells["status"])


def test_the_folder_of_the_files_or_the_root_above(tmp_path):
    root = write_set(tmp_path, ["pg19"], ["baseline", "streaming"], ["math"])
    above, inside = read_results(root), read_results(root / "fixed_eval")
    assert labels(above) == labels(inside) == labels(read_results(root / "final"))
    assert len(above.table) > len(above.cells)
    assert len(inside.table) == len(inside.cells)


def test_skipped_null_and_absent_have_no_value_but_a_reason(tmp_path):
    skip, drop = [("pg19", "kvpress", "math")], [("pg19", "kvpress", "flash")]
    write_set(tmp_path, ["pg19"], ["baseline", "streaming", "kvpress"], ["math", "flash"], skip=skip, drop=drop)
    path = tmp_path / "fixed_eval" / "pg19_streaming_backend-math.json"
    data = {"peak_memory_mb": None, "peak_memory_mb_reason": "no counter here", "kv_cache_mb": float("inf")}
    write_json(path, json.loads(path.read_text()) | data)
    results = read_results(tmp_path)
    assert missing_lines(results.cells, ["peak_memory_mb", "kv_cache_mb"]) == [
        "KVPress (math) on PG19: skipped: kvpress is not installed",
        "KVPress (flash) on PG19: no result",
        "Peak memory: StreamingLLM (math) on PG19: no counter here",
        "Keys and values held at the end: StreamingLLM (math) on PG19: not finite (inf)",
    ]
    assert np.isnan(cell(results, "KVPress (math)").perplexity)


def test_random_weights_have_no_perplexity_whatever_the_file_says(tmp_path):
    data = header("pg19", "math", weights="random") | block("streaming", "math")
    write_json(tmp_path / "pg19_streaming_backend-math.json", data)
    row = cell(read_results(tmp_path), "StreamingLLM (math)")
    assert np.isnan(row.perplexity)
    assert why_missing(row, "perplexity") == "random weights"
    assert row.runtime_sec > 0


def test_conflicting_files_are_named(tmp_path):
    root = write_set(tmp_path, ["pg19"], ["baseline"], ["math"])
    path = root / "fixed_eval" / "pg19_baseline_backend-math.json"
    write_json(path, json.loads(path.read_text()) | {"perplexity": 1.5})
    results = read_results(root)
    assert cell(results, "Baseline (math)").perplexity == 1.5
    (notice,) = results.notices
    assert "pg19_main_backend-math.json" in notice


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("pg19_streaming.json", '{"perplexity": 1.0, "runt', "broken"),
        ("pg19_streaming.json", "[1, 2]", "foreign"),
        ("pg19_streaming.json", '{"perplexity": "low", "total_time": 1}', "foreign"),
        ("pg19_streaming.json", '{"hello": 1}', "foreign"),
        ("pg19_streaming.json", '{"perplexity": 2.0, "backend": "auto"}', "unknown backend 'auto'"),
        ("notes.json", '{"todo": "draw"}', "foreign"),
        ("pg19_main_backend-math.json", '{"magic": {"perplexity": 2.0}}', "unknown method 'magic'"),
        ("ablation_n_sink.json", '{"results": [{"perplexity": 3}]}', "foreign"),
        ("ablation_n_sink.json", '{"results": 3}', "foreign"),
        ("pg19_main.streaming.nll.npz", "not a zip", "broken"),
    ],
)
def test_broken_and_foreign_files_are_problems_and_the_rest_is_read(tmp_path, name, text, words):
    write_json(tmp_path / "wikitext_ours.json", {"perplexity": 9.0, "total_time": 2.0})
    (tmp_path / name).write_text(text)
    results = read_results(tmp_path)
    ((path, problem),) = results.problems
    assert path.name == name
    assert words in problem
    assert list(results.cells["dataset"]) == ["wikitext"]


def test_losses_take_the_backend_of_their_main_file(tmp_path):
    write_json(tmp_path / "pg19_main.json", header("pg19", "flash") | {"streaming": block("streaming", "flash")})
    arrays = {"nll": np.ones(5, np.float32), "position": np.arange(1, 6)}
    np.savez_compressed(tmp_path / "pg19_main.streaming.nll.npz", **arrays)
    (loss,) = read_results(tmp_path).losses
    assert loss["label"] == "StreamingLLM (flash)"


def test_roots_below_a_folder(tmp_path):
    for name in (".", "cpu", "h200", "h200/pythia-70m", "h200/superseded", ".cells"):
        (tmp_path / name / "final").mkdir(parents=True)
    found = [root.relative_to(tmp_path).as_posix() for root in find_roots(tmp_path)]
    assert found == [".", "cpu", "h200", "h200/pythia-70m"]


def test_what_was_found_is_one_sentence(tmp_path):
    write_set(tmp_path / "all", ["pg19", "wikitext"], ["baseline", "streaming", "dense"], ["math"], repeats=1)
    assert findings(read_results(tmp_path / "all").cells) == (
        "On PG19 and WikiText-103, StreamingLLM was 7.03 to 7.33 times as fast as re-computing the window at every "
        "step and had a perplexity 2.00% higher."
    )
    write_set(tmp_path / "alone", ["pg19"], ["streaming"], ["math"], repeats=1)
    sentence = findings(read_results(tmp_path / "alone").cells)
    assert "decoded 105 tokens per second and had a perplexity of 30.6." in sentence
    write_set(tmp_path / "none", ["pg19"], ["dense"], ["math"], repeats=1)
    assert findings(read_results(tmp_path / "none").cells) == "There is no result of StreamingLLM among them."
