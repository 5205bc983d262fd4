"""Result files, new and old, mixed and with gaps -> records: what is read, and what is named as wrong."""

import json

import numpy as np
import pytest
from plot_fixtures.synthetic import block, header, write_json, write_older, write_set

from experiments.plotting.names import FileName, parse_name
from experiments.plotting.reading import find_roots, read_results
from experiments.plotting.records import Series


def by_cell(results):
    return {(r.dataset, r.series): r for r in results.records}


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        ("wikitext_main_backend-flash", FileName("main", "wikitext", backend="flash")),
        ("demo_narrative_main", FileName("main", "demo_narrative")),
        ("demo_narrative_window_backend-math", FileName("single", "demo_narrative", "window", backend="math")),
        ("wikitext_baseline", FileName("single", "wikitext", "baseline")),
        ("pg19_20k_kvpress", FileName("single", "pg19_20k", "kvpress")),
        ("wikitext_ours_decode_loop", FileName("single", "wikitext", "streaming", "decode_loop")),
        ("pg19_mit_chunked", FileName("single", "pg19", "mit", "chunked")),
        ("wikitext_ours_kvpress_official", FileName("single", "wikitext", "streaming", "kvpress_official")),
        ("my_ours_book_dense", FileName("single", "my_ours_book", "dense")),
        ("ablation_window_size", FileName("ablation", ablation="window_size")),
        ("ablation_n_sink_backend-cudnn", FileName("ablation", backend="cudnn", ablation="n_sink")),
        ("a_b_main_backend-math.streaming.nll", FileName("nll", "a_b", "streaming", backend="math")),
        ("notes", None),
        ("main", None),
    ],
)
def test_names_read_from_the_right(stem, expected):
    assert parse_name(stem) == expected


def test_new_files_give_one_record_per_cell(tmp_path):
    root = write_set(tmp_path, ["pg19"], ["baseline", "streaming"], ["math", "flash"])
    results = read_results(root)
    assert not results.problems
    assert not results.notices
    labels = [r.series.label for r in results.records]
    assert labels == ["Baseline (math)", "Baseline (flash)", "StreamingLLM (math)", "StreamingLLM (flash)"]
    record = results.records[3]
    source = block("streaming", "flash")
    for key in ("perplexity", "runtime_sec", "prefill_sec", "ttft_sec", "tpot_ms", "kv_cache_mb"):
        assert record.values[key] == source[key]
    assert len(record.runs) == 3
    conditions = record.conditions
    assert (conditions.model, conditions.dtype, conditions.cache_size) == ("demo", "float32", 256)
    assert record.values["speedup"] == block("baseline", "flash")["runtime_sec"] / source["runtime_sec"]


def test_a_speedup_needs_the_baseline_of_the_same_backend_and_engine(tmp_path):
    write_set(tmp_path, ["pg19"], ["baseline", "streaming"], ["math", "flash"], drop=[("pg19", "baseline", "flash")])
    cells = by_cell(read_results(tmp_path))
    assert "speedup" in cells["pg19", Series("streaming", "math")].values
    flash = cells["pg19", Series("streaming", "flash")]
    assert "speedup" not in flash.values
    assert flash.reasons["speedup"] == "no baseline with the same backend"

    path = tmp_path / "fixed_eval" / "pg19_streaming_backend-math.json"
    write_json(path, json.loads(path.read_text()) | {"engine": "graph"})
    record = by_cell(read_results(tmp_path))["pg19", Series("streaming", "math")]
    assert "engine" in record.reasons["speedup"]
    assert "speedup" not in record.values


def test_a_stated_speedup_is_kept(tmp_path):
    data = header("pg19", "math") | {"baseline": block("baseline", "math"), "streaming": block("streaming", "math")}
    data["streaming"]["speedup"] = 3.25
    write_json(tmp_path / "pg19_main_backend-math.json", data)
    assert by_cell(read_results(tmp_path))["pg19", Series("streaming", "math")].values["speedup"] == 3.25


@pytest.mark.parametrize(
    ("name", "field", "expected"),
    [
        ("pg19_streaming_backend-flash.json", None, Series("streaming", "flash")),
        ("pg19_streaming_backend-flash.json", "cudnn", Series("streaming", "cudnn")),
        ("pg19_streaming.json", "flash", Series("streaming", "flash")),
        ("pg19_streaming.json", None, Series("streaming", "math", backend_stated=False)),
    ],
)
def test_backend_is_the_field_else_the_suffix_else_math(tmp_path, name, field, expected):
    data = {"perplexity": 9.0, "total_time": 2.0, "prefill_time": 0.5} | ({"backend": field} if field else {})
    write_json(tmp_path / name, data)
    (record,) = read_results(tmp_path).records
    assert record.series == expected


