"""The runner: which cells run and in which order, what the files hold, what is reused, and what a failure does."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from evaluation_support import TEXT, make_model_folder, make_text, make_tokenizer

from experiments.config import SetupError
from experiments.measuring import Bench
from experiments.methods import METHODS
from experiments.progress import duration
from experiments.results import FIGURES
from experiments.storage import SaveError, folder_lock

ALL = [name for name, cls in METHODS.items() if cls.unavailable() is None]

pytestmark = pytest.mark.usefixtures("no_collection")


def ran(world) -> list[str]:
    return [
        line.split("] ", 1)[1].split(":")[0] for line in world.lines("[") if "perplexity" in line or "prefill" in line
    ]


# --- what is written ---------------------------------------------------------------------------------------------


def test_main_files_hold_every_method_with_its_comparisons(world):
    datasets = [str(path) for path in world.texts]
    summary = world.run(methods=ALL, datasets=datasets, attn_backend_list=["math", "flash"])
    assert summary.exit_code == 0
    names = [f"{stem}_main_backend-{b}.json" for stem in ("one", "two") for b in ("math", "flash")]
    assert sorted(path.name for path in (world.root / "final").glob("*.json")) == sorted(names)
    assert len(list((world.root / "fixed_eval").glob("*.json"))) == 4 * len(ALL)
    for name in names:
        value = world.result(f"final/{name}")
        assert (value["status"], value["num_tokens"], value["weights"]) == ("ok", 40, "trained")
        assert value["streaming_llm"] == {"n_sink": 2, "window_size": 14, "max_cache_size": 16}
        assert value["backend"] in name
        known = {"torch", "transformers", "gpu", "commit", "dirty", "command", "seed", "threads"}
        assert known <= set(value["environment"])
        base = value["baseline"]
        for method in ALL:
            block = value[method]
            assert set(FIGURES) <= set(block)
            assert block["status"] == "ok"
            assert (block["attn_backend"], block["engine"]) == (value["backend"], "eager")
            assert block["speedup"] == pytest.approx(base["runtime_sec"] / block["runtime_sec"])
            assert block["ppl_increase_percent"] == pytest.approx(100 * (block["perplexity"] / base["perplexity"] - 1))
            assert block["compression_ratio"] == (0 if method == "dense" else pytest.approx(1 - 16 / 40))
            assert len(block["runs"]) == 1
            own = world.result(f"fixed_eval/{name.replace('main', method)}")
            assert own["method"] == method
            assert own["perplexity"] == block["perplexity"]
            assert (own["total_time"], own["prefill_time"]) == (block["runtime_sec"], block["prefill_sec"])
        assert value["metrics"]["speedup"] == value["streaming"]["speedup"]
        if "kvpress" in ALL:
            assert value["kvpress"]["perplexity"] == pytest.approx(value["streaming"]["perplexity"], rel=1e-5)
    math, flash = (world.result(f"final/one_main_backend-{b}.json") for b in ("math", "flash"))
    for method in ALL:
        assert math[method]["perplexity"] == pytest.approx(flash[method]["perplexity"], rel=1e-5)


def test_ablations_vary_one_size_each(world):
    world.run(only=["ablation_window_size", "ablation_n_sink"], attn_backend_list=["math", "flash"])
    assert world.files("final/*.json") == [
        f"final/ablation_{kind}_backend-{b}.json" for kind in ("n_sink", "window_size") for b in ("flash", "math")
    ]
    windows = world.result("final/ablation_window_size_backend-math.json")
    assert windows["ablation_type"] == "window_size"
    assert [(e["n_sink"], e["window_size"], e["evicts"]) for e in windows["results"]] == [(2, 8, True), (2, 80, False)]
    assert windows["num_tokens"] == 60
    sinks = world.result("final/ablation_n_sink_backend-math.json")
    assert [(e["n_sink"], e["window_size"]) for e in sinks["results"]] == [(0, 16), (2, 14)]
    for entry in windows["results"] + sinks["results"]:
        assert entry["perplexity"] > 1
        assert entry["scoring"] == "parallel"
        assert entry["decode_tokens"] == (4 if entry["evicts"] else 0)
        assert entry["compression_ratio"] == (1 - entry["max_cache_size"] / 60 if entry["evicts"] else 0)


def test_figures_are_medians_of_interleaved_runs(world):
    world.run(repeats=3, datasets=[str(path) for path in world.texts])
    order = ran(world)
    assert [line[-1] for line in order] == ["1"] * 4 + ["2"] * 4 + ["3"] * 4
    value = world.result()
    for method in ("baseline", "streaming"):
        block = value[method]
        assert len(block["runs"]) == 3
        times = sorted(run["runtime_sec"] for run in block["runs"])
        assert block["runtime_sec"] == times[1]
        assert block["spread"]["runtime_sec"] == [times[0], times[2]]
        assert len({run["perplexity"] for run in block["runs"]}) == 1


def test_token_losses_are_kept_on_request(world):
    world.run(save_token_nll=True)
    with np.load(world.root / "final" / "one_main_backend-math.streaming.nll.npz") as arrays:
        assert arrays["nll"].dtype == np.float32
        assert arrays["position"].tolist() == list(range(1, 40))
        mean = arrays["nll"].astype(np.float64).mean()
    value = world.result()
    assert value["streaming"]["perplexity"] == pytest.approx(np.exp(mean))
    world.run(window_size=15)  # without them: those of the earlier result must not stay beside the new one
    assert not list((world.root / "final").glob("*.npz"))
    assert len(list((world.root / "final" / "superseded").glob("*.npz"))) == 2


def test_parallel_scoring_keeps_the_perplexity_and_samples_the_speed(world):
    world.run()
    looped = world.result()
    world.run(scoring="parallel")
    value = world.result()
    assert value["scoring"] == "parallel"
    for name in ("streaming", "baseline"):
        assert value[name]["perplexity"] == pytest.approx(looped[name]["perplexity"], rel=1e-5)
        assert value[name]["decode_tokens"] == 4
    assert value["streaming"]["speedup"] is not None
    (table,) = [line for line in world.said if "perplexity  " in line]
    assert "s for prefill + 4 tokens" in table
    assert "runtime s" not in table


def test_what_stands_in_front_of_a_text_is_warned_of_and_recorded(world):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None  # has a token for the beginning, and does not use it
    tokenizer.save_pretrained(world.model)
    values = {}
    for option in ("auto", "always", "never"):
        world.run(bos=option)
        values[option] = world.result()
        assert bool(world.lines("warning: ")) == (option == "auto")
        bos = world.result("fixed_eval/one_streaming_backend-math.json")["bos"]
        assert bos == values[option]["bos"]
        assert (bos["option"], bos["in_front"]) == (option, option == "always")
    assert values["auto"]["streaming"]["perplexity"] == values["never"]["streaming"]["perplexity"]
    assert values["always"]["streaming"]["perplexity"] != values["never"]["streaming"]["perplexity"]


def test_what_a_folder_of_texts_leaves_out_is_named(world):
    folder = world.base / "shelf"
    (folder / "deep").mkdir(parents=True)
    make_text(folder / "deep" / "a.txt")
    make_text(folder / "notes.pdf")
    world.run(datasets=[str(folder)])
    assert world.files("final/*.json") == ["final/shelf_main_backend-math.json"]
    assert any("notes.pdf" in line for line in world.lines("warning: "))


def test_random_weights_are_measured_for_speed_only(world, monkeypatch):
    from experiments import random_models

    size = random_models.pythia(32, 2, 2, 64, 128)
    monkeypatch.setitem(random_models.RANDOM_SIZES, "pythia-70m", size)
    summary = world.run(model="random:pythia-70m", datasets=None, save_token_nll=True)
    assert summary.exit_code == 0
    folder = world.output / "random-pythia-70m" / "final"
    assert [path.name for path in folder.iterdir()] == ["random_tokens_main_backend-math.json"]
    value = json.loads((folder / "random_tokens_main_backend-math.json").read_text())
    assert (value["weights"], value["num_tokens"]) == ("random", 40)
    assert "random ids" in value["tokens"]
    for method in ("baseline", "streaming"):
        assert value[method]["perplexity"] is value[method]["ppl_increase_percent"] is None
        assert "random" in value[method]["perplexity_reason"]
        assert value[method]["runs"][0]["perplexity"] is None
        assert value[method]["speedup"] > 0


def test_random_tokens_are_not_for_trained_weights(world):
    with pytest.raises(SetupError, match="random weights"):
        world.run(datasets=["random_tokens"])


def test_how_a_model_is_spread_is_recorded(world):
    pytest.importorskip("accelerate")
    world.run()
    whole = world.result()
    world.run(device_map="auto")
    value = world.result()
    spread = value["environment"]["device_map"]
    assert (spread["asked"], list(spread["weights_mb"])) == ("auto", ["cpu"])
    assert "device_map" not in whole["environment"]
    assert value["streaming"]["perplexity"] == whole["streaming"]["perplexity"]
    assert value["config_hash"] != whole["config_hash"]


def test_a_sample_of_no_steps_times_nothing(world):
    assert world.run(scoring="parallel", decode_sample=0, methods=["baseline", "streaming", "window"]).exit_code == 0
    value = world.result()
    streaming = value["streaming"]
    assert streaming["perplexity"] > 1
    for name in ("runtime_sec", "prefill_sec", "tpot_ms", "decode_toks_per_sec", "speedup"):
        assert streaming[name] is None
        assert "nothing is timed" in streaming[f"{name}_reason"]
    assert streaming["decode_tokens"] == 0
    assert "scoring_sec" not in streaming


def test_several_models_have_folders_of_their_own(world, tmp_path):
    other = make_model_folder(tmp_path / "other", seed=5)
    world.run(model=[str(world.model), str(other)])
    values = [world.result(f"../{name}/final/one_main_backend-math.json") for name in ("tiny", "other")]
    assert values[0]["streaming"]["perplexity"] != values[1]["streaming"]["perplexity"]


# --- what is reused ----------------------------------------------------------------------------------------------


def test_finished_cells_are_reused_and_named(world):
    world.run()
    before = {name: (world.root / name).read_bytes() for name in world.files()}
    world.run()
    assert ran(world) == []
    assert len(world.lines("reused: ")) == 2
    assert all(".cells" in line for line in world.lines("reused: "))
    assert {name: (world.root / name).read_bytes() for name in world.files()} == before


def test_a_new_method_joins_the_file_and_a_smaller_run_takes_none_away(world):
    world.run()
    world.run(methods=["baseline", "window"])
    assert [line.split(" | ")[2] for line in ran(world)] == ["window 2+14"]
    assert world.result()["methods"] == ["baseline", "window", "streaming"]
    assert not (world.root / "final" / "superseded").exists()


def test_more_repeats_keep_those_there_are(world):
    world.run(repeats=1)
    world.run(repeats=3)
    assert len(ran(world)) == 4
    world.run(repeats=1)
    assert ran(world) == []
    assert len(world.result()["streaming"]["runs"]) == 3


SIZES = {"n_sink": 3, "window_size": 15, "max_eval_tokens": 41, "dtype": "float64", "seed": 1, "warmup_steps": 2}


@pytest.mark.parametrize("change", [*SIZES, "text", "weights", "sources", "threads"])
def test_a_change_of_anything_that_matters_runs_everything_again(world, monkeypatch, change):
    world.run()
    first = world.result()
    if change == "text":
        make_text(world.texts[0], TEXT + "!")
    elif change == "weights":
        make_model_folder(world.model, seed=7)
    elif change == "sources":
        monkeypatch.setattr("experiments.environment.sources_hash", lambda: "other")
    elif change == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    world.run(**({change: SIZES[change]} if change in SIZES else {}))
    assert len(ran(world)) == 2
    second = world.result()
    assert second["config_hash"] != first["config_hash"]
    aside = world.root / "final" / "superseded" / f"one_main_backend-math.{first['config_hash'][:8]}.json"
    assert json.loads(aside.read_text()) == first
    assert any(str(aside) in line for line in world.said)


def test_force_runs_again_and_keeps_the_earlier_file(world):
    world.run()
    world.run(force=True)
    assert len(ran(world)) == 2
    assert len(list((world.root / "final" / "superseded").iterdir())) == 1


def test_a_dry_run_says_what_there_is_and_touches_nothing(world):
    world.run(dry_run=True)
    assert not world.output.exists()
    assert len([line for line in world.said if line.endswith(": to do")]) == 2
    assert "2 cells to do; time: about" in world.said[-1]
    world.run(methods=["baseline"])
    before = sorted(path for path in world.output.rglob("*"))
    world.run(dry_run=True, only=["main", "ablation_n_sink"])
    assert len([line for line in world.said if line.endswith(": already there")]) == 1
    assert sorted(path for path in world.output.rglob("*")) == before


# --- what goes wrong ---------------------------------------------------------------------------------------------


def break_measure(monkeypatch, error):
    """Have the cells of streaming fail."""
    original = Bench.measure

    def measure(self, task, display):
        if task.cell.method == "streaming":
            raise error
        return original(self, task, display)

    monkeypatch.setattr(Bench, "measure", measure)


def test_a_failing_cell_is_named_and_the_others_go_on(world, monkeypatch):
    with monkeypatch.context() as patched:
        break_measure(patched, torch.OutOfMemoryError("CUDA out of memory. Tried"))
        summary = world.run(repeats=2)
    assert summary.exit_code == 1
    value = world.result()
    assert value["status"] == "failed"
    assert "streaming" in value["reason"]
    assert value["streaming"]["status"] == "failed"
    assert "out of memory" in value["streaming"]["reason"]
    assert value["streaming"]["perplexity"] is value["metrics"]["speedup"] is None
    assert value["baseline"]["status"] == "ok"
    assert len(value["baseline"]["runs"]) == 2
    assert world.result("fixed_eval/one_streaming_backend-math.json")["status"] == "failed"
    assert any("FAILED" in line and "streaming" in line for line in world.said)
    assert world.run(repeats=2).exit_code == 0  # what failed is tried again, what is finished is kept
    assert len(ran(world)) == 2
    assert world.result()["streaming"]["status"] == "ok"


def test_without_a_baseline_there_is_no_speedup_but_a_reason(world):
    world.run(methods=["streaming"])
    block = world.result()["streaming"]
    assert block["speedup"] is None
    assert "baseline" in block["speedup_reason"]


def test_an_interruption_says_what_is_left_and_the_rest_goes_on_later(world, monkeypatch):
    with monkeypatch.context() as patched:
        break_measure(patched, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            world.run()
    assert any("1 of 2 cells are finished" in line for line in world.said)
    assert [line for line in world.said if line.startswith("left: one | math | streaming")]
    world.run()
    assert len(ran(world)) == 1


def test_a_broken_cell_is_named_kept_and_run_again(world):
    world.run()
    (path,) = (world.output / ".cells" / "tiny").glob("*streaming*.json")
    path.write_text(path.read_text()[:100])
    world.run()
    assert len(ran(world)) == 1
    assert any(str(path) in line and "superseded" in line for line in world.lines("broken: "))


def test_foreign_and_broken_files_are_named_never_used_never_overwritten(world):
    folder = world.root / "final"
    folder.mkdir(parents=True)
    (folder / "one_main_backend-math.json").write_text('{"schema_version": 1, "config')
    (folder / "notes.json").write_text('{"mine": true}')
    world.run()
    assert len([line for line in world.said if line.startswith("not used: ")]) == 2
    assert (folder / "notes.json").read_text() == '{"mine": true}'
    kept = folder / "superseded" / "one_main_backend-math.unreadable.json"
    assert kept.read_text() == '{"schema_version": 1, "config'
    assert world.result()["status"] == "ok"


def test_a_second_run_into_the_same_folder_is_refused(world):
    with folder_lock(world.output / ".cells" / "lock"), pytest.raises(SetupError, match="writing its results there"):
        world.run()


def test_a_result_that_cannot_be_saved_is_fatal(world, monkeypatch):
    def full(path, value):
        raise SaveError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr("experiments.kept.write_json", full)
    with pytest.raises(SaveError, match="No space"):
        world.run()
    assert not list((world.root / "final").iterdir())


def test_kvpress_is_skipped_by_default_where_it_cannot_run_and_refused_where_named(world, monkeypatch):
    monkeypatch.setattr(METHODS["kvpress"], "unavailable", classmethod(lambda cls: "it is not installed"))
    assert world.run(methods=None).exit_code == 0
    block = world.result()["kvpress"]
    assert (block["status"], block["reason"], block["perplexity"]) == ("skipped", "it is not installed", None)
    with pytest.raises(SetupError, match=r"kvpress.*not installed"):
        world.run(methods=["kvpress"])


@pytest.mark.skipif(METHODS["kvpress"].unavailable() is not None, reason="kvpress cannot run here")
def test_a_press_that_cannot_run_here_is_refused(world):
    with pytest.raises(SetupError, match="snapkv"):
        world.run(methods=["baseline", "kvpress"], kvpress_press="snapkv")


@pytest.mark.parametrize(("seconds", "words"), [(0.2, "1 s"), (59, "59 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")])
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words
