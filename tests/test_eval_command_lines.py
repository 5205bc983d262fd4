"""The command lines: what they print, one line and exit code 2 for what is wrong, and what a run leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from evaluation_support import error_line, make_model_folder, make_text

import eval_streaming_llm
from experiments import run_final_experiments

ROOT = Path(__file__).resolve().parents[1]
SIZES = ["--n-sink", "2", "--window-size", "14", "--max-eval-tokens", "40", "--device", "cpu"]

pytestmark = pytest.mark.usefixtures("no_collection")


def subject(world) -> list[str]:
    return ["--model", str(world.model), "--datasets", str(world.texts[0]), *SIZES]


def final(world, *options) -> int:
    base = [*subject(world), "--output-dir", str(world.output), "--methods", "baseline", "streaming", "--only", "main"]
    return run_final_experiments.main([*base, *options])


def test_a_run_prints_a_table_and_writes_its_files(world, capsys):
    assert final(world, "--attn-backend-list", "math", "flash") == 0
    printed = capsys.readouterr().out
    for words in ("Baseline (math)", "StreamingLLM (math)", "Baseline (flash)", "StreamingLLM (flash)", "speedup"):
        assert words in printed
    value = world.result("final/one_main_backend-flash.json")
    command = value["environment"]["command"]
    assert command.startswith("python experiments/run_final_experiments.py --model")
    assert "--attn-backend-list math flash" in command


def test_plain_text_is_evaluated_without_the_package_datasets(world, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert final(world) == 0
    assert eval_streaming_llm.main([*subject(world), "--output", str(world.base / "x.json")]) == 0


def test_the_comparison_honours_the_environment_and_writes_where_it_is_told(world, capsys, monkeypatch):
    monkeypatch.setenv("FLASH_SDPA", "1")
    target = world.base / "sub" / "x.json"
    options = [*subject(world), "--output", str(target), "--repeats", "2"]
    assert eval_streaming_llm.main(options) == 0
    printed = capsys.readouterr().out
    assert "Baseline (flash)" in printed
    assert "StreamingLLM (flash)" in printed
    value = json.loads(target.read_text())
    assert (value["backend"], len(value["streaming"]["runs"])) == ("flash", 2)
    assert "already" in error_line(lambda: eval_streaming_llm.main(options), capsys)  # nothing is overwritten
    assert eval_streaming_llm.main([*subject(world), "--attn-backend", "math"]) == 0  # what is said goes first
    assert "Baseline (math)" in capsys.readouterr().out


def test_a_failure_while_comparing_is_told_with_exit_code_1(world, capsys, monkeypatch):
    def fail(*_):
        raise MemoryError("no more")

    monkeypatch.setattr("experiments.measuring.Bench.measure", fail)
    assert eval_streaming_llm.main(subject(world)) == 1
    assert "out of memory: no more" in capsys.readouterr().out


BAD = {
    "model": (["--model", "nothing/here"], "nothing/here"),
    "random size": (["--model", "random:pythia-9b"], "pythia-6.9b"),
    "backend": (["--attn-backend-list", "flsh"], "flash"),
    "data set": (["--datasets", "wikitxt"], "wikitext"),
    "missing file": (["--datasets", "missing.txt"], "missing.txt"),
    "dtype": (["--dtype", "float8"], "bfloat16"),
    "device": (["--device", "tpu"], "cpu"),
    "device that is none": (["--device", "gpu0"], "cpu"),
    "sinks": (["--n-sink", "-1"], "n_sink"),
    "window": (["--window-size", "0"], "window_size"),
    "tokens": (["--max-eval-tokens", "1"], "max_eval_tokens"),
    "no number": (["--window-size", "many"], "--window-size"),
    "option": (["--window", "3"], "--window"),
    "engine": (["--decode-engine", "warp"], "eager"),
}
BAD_FINAL = {
    "method": (["--methods", "streeming"], "streaming"),
    "experiment": (["--only", "mian"], "main"),
    "press": (["--methods", "baseline", "--kvpress-press", "snapkv"], "snapkv"),
    "repeats": (["--repeats", "0"], "repeats"),
}


def compared(world, *options) -> int:
    return eval_streaming_llm.main([*subject(world), *options])


@pytest.mark.parametrize(("command", "case"), [*product([final], BAD | BAD_FINAL), *product([compared], BAD)])
def test_bad_input_gets_one_line_and_exit_code_2(world, capsys, monkeypatch, command, case):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    options, words = (BAD | BAD_FINAL)[case]
    assert words in error_line(lambda: command(world, *options), capsys)
    assert not list(world.output.rglob("*.json"))


@pytest.mark.parametrize("content", ["", "a", "<|endoftext|>"])
def test_a_text_of_fewer_than_two_tokens_is_bad_input(world, capsys, content):
    short = make_text(world.base / "short.txt", content)
    assert "short.txt" in error_line(lambda: final(world, "--datasets", str(short)), capsys)


@pytest.mark.parametrize(
    ("family", "has"), [("gpt2", "learned"), ("opt", "learned"), ("bloom", "ALiBi"), ("mpt", "ALiBi")]
)
def test_a_model_without_rotary_positions_is_bad_input_before_its_weights_are_read(world, capsys, family, has):
    from transformers import AutoConfig

    AutoConfig.for_model(family).save_pretrained(world.base / family)
    line = error_line(lambda: final(world, "--model", str(world.base / family)), capsys)
    assert f"'{family}' cannot stream: it has {has}" in line


def test_flash_where_it_cannot_run_is_bad_input(world, capsys, monkeypatch):
    from personal_adapters import sdpa

    monkeypatch.setattr(sdpa, "check_backend_available", lambda *_: sdpa.Availability(False, "no such kernel"))
    assert "no such kernel" in error_line(lambda: final(world, "--attn-backend-list", "math", "flash"), capsys)


def test_an_output_folder_that_is_a_file_is_bad_input(world, capsys):
    world.output.write_text("")
    assert "cannot be written" in error_line(lambda: final(world), capsys)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_folder_without_permission_is_bad_input(world, capsys):
    world.output.mkdir()
    world.output.chmod(0o500)
    assert "cannot be written" in error_line(lambda: final(world), capsys)


def test_an_interruption_ends_with_130(world, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("experiments.measuring.Bench.measure", interrupt)
    assert final(world) == 130
    assert "0 of 2 cells are finished" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["experiments/run_final_experiments.py", "eval_streaming_llm.py"])
def test_the_scripts_start_from_a_checkout_that_is_not_installed(script):
    path = ROOT / script
    code = f"""import runpy, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
