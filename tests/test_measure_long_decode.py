"""scripts/measure_long_decode.py: what it reports of a short stream, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from demo_training_support import ROOT  # noqa: F401 - puts scripts/ on the module path
from evaluation_support import error_line, make_model_folder

import measure_long_decode  # isort: skip

SHORT = ["--tokens", "2000", "--n-sink", "2", "--window-size", "30", "--device", "cpu"]


def test_two_thousand_tokens(tmp_path, capsys):
    output, model = tmp_path / "long_decode.json", make_model_folder(tmp_path / "tiny")
    assert measure_long_decode.main([*SHORT, "--model", str(model), "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert "2,000 tokens behind 32, engine eager" in said
    value = json.loads(output.read_text())
    assert value["decode_engine"] == value["scoring_engine"] == "eager"
    assert value["texts"] == ["demo_encyclopaedia", "demo_narrative"]
    assert 0 < value["loss_difference_mean"] < value["loss_difference_largest"] < 1e-4
    assert value["perplexity"] == pytest.approx(value["perplexity_block_parallel"], rel=1e-6)
    assert 1 < value["perplexity"] < 1000
    assert 0 < value["ms_per_token_first_hundredth"] < 1000
    assert value["last_to_first"] == value["ms_per_token_last_hundredth"] / value["ms_per_token_first_hundredth"]
    assert value["memory_bytes_after_warm_up"] <= value["memory_bytes_at_most"]
    assert "measure_long_decode.py --tokens 2000" in value["environment"]["command"]


def test_a_text_is_repeated_to_length(tmp_path, monkeypatch):
    text, seen = tmp_path / "a.txt", []
    text.write_text("It was a dark and stormy night. ")
    monkeypatch.setattr(measure_long_decode, "decode", lambda decoder, ids, prompt: seen.append(ids) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure_long_decode.run([*SHORT, "--text", str(text)])
    [ids] = seen
    assert ids.shape == (1, 2032)
    period = next(n for n in range(1, 100) if torch.equal(ids[:, n:], ids[:, :-n]))
    assert period > 5


def test_losses_that_are_not_finite_are_not_written(tmp_path, monkeypatch, capsys):
    output = tmp_path / "long_decode.json"
    decoded = torch.full((2000,), float("nan")), [1.0] * 1000, [1] * 1000
    monkeypatch.setattr(measure_long_decode, "decode", lambda *args: decoded)
    assert measure_long_decode.main([*SHORT, "--output", str(output)]) == 1
    assert "losses of decoding are not finite: nothing is written" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    "wrong",
    ["--tokens 1000", "--tokens 2500", "--decode-engine graph", "--model random:pythia-70m", "--text nowhere.txt"],
)
def test_what_cannot_be_measured_is_refused(wrong, capsys):
    assert error_line(lambda: measure_long_decode.main([*SHORT, *wrong.split()]), capsys)
