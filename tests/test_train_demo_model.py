"""The demo model's trainer as a whole: one command, resuming, errors, and the files that it leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from demo_training_support import ROOT, SCRIPT, TINY, make_text
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_demo_model  # isort: skip
from demo_training import byte_bpe, held_out  # isort: skip
from demo_training.loop import Trainer  # isort: skip
from demo_training.recipe import Recipe  # isort: skip

TINY_ARGUMENTS = [str(x) for name, value in TINY.items() for x in (f"--{name.replace('_', '-')}", value)]


@pytest.fixture(autouse=True)
def one_thread():
    """The same sums in the same order, here and in a subprocess with OMP_NUM_THREADS=1."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(make_text(6000), encoding="utf-8")
    return path


def run(data: object, output: Path, *more: str) -> int:
    arguments = ["--data", str(data), "--output-dir", str(output), "--device", "cpu", *TINY_ARGUMENTS, *more]
    return train_demo_model.main(arguments)


def weights(output: Path) -> bytes:
    return (output / "model.safetensors").read_bytes()


def loss_curve(output: Path) -> list[list[float]]:
    return json.loads((output / "report.json").read_text())["training"]["loss_curve"]


# ---------------------------------------------------------------------------------------------- the whole run


def test_one_command_leaves_a_model_that_transformers_loads(data, tmp_path, capsys):
    output = tmp_path / "out"
    assert run(data, output) == 0

    names = {path.name for path in output.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "report.json"} <= names
    assert not list(output.rglob("*.tmp"))
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.dtype == torch.float32
    assert model.config.max_position_embeddings == TINY["context_length"]
    assert model.gpt_neox.rotary_emb.inv_freq.shape == (2,)  # a quarter of 16 dimensions, in pairs

    report = json.loads((output / "report.json").read_text())
    assert report["training"]["steps"] == TINY["steps"]
    assert report["training"]["tokens"] == TINY["steps"] * TINY["batch_size"] * TINY["context_length"]
    curve = report["training"]["loss_curve"]
    assert curve[-1][1] < curve[0][1] - 0.5, "it learns something"
    (result,) = report["held_out"]["results"]
    assert result["text"] == "text.txt (end)"
    assert all(1 < result[kind] < 300 for kind in ("dense", "window", "streaming"))
    assert len(report["held_out"]["attention_on_token_0_by_layer"]) == TINY["num_layers"]
    assert "bits/char" in capsys.readouterr().out
    assert str(tmp_path) not in json.dumps(report), "a report names files, not the folders of a machine"


def test_the_same_seed_gives_the_same_weights_and_another_does_not(data, tmp_path):
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert run(data, tmp_path / name, "--seed", seed) == 0
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert weights(tmp_path / "a") != weights(tmp_path / "c")