sys.path = [{str(path.parent)!r}, *(p for p in sys.path[1:] if p != {str(ROOT)!r})]
sys.argv = [{str(path)!r}, "--help"]
runpy.run_path(sys.argv[0], run_name="__main__")"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd="/", env=environment, capture_output=True, text=True)
    assert "examples:" in done.stdout, done.stderr
    assert "--n-sink" in done.stdout


def test_the_runner_is_importable_from_its_script():
    assert run_final_experiments.ExperimentRunner.__name__ == "ExperimentRunner"
    config = run_final_experiments.ExperimentConfig(attn_backend_list=["math", "flash"])
    assert config.attn_backend_list == ("math", "flash")


def test_ray_that_is_not_installed_is_bad_input(world, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    line = error_line(lambda: final(world, "--launcher", "ray"), capsys)
    assert "pip install -e '.[cluster]' in the checkout" in line


def test_help_lists_every_option_of_the_configuration(capsys):
    with pytest.raises(SystemExit):
        run_final_experiments.main(["--help"])
    printed = capsys.readouterr().out
    for option in ("--repeats", "--only", "--force", "--dry-run", "--save-token-nll", "--scoring", "--kvpress-press"):
        assert option in printed


def test_folders_with_equal_names_are_refused(world, capsys):
    other = make_model_folder(world.base / "elsewhere" / "tiny")
    assert "same folder" in error_line(lambda: final(world, "--model", str(world.model), str(other)), capsys)


def test_a_mistyped_option_names_the_nearest(capsys):
    line = error_line(lambda: run_final_experiments.main(["--modle", "demo"]), capsys)
    assert "--modle demo (did you mean --model?)" in line
