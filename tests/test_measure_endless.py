"""scripts/measure_endless.py: endless generation, its memory and its figures."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from demo_training_support import ROOT  # puts scripts/ on the module path
from evaluation_support import make_model_folder

import measure_endless  # isort: skip


def test_measuring_endless_generation(tmp_path, capsys):
    folder = make_model_folder(tmp_path / "tiny")
    output = tmp_path / "endless.json"
    given = ["--n-sink", "2", "--window-size", "14", "--device", "cpu", "--tokens", "2000", "--streams", "2"]
    given += ["--model", str(folder), "--output", str(output)]
    assert measure_endless.main(given) == 0
    assert "2 x 2,000 tokens" in capsys.readouterr().out
    value = json.loads(output.read_text())
    assert len(value["perplexity_by_tenths"]) == 10
    assert all(1 < perplexity < 260 for perplexity in value["perplexity_by_tenths"])
    assert value["perplexity_ratio_of_each"][0] != value["perplexity_ratio_of_each"][1]
    assert [sample["tokens"] for sample in value["samples"]] == [1000, 2000]
    for wrong in (["--tokens", "99"], ["--tokens", "2500"], ["--streams", "0"], ["--model", "random:pythia-70m"]):
        assert measure_endless.main(wrong) == 2


def test_figures_of_tenths():
    ids = torch.arange(80).view(2, 40).numpy() % 6
    nll = torch.linspace(0, 1, 80).view(2, 40).numpy()
    value = measure_endless.quality(nll, ids)
    assert value["perplexity_by_tenths"][0] == pytest.approx(math.exp((nll[0, :4].mean() + nll[1, :4].mean()) / 2))
    assert value["perplexity_ratio_of_each"] == pytest.approx([math.exp(36 / 79)] * 2, rel=1e-5)
    assert value["perplexity_ratio"] == pytest.approx(math.exp(36 / 79), rel=1e-5)
    assert value["distinct_4grams_by_tenths"] == [1.0] * 10
    assert measure_endless.quality(np.zeros((1, 100)), np.arange(100)[None] % 6)["distinct_4grams_by_tenths"][0] == 6


@pytest.mark.slow
def test_a_hundred_thousand_tokens_in_constant_memory_and_as_good_at_the_end_as_at_the_beginning(tmp_path):
    output = tmp_path / "endless.json"
    run = [sys.executable, str(ROOT / "scripts" / "measure_endless.py"), "--device", "cpu", "--streams", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*run, "--output", str(output)], check=True, cwd=ROOT, env=environment)
    value = json.loads(output.read_text())
    assert value["tokens"] == 100_000
    assert abs(value["memory_growth"]) < 0.01
    assert 0.9 < value["perplexity_ratio"] < 1.1
    assert min(value["distinct_4grams_ratio_of_each"]) > 0.8
