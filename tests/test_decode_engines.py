"""Engines in the evaluation: which ran is recorded, capturing is not measured, each has a baseline of its own.

A CPU has the eager engine only. Stand-ins take the place of what captures; what they compute is the eager result.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import ClassVar

import pytest
from conftest import make_ids, make_neox

from experiments import measuring, method_base, methods
from experiments.config import SetupError
from experiments.methods import METHODS, MethodSettings
from experiments.perplexity import compute_perplexity
from experiments.plan import engines_of
from experiments.plot_comprehensive_results import draw
from experiments.plotting.captions import caption
from experiments.plotting.script import draw_styled
from experiments.plotting.table import read_results
from streaming_llm import ENGINES
from streaming_llm.engines.base import Engine

pytestmark = pytest.mark.usefixtures("no_collection")
S, W, N = 2, 14, 40
C = S + W


class StandInEngine(Engine):
    """Computes as the eager engine does, and passes for one that records something at the start of some runs."""

    made: ClassVar[list[StandInEngine]] = []
    recording_runs = 1

    def __init__(self, model, cache, name):
        super().__init__(model, cache)
        self.name, self.runs = name, 0
        self.made.append(self)

    def step(self, token_ids):
        if self.cache.n_seen == C:
            self.runs += 1
            self.compile_sec += 1.0 if self.runs <= self.recording_runs else 0.0
        return super().step(token_ids)


@pytest.fixture
def captured(monkeypatch) -> list[tuple[int, ...]]:
    """Puts the stand-ins in place; the shapes that were captured for re-computation."""
    shapes = []

    def capture(forward, example, engine):
        shapes.append(tuple(example.shape))
        return forward

    for name in ("graph", "fused-triton"):
        make = partial(StandInEngine, name=name)
        kind = replace(ENGINES[name], make=make, why_not=lambda model: None, blocks="eager")
        monkeypatch.setitem(ENGINES, name, kind)
    monkeypatch.setattr(StandInEngine, "made", [])
    monkeypatch.setattr(method_base, "capture", capture)
    monkeypatch.setattr(methods, "forward_of", lambda model, engine: method_base.plain_forward(model))
    return shapes


def test_on_a_cpu_another_engine_is_refused_before_anything_is_computed(world):
    for names in (["baseline"], ["streaming"]):
        with pytest.raises(SetupError, match="graph"):
            world.run(engine="graph", methods=names)
    assert not world.root.exists()
    with pytest.raises(ValueError, match="needs a CUDA device, and the model is on cpu: choose eager"):
        method_base.forward_of(make_neox(), "fused")
    with pytest.raises(ValueError, match="no engine 'warp' re-computes"):
        method_base.forward_of(make_neox(), "warp")


def test_every_method_is_compared_with_the_baseline_of_its_own_engine(world, tmp_path, captured):
    names = ["baseline", "streaming", "window", "dense"]
    world.run(methods=names, output_dir=tmp_path / "eager", engine="eager")
    summary = world.run(methods=names, engine="graph", repeats=2)
    assert summary.exit_code == 0
    main = world.result()
    eager = json.loads((tmp_path / "eager" / "tiny" / "final" / "one_main_backend-math.json").read_text())
    assert {name: main[name]["engine"] for name in names} == {
        "baseline": "graph", "streaming": "graph", "window": "graph", "dense": "eager",
    }  # fmt: skip
    assert {engine: block["engine"] for engine, block in main["baselines"].items()} == {
        "graph": "graph", "eager": "eager",
    }  # fmt: skip
    assert main["baselines"]["graph"] == main["baseline"]
    assert "baselines" not in eager
    for name in names:
        block, own = main[name], main["baselines"][main[name]["engine"]]
        assert block["perplexity"] == pytest.approx(eager[name]["perplexity"], rel=1e-6)
        assert ("compile_sec" in block) == (name != "dense")
        assert block["speedup"] == own["runtime_sec"] / block["runtime_sec"]
        assert len(block["runs"]) == 2
    assert main["streaming"]["speedup"] == main["metrics"]["speedup"] > 0
    assert any("engine: graph (math)" in line for line in world.said)
    assert set(captured) == {(1, C)}
    order = [line.split(" | ", 2)[2].split(" | ")[0] for line in world.lines("[")]
    cells = ["baseline 2+14 (graph)", "baseline 2+14", "streaming 2+14 (graph)", "window 2+14 (graph)", "dense 2+14"]
    assert order == 2 * cells
    world.run(methods=names, engine="graph", repeats=2)
    assert len(world.lines("reused: ")) == 10


def test_the_ring_kernel_is_compared_with_the_fused_recomputation(world, captured):
    assert world.run(engine="fused-triton").exit_code == 0
    main = world.result()
    assert (main["streaming"]["engine"], main["baseline"]["engine"]) == ("fused-triton", "fused")
    assert main["streaming"]["speedup"] == main["baseline"]["runtime_sec"] / main["streaming"]["runtime_sec"]


@pytest.mark.parametrize(
    ("engine", "methods", "expected"),
    [
        ("fused", ["baseline", "streaming", "kvpress"], ("fused", "eager")),
        ("fused", ["baseline", "dense", "window"], ("fused", "eager")),
        ("fused-triton", ["baseline", "streaming"], ("fused",)),
        ("graph+compile", ["baseline", "streaming"], ("graph+compile",)),
        ("fused", ["baseline", "kvpress"], ("eager",)),
        ("graph", ["baseline"], ("graph",)),
        ("eager", ["baseline", "streaming", "kvpress"], ("eager",)),
    ],
)
def test_the_baseline_runs_with_each_engine_that_a_method_uses(engine, methods, expected):
    assert engines_of("baseline", engine, methods) == expected


def test_a_baseline_that_fails_takes_away_the_speedups_of_its_engine_only(world, captured, monkeypatch):
    measure = measuring.Bench.measure

    def fail(self, task, display):
        if (task.cell.method, task.cell.engine) == ("baseline", "eager"):
            raise MemoryError("no more")
        return measure(self, task, display)

    monkeypatch.setattr(measuring.Bench, "measure", fail)
    assert world.run(methods=["baseline", "streaming", "dense"], engine="graph").exit_code == 1
    main = world.result()
    assert main["status"] == "failed"
    assert main["reason"].startswith("baseline (eager): out of memory")
    assert main["streaming"]["speedup"] is not None
    assert main["dense"]["speedup"] is None
    assert "no baseline" in main["dense"]["speedup_reason"]


def test_figures_cope_with_two_engines_and_name_them(world, captured):
    world.run(methods=["baseline", "streaming", "dense"], engine="graph")
    results = read_results(world.root)
    (dense,) = results.cells[results.cells["method"] == "dense"].itertuples()
    assert dense.speedup > 0
    assert "engines: eager (Dense); graph (Baseline, StreamingLLM)" in caption(results.cells).replace("\xa0", " ")
    assert draw_styled(draw, results)


def test_auto_is_resolved_before_anything_is_named(world, captured):
    world.run(engine="graph")
    world.run(engine="auto")
    assert len(world.lines("reused")) == 2
    main = world.result()
    assert main["baseline"]["engine"] == main["streaming"]["engine"] == "graph"
    world.run(engine="eager")
    assert not world.lines("reused")


def test_auto_that_cannot_be_resolved_says_so(world, monkeypatch):
    def refuse(*args):
        raise ValueError("no engine at all")

    monkeypatch.setattr(measuring, "resolve_engine", refuse)
    with pytest.raises(SetupError, match=r"engine 'auto' cannot run .*: no engine at all"):
        world.run(engine="auto")


@pytest.mark.parametrize("name", ["baseline", "streaming"])
def test_capturing_is_over_before_the_measurement_also_without_warm_up(captured, name):
    settings = MethodSettings(S, W, engine="graph")
    result = compute_perplexity(make_neox(), make_ids(N), METHODS[name](make_neox(), settings), warmup_steps=0)
    assert result.engine == "graph"
    assert result.details["compile_sec"] > 0
    assert result.decode_tokens == N - 1 - C
    assert len(captured) == (1 if name == "baseline" else 0)


@pytest.mark.parametrize(
    ("name", "engine", "blocks"),
    [("streaming", "eager", "eager"), ("window", "graph", "eager"), ("streaming", "fused", "fused"),
     ("streaming", "fused-triton", "fused-triton"), ("dense", "fused", "eager")],
)  # fmt: skip
def test_parallel_scoring_runs_the_engine_s_own_blocks(monkeypatch, name, engine, blocks):
    asked = []
    monkeypatch.setattr(methods, "score_stream", lambda *args, engine: asked.append(ENGINES[engine].blocks))
    METHODS[name](make_neox(), MethodSettings(S, W, engine=engine)).score(make_ids(N))
    assert asked == [blocks]


def test_recomputation_is_captured_at_its_full_length_only(captured):
    model, ids = make_neox(), make_ids(N)
    with METHODS["baseline"](model, MethodSettings(S, W, engine="graph")) as method:
        for _ in range(2):
            method.reset()
            method.prefill(ids[:, : C - 2])
            for t in range(C - 2, C + 4):
                method.step(ids[:, t])
    assert captured == [(1, C)]


def test_a_run_in_which_something_was_captured_does_not_count(captured, monkeypatch):
    model, ids = make_neox(), make_ids(N)
    method = METHODS["streaming"](model, MethodSettings(S, W, engine="graph"))
    monkeypatch.setattr(StandInEngine, "recording_runs", 3)  # in the warm-up and twice after it
    assert compute_perplexity(model, ids, method).details["compile_sec"] == 3
    assert StandInEngine.made[-1].runs == 4
    monkeypatch.setattr(StandInEngine, "recording_runs", 100)
    with pytest.raises(RuntimeError, match="captures or compiles anew in every run"):
        compute_perplexity(model, ids, method)