def test_older_files_keep_bare_labels_and_separate_modes(tmp_path):
    results = read_results(write_older(tmp_path))
    assert not results.problems
    labels = {(r.dataset, r.series.label) for r in results.records}
    assert {("wikitext", m) for m in ("Baseline", "StreamingLLM", "KVPress", "StreamingLLM (original)")} <= labels
    assert ("pg19_20k", "KVPress") in labels
    assert ("wikitext", "StreamingLLM, decode loop") in labels
    assert ("wikitext", "Baseline, decode loop") in labels  # the block beside it
    assert ("pg19", "StreamingLLM (original), chunked") in labels
    assert ("wikitext", "StreamingLLM, kvpress official") in labels
    cells = by_cell(results)
    ours = cells["wikitext", Series("streaming", "math", False)]
    source = block("streaming", "math", 1 - 1)
    assert ours.values["runtime_sec"] == source["runtime_sec"]
    assert ours.values["prefill_sec"] == source["prefill_sec"]
    loop = cells["wikitext", Series("streaming", "math", False, "decode_loop")]
    base = cells["wikitext", Series("baseline", "math", False, "decode_loop")]
    assert loop.values["speedup"] == base.values["runtime_sec"] / loop.values["runtime_sec"]
    assert "speedup" not in cells["wikitext", Series("streaming", "math", False, "kvpress_official")].values
    assert [row.setting for row in results.ablations] == [128, 256, 512]
    assert results.ablations[0].series.label == "StreamingLLM"


def test_mixed_folders_keep_old_and_new_apart(tmp_path):
    write_set(tmp_path, ["wikitext"], ["baseline", "streaming"], ["math"])
    write_older(tmp_path / "fixed_eval", ["wikitext"])
    labels = [r.series.label for r in read_results(tmp_path).records if r.dataset == "wikitext" and not r.series.mode]
    assert labels.count("StreamingLLM") == 1
    assert labels.count("StreamingLLM (math)") == 1


def test_the_folder_of_the_files_or_the_root_above(tmp_path):
    root = write_set(tmp_path, ["pg19"], ["baseline", "streaming"], ["math"])
    above, inside = read_results(root), read_results(root / "fixed_eval")
    assert [r.series for r in above.records] == [r.series for r in inside.records]
    assert above.ablations
    assert not inside.ablations
    assert len(read_results(root / "final").records) == 2


def test_skipped_and_null_are_absent_with_their_reason(tmp_path):
    write_set(tmp_path, ["pg19"], ["baseline", "kvpress"], ["math"], skip=[("pg19", "kvpress", "math")])
    record = by_cell(read_results(tmp_path))["pg19", Series("kvpress", "math")]
    assert record.values == {}
    assert record.missing_reason("perplexity") == "skipped: kvpress is not installed"

    data = header("pg19", "math") | block("streaming", "math")
    data |= {"peak_memory_mb": None, "peak_memory_mb_reason": "no counter here", "ttft_sec": float("inf")}
    write_json(tmp_path / "fixed_eval" / "pg19_streaming_backend-math.json", data)
    record = by_cell(read_results(tmp_path))["pg19", Series("streaming", "math")]
    assert record.missing_reason("peak_memory_mb") == "no counter here"
    assert record.missing_reason("ttft_sec") == "not finite (inf)"


def test_random_weights_have_no_perplexity_whatever_the_file_says(tmp_path):
    data = header("pg19", "math", weights="random") | block("streaming", "math")
    write_json(tmp_path / "pg19_streaming_backend-math.json", data)
    (record,) = read_results(tmp_path).records
    assert "perplexity" not in record.values
    assert record.missing_reason("perplexity") == "random weights"
    assert "runtime_sec" in record.values


def test_conflicting_files_are_named(tmp_path):
    root = write_set(tmp_path, ["pg19"], ["baseline"], ["math"])
    path = root / "fixed_eval" / "pg19_baseline_backend-math.json"
    write_json(path, json.loads(path.read_text()) | {"perplexity": 1.5})
    results = read_results(root)
    assert results.records[0].values["perplexity"] == 1.5
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
    (problem,) = results.problems
    assert problem.path.name == name
    assert words in problem.text
    assert [r.dataset for r in results.records] == ["wikitext"]


def test_losses_take_the_backend_of_their_main_file(tmp_path):
    data = header("pg19", "flash") | {"streaming": block("streaming", "flash")}
    write_json(tmp_path / "pg19_main.json", data)
    arrays = {"nll": np.ones(5, np.float32), "position": np.arange(1, 6)}
    np.savez_compressed(tmp_path / "pg19_main.streaming.nll.npz", **arrays)
    (curve,) = read_results(tmp_path).curves
    assert curve.series == Series("streaming", "flash")


def test_roots_below_a_folder(tmp_path):
    for name in (".", "cpu", "h200", "h200/pythia-70m", "h200/superseded", ".cells"):
        (tmp_path / name / "final").mkdir(parents=True)
    found = [root.relative_to(tmp_path).as_posix() for root in find_roots(tmp_path)]
    assert found == [".", "cpu", "h200", "h200/pythia-70m"]
