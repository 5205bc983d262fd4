"""`scripts/benchmark_scoring.py` on the CPU: what it writes, and what it refuses."""

from __future__ import annotations

import json

import pytest
from demo_training_support import ROOT  # noqa: F401 - puts scripts/ on the module path

import benchmark_scoring  # isort: skip

SMALL = ["--tokens", "600", "--block-size", "256", "--window-size", "128", "--repeats", "1"]


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


@pytest.mark.parametrize(
    "wrong",
    [
        ["--attn-backend-list", "fast"],
        ["--model", "pythia-0b"],
        ["--dtype", "float"],
        ["--device", "gpu"],
        ["--tokens", "1"],
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_loaded(wrong, capsys):
    assert benchmark_scoring.main([*SMALL, *wrong]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert not captured.out
