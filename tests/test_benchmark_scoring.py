"""`scripts/benchmark_scoring.py` on the CPU: what it writes, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from demo_training_support import ROOT  # noqa: F401 - puts scripts/ on the module path

import benchmark_scoring  # isort: skip

SMALL = ["--tokens", "600", "--block-size", "256", "--window-size", "128", "--repeats", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_every_model_and_backend_is_measured(tmp_path, capsys):
    output = tmp_path / "scoring.json"
    arguments = ["--attn-backend-list", "math", "flash", "--peak-tokens", "900", *SMALL, "--output", str(output)]
    assert benchmark_scoring.main(arguments) == 0
    result = json.loads(output.read_text())
    assert (result["tokens"], result["block_size"], result["window_size"]) == (600, 256, 128)
    assert result["environment"]["command"]
    backends = result["models"]["demo"]["backends"]
    assert list(backends) == ["math", "flash"]
    for figures in backends.values():
        speed = figures["toks_per_sec"]
        assert figures["engine"] == "eager"
        assert figures["streaming_to_dense"] == pytest.approx(speed["streaming"] / speed["dense_chunks"])
        assert list(figures["peak_memory_mb"]) == ["600", "900"]
    assert "demo (trained weights), flash: streaming" in capsys.readouterr().out


def test_a_backend_that_fails_is_named_and_the_others_go_on(tmp_path, capsys, monkeypatch):
    measured, output = iter([torch.OutOfMemoryError("CUDA out of memory.\nand more"), None]), tmp_path / "scoring.json"
    measure = benchmark_scoring.measure

    def fails_once(*given) -> dict:
        if (error := next(measured)) is not None:
            raise error
        return measure(*given)

    monkeypatch.setattr(benchmark_scoring, "measure", fails_once)
    assert benchmark_scoring.main(["--attn-backend-list", "math", "flash", *SMALL, "--output", str(output)]) == 1
    backends = json.loads(output.read_text())["models"]["demo"]["backends"]
    assert backends["math"] == {"status": "failed", "reason": "CUDA out of memory."}
    assert backends["flash"]["status"] == "ok"
    assert "demo (trained weights), math: failed: CUDA out of memory." in capsys.readouterr().err


def test_an_engine_that_cannot_run_fails_with_the_reason(capsys):
    assert benchmark_scoring.main([*SMALL, "--engine", "fused"]) == 1
    assert (
        "demo (trained weights), math: failed: engine 'fused' cannot run: it needs a CUDA" in capsys.readouterr().err
    )


def test_a_last_token_by_itself_is_no_chunk():
    assert benchmark_scoring.main([*SMALL, "--tokens", "513"]) == 0


def test_help_shows_how_it_is_used(capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark_scoring.main(["--help"])
    assert stopped.value.code == 0
    assert "python scripts/benchmark_scoring.py --model random:pythia-70m" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong", ["--attn-backend-list fast", "--model pythia-0b", "--dtype float", "--device gpu", "--tokens 1"]
)
def test_what_cannot_run_is_refused_before_anything_is_loaded(wrong, capsys):
    assert benchmark_scoring.main([*SMALL, *wrong.split()]) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n"), error[:7]) == ("", 1, "error: ")
