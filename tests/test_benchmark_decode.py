"""scripts/benchmark_decode.py: what is timed, what is checked, what is kept, and the figure."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_ids, make_neox
from demo_training_support import ROOT  # puts scripts/ on the module path
from evaluation_support import make_model_folder
from packed_weights import quantise_

from experiments.benchmarks import contenders, decode, runner
from experiments.benchmarks.contenders import CONTENDERS, Contender
from experiments.benchmarks.decode import TOLERANCE, Bench, Cell, ConstantDense, Plan, Timing, in_turns
from experiments.benchmarks.runner import copy_bytes_per_sec, kv_token_nbytes, step_nbytes, weight_nbytes
from experiments.methods import METHODS, MethodSettings, Streaming
from experiments.models import LoadedModel
from experiments.plotting.decode_benchmark import figures

import benchmark_decode  # isort: skip

pytestmark = pytest.mark.usefixtures("no_collection")
C = 16
SMALL = ["--cache-sizes", str(C), "--n-sink", "2", "--steps", "3", "--warmup-steps", "4", "--device", "cpu"]


class Place:
    """A tiny model and a result file; runs command lines and keeps what was printed."""

    def __init__(self, base: Path, capsys):
        self.model, self.output, self.capsys = make_model_folder(base / "tiny"), base / "out.json", capsys
        capsys.readouterr()

    def run(self, *options: str, contenders=("recompute", "dynamic-cache", "eager")) -> int:
        argv = ["--model", str(self.model), *SMALL, "--backends", "math", "--output", str(self.output)]
        try:
            return benchmark_decode.main([*argv, "--contenders", *contenders, *options])
        finally:
            captured = self.capsys.readouterr()
            self.lines, self.errors = captured.out.splitlines(), captured.err

    @property
    def result(self) -> dict:
        return json.loads(self.output.read_text())

    def rows(self, contender: str) -> list[dict]:
        return [row for row in self.result["rows"] if row["cell"]["contender"] == contender]


@pytest.fixture
def place(tmp_path, capsys, monkeypatch) -> Place:
    monkeypatch.setattr(runner, "copy_bytes_per_sec", lambda device: 1e9)
    return Place(tmp_path, capsys)


def loaded(model) -> LoadedModel:
    return LoadedModel(model.config, None, None, model)


def test_contenders_are_methods_and_compared_with_their_own_engine():
    for contender in CONTENDERS.values():
        assert contender.method in (contenders.CONSTANT_DENSE, *METHODS)
    partners = {name: contender.compared_with for name, contender in CONTENDERS.items()}
    assert partners == {
        "recompute": None, "recompute-graph": None, "recompute-fused": None, "dynamic-cache": "recompute",
        "kvpress": "recompute", "eager": "recompute", "graph": "recompute-graph", "graph+compile": None,
        "fused": "recompute-fused", "fused-triton": None,
    }  # fmt: skip


def test_all_contenders_run_or_say_why_not(place, tmp_path):
    names = list(CONTENDERS)
    figures_folder = tmp_path / "figures"
    options = ["--batch-sizes", "1", "2", "--prefill-lengths", "40"]
    assert place.run(*options, "--backends", "math", "flash", "--figures", str(figures_folder), contenders=names) == 0
    result = place.result
    assert result["complete"]
    assert result["check_tolerance"] == TOLERANCE["float32"]
    assert {row["status"] for row in result["rows"]} == {"ok", "skipped"}
    for name in ("recompute", "dynamic-cache", "kvpress", "eager"):
        decode = [row for row in place.rows(name) if row["cell"]["kind"] == "decode"]
        assert len(decode) == 4  # backends and batch sizes
        for row in decode:
            times = [run["tpot_ms"] for run in row["runs"]]
            assert row["tpot_ms"] == sorted(times)[1]
            assert row["spread_ms"] == [min(times), max(times)]
            assert row["ratio_to_floor"] == pytest.approx(row["tpot_ms"] / row["floor_ms"])
            assert row["toks_per_sec"] == pytest.approx(1e3 * row["cell"]["batch_size"] / row["tpot_ms"])
            assert (row["speedup"] is None) == (name == "recompute")
    eager = place.rows("eager")
    assert all(row["check"]["error"] < 1e-5 for row in eager if row["cell"]["kind"] == "decode")
    assert sum(row["cell"]["kind"] == "prefill" for row in eager) == 4
    for name in ("graph", "graph+compile", "fused", "recompute-graph"):
        assert all("CUDA" in row["reason"] and row["tpot_ms"] is None for row in place.rows(name)[:1])
    assert [row["cell"]["backend"] for row in place.rows("fused-triton")] == ["triton", "triton"]
    line = next(line for line in place.lines if line.endswith("batch 2 | eager (flash)") and "x  " in line)
    row = next(row for row in eager if row["cell"]["batch_size"] == 2 and row["cell"]["backend"] == "flash")
    assert float(line.split()[0]) == pytest.approx(row["tpot_ms"], abs=1e-3)
    assert sorted(path.name for path in figures_folder.iterdir()) == [
        "decode_16_batch_1.png", "decode_16_batch_2.png", "prefill_40_batch_1.png", "prefill_40_batch_2.png",
    ]  # fmt: skip


def test_every_contender_runs_once_before_any_runs_again():
    plan = Plan((16, 32), (100,), (1, 2), ("recompute", "eager", "fused-triton"), ("math", "flash"), 4)
    groups = plan.groups("m")
    assert [len(group) for group in groups] == [5, 5, 2, 5, 5, 2]
    turns = list(in_turns(groups[0], 3))
    assert [repeat for repeat, _ in turns] == [0] * 5 + [1] * 5 + [2] * 5
    assert [str(cell).split("| ")[-1] for _, cell in turns[:5]] == [
        "recompute (math)", "recompute (flash)", "eager (math)", "eager (flash)", "fused-triton (triton)",
    ]  # fmt: skip
    assert {cell.length for cell in groups[2]} == {100}


def test_dynamic_cache_attends_to_the_same_length_at_every_step():
    model, ids = make_neox(), make_ids(C + 5)
    with torch.inference_mode(), ConstantDense(model, MethodSettings(2, C - 2)) as method:
        method.reset()
        method.prefill(ids[:, :C])
        rows = [method.step(ids[:, C]) for _ in range(3)]
        expected = model(ids[:, : C + 1]).logits[:, -1]
        assert all((row - expected).abs().max() < 1e-5 for row in rows)
        assert method.kv_cache_nbytes == C * method.kv_bytes_per_token


def test_floor_counts_what_a_step_reads():
    hidden, vocab, layers = 64, 101, 4
    model = make_neox()
    everything = sum(p.numel() for p in model.parameters())
    assert weight_nbytes(model) == 4 * (everything - vocab * hidden)
    per_token = 2 * layers * hidden * 4
    assert kv_token_nbytes(model) == per_token
    assert step_nbytes(1000, per_token, 20, 3) == 1000 + 3 * 21 * per_token
    tied = make_neox(tie_word_embeddings=True)
    tied.tie_weights()
    assert weight_nbytes(tied) == 4 * (everything - vocab * hidden)  # the one table is read as the output layer
    assert weight_nbytes(make_neox(torch.float16)) == 2 * (everything - vocab * hidden)


def test_floor_counts_quantised_weights_as_they_are_stored():
    model = make_neox()
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    numbers, rows = (sum(f(m.weight) for m in linears) for f in (torch.Tensor.numel, len))
    plain = weight_nbytes(model)
    quantise_(model, "int8")
    assert weight_nbytes(model) == plain - 4 * numbers + numbers + (4 + 1) * rows


def test_quantised_models_are_named(place, monkeypatch):
    torchao = SimpleNamespace(Int8WeightOnlyConfig=lambda: "int8", quantize_=quantise_)
    monkeypatch.setattr(runner, "torchao", lambda: torchao)
    monkeypatch.setattr(runner, "version", lambda name: "0.0")
    assert place.run("--quantize", "int8", contenders=["eager"]) == 0
    (row,), (name,) = place.rows("eager"), place.result["models"]
    assert name == row["cell"]["model"] == f"{place.model}, int8"
    assert place.result["models"][name]["fingerprint"].endswith(", int8 by torchao 0.0")
    assert place.result["models"][name]["weight_bytes_per_step"] < place.result["models"][name]["parameters"] * 2


def test_quantising_needs_torchao(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    assert place.run("--quantize", "int8", contenders=["eager"]) == 2
    assert "--quantize needs torchao" in place.errors


def test_copy_speed_counts_reading_and_writing(monkeypatch):
    from experiments import costs

    monkeypatch.setattr(runner, "_CPU_NBYTES", 4096)
    clock = iter(range(100))
    monkeypatch.setattr(costs, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert copy_bytes_per_sec(torch.device("cpu")) == 2 * 4096 * runner._COPIES


class Wrong(Streaming):
    """A decoder that forgets its sinks."""

    @property
    def sizes(self):
        return 0, self.settings.window_size


def test_a_contender_with_other_logits_is_not_timed(place, monkeypatch):
    monkeypatch.setitem(METHODS, "wrong", Wrong)
    monkeypatch.setitem(CONTENDERS, "graph", Contender("Wrong", "wrong", group="streaming", checked=True))
    assert place.run(contenders=["graph", "eager"]) == 1
    (wrong,), (right,) = place.rows("graph"), place.rows("eager")
    assert (wrong["status"], wrong["runs"], right["status"]) == ("failed", [], "ok")
    assert "its logits differ from the eager decoder's with math by" in wrong["reason"]
    assert any(line.startswith("FAILED: ") and "graph" in line for line in place.lines)


def test_out_of_memory_is_a_reason_and_the_others_go_on(place, monkeypatch):
    def no_memory(self, ids):
        raise torch.OutOfMemoryError("tried to allocate too much")

    monkeypatch.setattr(ConstantDense, "step", no_memory)
    assert place.run() == 1
    assert "out of memory" in place.rows("dynamic-cache")[0]["reason"]
    assert len(place.rows("eager")[0]["runs"]) == 3


def test_what_compiles_is_opened_once_and_says_that_it_took_no_turns(place, monkeypatch):
    opened = []

    class Opened(METHODS["streaming"]):
        def __enter__(self):
            opened.append("compiled")
            return super().__enter__()

    class OpenedDense(ConstantDense):
        def __enter__(self):
            opened.append("dense")
            return super().__enter__()

    monkeypatch.setitem(METHODS, "streaming", Opened)
    monkeypatch.setattr(decode, "ConstantDense", OpenedDense)
    entry = dataclasses.replace(CONTENDERS["eager"], label="Compiled", at_once=True)
    monkeypatch.setitem(CONTENDERS, "graph+compile", entry)
    assert place.run(contenders=["graph+compile", "dynamic-cache"]) == 0
    assert opened.count("compiled") == 1
    assert opened.count("dense") == 3
    (row,), (other,) = place.rows("graph+compile"), place.rows("dynamic-cache")
    assert (row["interleaved"], other["interleaved"]) == (False, True)
    assert len(row["runs"]) == len(other["runs"]) == 3


def test_slow_contenders_take_fewer_steps(monkeypatch):
    bench = Bench(loaded(make_neox()), Timing(steps=100, warmup=4, max_sec=6.0, seed=0), "math")
    monkeypatch.setattr(decode, "seconds", lambda call, device: 0.5 * len(call()))
    method = SimpleNamespace(step=lambda token: None)
    assert bench._time_steps(method, [None] * 100) == {"tpot_ms": 500.0, "steps": 12}


def test_a_stopped_benchmark_goes_on_and_ends_as_if_it_had_not_been(place):
    assert place.run("--max-seconds", "0") == 0
    assert any("9 runs left" in line for line in place.lines)
    assert not place.result["complete"]
    assert place.run() == 0
    assert [len(row["runs"]) for row in place.result["rows"]] == [3, 3, 3]
    before = place.output.read_bytes()
    assert place.run() == 0
    assert any("goes on with 9 finished runs" in line for line in place.lines)
    assert json.loads(before)["rows"] == place.result["rows"]


def test_an_interrupted_benchmark_keeps_its_finished_runs(place, monkeypatch):
    run, count = Bench.run, []

    def interrupted(self, cell, runs):
        count.append(cell)
        if len(count) == 5:
            raise KeyboardInterrupt
        return run(self, cell, runs)

    monkeypatch.setattr(Bench, "run", interrupted)
    assert place.run() == 130
    kept = [len(row["runs"]) for row in place.result["rows"]]
    assert kept == [2, 1, 1]
    assert place.run() == 0
    assert len(count) == 5 + 5
    assert [len(row["runs"]) for row in place.result["rows"]] == [3, 3, 3]


def test_results_of_another_configuration_are_set_aside(place):
    assert place.run(contenders=["eager"]) == 0
    before = place.output.read_bytes()
    assert place.run("--seed", "1", contenders=["eager"]) == 0
    (aside,) = (place.output.parent / "superseded").iterdir()
    assert aside.read_bytes() == before
    assert any("another configuration" in line for line in place.lines)
    place.output.write_text("{")
    assert place.run(contenders=["eager"]) == 0
    assert place.result["complete"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--contenders", "graf"], ["graf", "graph"]),
        (["--cache-sizes", "2"], ["cache-sizes", "3"]),
        (["--backends", "cudnn"], ["cudnn", "CUDA devices only"]),
        (["--plot-only", "nowhere.json"], ["--figures"]),
        (["--plot-only", "nowhere.json", "--figures", "f"], ["nowhere.json"]),
        (["--steps", "0"], ["--steps"]),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(place, options, words):
    assert place.run(*options) == 2
    assert len(place.errors.splitlines()) == 1
    assert all(word in place.errors for word in words)
    assert not place.output.exists()


def make_row(model: str, contender: str, backend: str, time: float | None, **changes) -> dict:
    entry, cell = CONTENDERS[contender], Cell("decode", model, 2048, 4, 1, 2048, contender, backend)
    row = {"cell": cell.key, "label": entry.label, "group": entry.group or entry.method}
    if time is None:
        return {**row, "status": "failed", "reason": "out of memory: 80 GB", "tpot_ms": None, "runs": []}
    measured = {"status": "ok", "tpot_ms": time, "spread_ms": [0.9 * time, 1.2 * time], "floor_ms": 0.5}
    return {**row, **measured, "runs": [{}] * 3, **changes}


def test_the_figure_shows_what_the_file_says():
    rows = [
        make_row(model, contender, backend, time * size)
        for model, size in (("random:pythia-70m", 1), ("random:pythia-2.8b", 20))
        for contender, backend, time in (
            ("recompute", "math", 30.0), ("recompute", "flash", 20.0), ("eager", "cudnn", 3.0),
            ("fused", "flash", 0.7), ("fused-triton", "triton", 0.6),
        )
    ]  # fmt: skip
    rows.append(make_row("random:pythia-2.8b", "kvpress", "flash", None))
    rows.append({**make_row("random:pythia-2.8b", "eager", "math", None), "reason": "it broke"})
    result = {"rows": rows, "device": "a GPU", "dtype": "bfloat16", "models": {}}
    (name, figure), *others = figures([result]).items()
    assert not others
    assert name == "decode_2048_batch_1"
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["pythia-70m", "pythia-2.8b"]
    for ax, size in zip(figure.axes, (1, 20), strict=True):
        assert ax.get_xscale() == "log"
        points = {line.get_gid(): line for line in ax.lines if line.get_gid()}
        assert {gid: line.get_xdata()[0] / size for gid, line in points.items()} == pytest.approx(
            {"recompute|math": 30, "recompute|flash": 20, "eager|cudnn": 3, "fused|flash": 0.7,
             "fused-triton|triton": 0.6}
        )  # fmt: skip
        labels = [text.get_text() for text in ax.get_yticklabels()]
        for gid, line in points.items():
            assert labels[line.get_ydata()[0]] == CONTENDERS[gid.split("|")[0]].label
        low, high = ax.get_xlim()
        assert low < 0.5 < high  # the floor
        assert any(list(line.get_xdata()) == [0.5, 0.5] for line in ax.lines)
    words = " ".join(text.get_text() for text in figure.texts)
    assert "none: KVPress: out of memory: 80 GB" in words
    assert "none: StreamingDecoder, eager (math, pythia-2.8b): it broke" in words
    assert figure.axes[0].get_xlabel() == "time per step (ms)"
    assert "a\xa0GPU" in words


def test_what_two_files_have_measured_is_drawn_once():
    def result(*times: float | None) -> dict:
        rows = [make_row("random:pythia-70m", name, "flash", time)
                for name, time in zip(("fused", "eager"), times, strict=True)]  # fmt: skip
        return {"rows": rows, "device": "a GPU", "dtype": "bfloat16", "models": {}}

    (figure,) = figures([result(0.7, None), result(0.9, 3.0)]).values()
    (ax,) = figure.axes
    assert {line.get_gid(): line.get_xdata()[0] for line in ax.lines if line.get_gid()} == {
        "fused|flash": 0.7,
        "eager|flash": 3.0,
    }


def test_drawing_needs_no_torch(tmp_path):
    result = {"benchmark": "decode", "rows": [make_row("m", "eager", "math", 2.0)], "device": "d", "dtype": "float32"}
    (tmp_path / "r.json").write_text(json.dumps({**result, "models": {}}))
    argv = ["--plot-only", str(tmp_path / "r.json"), "--figures", str(tmp_path)]
    code = f"import sys; sys.path[:0] = [{str(ROOT / 'scripts')!r}, {str(ROOT)!r}]; import benchmark_decode; "
    code += f"assert benchmark_decode.main({argv!r}) == 0; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert (tmp_path / "decode_2048_batch_1.png").stat().st_size > 1000