def test_interrupted_and_resumed_equals_uninterrupted(data, tmp_path, monkeypatch, capsys):
    assert run(data, tmp_path / "whole") == 0
    step = Trainer._step
    for stop_after in (7, 23):

        def step_and_interrupt(self, stop_after=stop_after):
            step(self)
            if self.progress.step == stop_after:
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(Trainer, "_step", step_and_interrupt)
        assert run(data, tmp_path / "parts") == 130
        assert f"interrupted after step {stop_after}" in capsys.readouterr().err
        assert not (tmp_path / "parts" / "model.safetensors").exists()
    monkeypatch.setattr(Trainer, "_step", step)
    assert run(data, tmp_path / "parts") == 0
    assert "resuming after step 23" in capsys.readouterr().out
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert loss_curve(tmp_path / "parts") == loss_curve(tmp_path / "whole")


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_equals_uninterrupted(data, tmp_path):
    more = ["--steps", "600", "--checkpoint-every-sec", "0.02"]
    assert run(data, tmp_path / "whole", *more) == 0
    output = tmp_path / "killed"
    checkpoint = output / "work" / "checkpoint.pt"
    command = [sys.executable, str(SCRIPT), "--data", str(data), "--output-dir", str(output), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    random = np.random.default_rng(0)
    kills = 0
    for _ in range(4):
        seen = checkpoint.stat().st_mtime_ns if checkpoint.exists() else None
        process = subprocess.Popen(
            [*command, *TINY_ARGUMENTS, *more], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            while process.poll() is None and (not checkpoint.exists() or checkpoint.stat().st_mtime_ns == seen):
                time.sleep(0.005)
            time.sleep(random.uniform(0, 0.4))
        finally:
            process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 2, "the kills came before the end"
    assert run(data, output, *more) == 0
    assert weights(output) == weights(tmp_path / "whole")
    assert loss_curve(output) == loss_curve(tmp_path / "whole")


def test_a_finished_run_is_not_trained_again_and_a_failed_report_loses_nothing(data, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(held_out, "measure", lambda *_: 1 / 0)
        assert run(data, output) == 1
    assert "report failed (ZeroDivisionError" in capsys.readouterr().err
    assert "ZeroDivisionError" in json.loads((output / "report.json").read_text())["held_out_error"]
    trained = weights(output)
    monkeypatch.setattr(Trainer, "_step", lambda self: pytest.fail("trained again"))
    monkeypatch.setattr(byte_bpe, "train_tokenizer", lambda *_: pytest.fail("trained the tokenizer again"))
    monkeypatch.setattr(byte_bpe, "encode_documents", lambda *_: pytest.fail("encoded again"))
    assert run(data, output) == 0
    assert weights(output) == trained
    assert json.loads((output / "report.json").read_text())["held_out"]["results"]


def test_another_configuration_is_refused_and_changes_nothing(data, tmp_path, capsys):
    output = tmp_path / "out"
    assert run(data, output) == 0
    before = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    assert run(data, output, "--learning-rate", "0.001", "--vocab-size", "290") == 2
    error = capsys.readouterr().err
    assert "learning_rate: 0.002 there, 0.001 now" in error
    assert "vocab_size: 300 there, 290 now" in error
    other = tmp_path / "other.txt"
    other.write_text(make_text(6000, seed=1))
    assert run(other, output) == 2
    assert "data_sha256" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()} == before
    (output / "work" / "checkpoint.pt").unlink()
    assert run(data, output) == 2
    assert "holds a model" in capsys.readouterr().err
    assert run(data, output, "--force", "--seed", "5") == 0
    assert weights(output) != before["model.safetensors"]


def test_a_broken_checkpoint_is_named(data, tmp_path, capsys):
    output = tmp_path / "out"
    assert run(data, output) == 0
    checkpoint = output / "work" / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    assert run(data, output) == 2
    assert "not a readable checkpoint" in capsys.readouterr().err


def test_max_minutes_takes_effect_in_a_run(data, tmp_path):
    more = ["--steps", "100000", "--warmup-steps", "80", "--max-minutes", "0.02"]
    assert run(data, tmp_path / "out", *more) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert 80 < report["training"]["steps"] < 5000
    assert report["training"]["steps"] == report["training"]["loss_curve"][-1][0]


def test_a_loss_that_is_not_finite_ends_the_run_and_is_never_saved(data, tmp_path, monkeypatch, capsys):
    loss = Trainer._eager_loss
    monkeypatch.setattr(Trainer, "_eager_loss", lambda self, ids: loss(self, ids) * float("nan"))
    assert run(data, tmp_path / "out", "--checkpoint-every-sec", "1e-9") == 1
    assert "no longer finite at step 1" in capsys.readouterr().err
    assert not (tmp_path / "out" / "work" / "checkpoint.pt").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_on_cuda(data, tmp_path):
    output = tmp_path / "out"
    assert train_demo_model.main(["--data", str(data), "--output-dir", str(output), *TINY_ARGUMENTS]) == 0
    report = json.loads((output / "report.json").read_text())
    assert report["environment"]["autocast"] == "bfloat16"
    assert report["training"]["loss_curve"][-1][1] < report["training"]["loss_curve"][0][1] - 0.5


# ---------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "no such file"),
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\n\t ", "is empty"),
        ("zero.txt", b"text\0text", "is not text (zero byte at offset 4)"),
        ("latin.txt", b"caf\xe9 au lait", "is not UTF-8 text (byte 0xe9 at offset 3)"),
        ("broken.txt.xz", b"no xz at all", "cannot be read"),
        ("short.txt", b"too short for anything", "the text is too small for --vocab-size"),
        ("folder/", b"", "holds no .txt file"),
    ],
)
def test_bad_data_is_named_in_one_line(tmp_path, capsys, name, content, message):
    path = tmp_path / name
    if name.endswith("/"):
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    assert run(path, tmp_path / "out") == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "steps = 0: must be at least 1"),
        (["--num-heads", "3"], "hidden_size = 32: must be a multiple of num_heads"),
        (["--rotary-pct", "0.2"], "rotary_pct = 0.2"),
        (["--learning-rate", "nan"], "learning_rate = nan: must be positive"),
        (["--vocab-size", "256"], "vocab_size = 256: must lie between 257 and 65536"),
        (["--warmup-steps", "40"], "warmup_steps = 40: must be below steps (40)"),
        (["--max-minutes", "1"], "must be at least 80 where max_minutes is given"),
        (["--device", "tpu9"], "--device tpu9: cannot be used here"),
        (["--held-out-tokens", "63"], "--held-out-tokens 63: must be at least 64"),
        (["--held-out-start", "-1"], "--held-out-start -1"),
        (["--checkpoint-every-sec", "0"], "--checkpoint-every-sec 0.0: must be positive"),
        (["--held-out", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--data", "hf:"], "expected hf:<dataset>"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_written(data, tmp_path, capsys, arguments, message):
    assert run(data, tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_held_out_text_that_is_too_short_is_found_before_training(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Trainer, "run", lambda self: pytest.fail("trained"))
    short = tmp_path / "short.txt"
    short.write_text("a few words only")
    assert run(data, tmp_path / "out", "--held-out", str(short), "--held-out-start", "0") == 2
    assert "held-out text short.txt" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- what is shipped


@pytest.fixture
def shipped() -> Path:
    folder = ROOT / "experiments" / "assets" / "demo_model"
    if not (folder / "model.safetensors").exists():
        pytest.skip("the demo model is not in this checkout")
    return folder


def test_the_shipped_model_is_what_its_recipe_says(shipped):
    report = json.loads((shipped / "report.json").read_text())
    assert (shipped / "model.safetensors").stat().st_size <= 16e6
    model = AutoModelForCausalLM.from_pretrained(shipped)
    assert model.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) == report["parameters"]
    assert AutoTokenizer.from_pretrained(shipped)("Any text.").input_ids[0] == 0
    assert report["recipe"] == Recipe(**report["recipe"]).as_dict()


def test_the_shipped_model_needs_its_sinks(shipped):
    for result in json.loads((shipped / "report.json").read_text())["held_out"]["results"]:
        assert result["tokens"] == 4096
        assert result["window_to_streaming"] >= 1.3
        assert result["dense_to_streaming"] >= 5
