"""Configurations and models: what is accepted, what is refused, and with which words."""

from __future__ import annotations

import json

import pytest
import torch
from evaluation_support import make_model_folder
from family_models import POSITIONS, VOCAB, make_family, takes_sdpa
from transformers import AutoModelForCausalLM

from experiments.config import ExperimentConfig, SetupError, settings_for, window_ladder
from experiments.executors import InProcess
from experiments.models import find_model
from experiments.random_models import RANDOM_SIZES, pythia, random_config, random_model
from experiments.texts import load_texts
from personal_adapters.neox_flash import wrap_attention

CPU = torch.device("cpu")


# --- configuration ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_sink": -1}, ["n_sink", "-1", "0"]),
        ({"window_size": 0}, ["window_size", "0", "1"]),
        ({"max_eval_tokens": 1}, ["max_eval_tokens", "1", "2"]),
        ({"repeats": 0}, ["repeats", "0"]),
        ({"repeats": True}, ["repeats", "True"]),
        ({"methods": ["streming"]}, ["streming", "did you mean 'streaming'", "baseline"]),
        ({"only": "ablations"}, ["ablations", "ablation_n_sink"]),
        ({"dtype": "int8"}, ["int8", "bfloat16"]),
        ({"scoring": "fast"}, ["fast", "parallel"]),
        ({"engine": "warp"}, ["warp", "eager"]),
        ({"kvpress_press": "norm"}, ["norm", "knorm"]),
        ({"model": []}, ["model"]),
        ({"ablation_n_sinks": [0, -2]}, ["ablation_n_sinks", "-2"]),
    ],
)
def test_a_wrong_setting_is_refused_by_name_and_value(changes, words):
    with pytest.raises(SetupError) as caught:
        ExperimentConfig(**changes)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_may_be_one_or_several_and_are_taken_once():
    config = ExperimentConfig(model="demo", datasets=["a.txt", "a.txt"], only="main")
    assert (config.model, config.datasets, config.only) == (("demo",), ("a.txt",), ("main",))


def test_default_sizes_suit_the_model():
    demo = settings_for(ExperimentConfig(), 512, is_demo=True)
    assert (demo.n_sink, demo.window_size, demo.max_eval_tokens) == (4, 252, 768)
    assert demo.ablation_window_sizes == (32, 64, 128, 256, 512)
    pythia = settings_for(ExperimentConfig(), 2048, is_demo=False)
    assert (pythia.n_sink, pythia.window_size, pythia.max_eval_tokens) == (4, 2044, 4096)
    assert pythia.ablation_window_sizes == (128, 256, 512, 1024, 2048)
    assert pythia.ablation_n_sinks == (0, 1, 2, 4, 8, 16)
    large = settings_for(ExperimentConfig(n_sink=8), 131072, is_demo=False)
    assert (large.cache_size, large.window_size) == (2048, 2040)
    assert window_ladder(3, steps=5) == (1, 2)


def test_default_sizes_fit_a_sliding_window_of_the_model_and_others_are_refused_by_option():
    small = settings_for(ExperimentConfig(), 4096, is_demo=False, largest_window=16)
    assert (small.n_sink, small.window_size, small.cache_size) == (4, 12, 16)
    assert small.ablation_window_sizes == (1, 2, 4, 8, 16)
    assert settings_for(ExperimentConfig(window_size=16), 4096, False, 16).window_size == 16
    with pytest.raises(SetupError, match=r"--window-size at most 16"):
        settings_for(ExperimentConfig(window_size=17), 4096, False, 16)
    with pytest.raises(SetupError, match=r"--ablation-window-sizes at most 16"):
        settings_for(ExperimentConfig(ablation_window_sizes=[8, 32]), 4096, False, 16)


def test_an_ablation_leaves_room_for_a_window():
    with pytest.raises(SetupError, match="ablation_n_sinks"):
        settings_for(ExperimentConfig(n_sink=2, window_size=6, ablation_n_sinks=[8]), 512, is_demo=True)


# --- models ----------------------------------------------------------------------------------------------------


def test_a_folder_is_loaded_with_its_tokenizer_and_known_by_its_weights(tmp_path):
    one = find_model(str(make_model_folder(tmp_path / "one")))
    again = find_model(str(make_model_folder(tmp_path / "again")))
    other = find_model(str(make_model_folder(tmp_path / "other", seed=1)))
    assert one.fingerprint == again.fingerprint != other.fingerprint
    loaded = one.load(torch.float64, CPU)
    assert loaded.model.dtype == torch.float64
    assert loaded.model.config._attn_implementation == "sdpa"
    assert not loaded.model.training
    assert loaded.context_length == 64
    assert loaded.tokenizer("ab").input_ids[0] == 0
    assert (one.slug, one.weights) == ("one", "trained")


@pytest.mark.parametrize("case", ["gptj", "gemma2"])
def test_a_family_without_sdpa_is_loaded_with_the_attention_that_it_has(tmp_path, case):
    folder = make_model_folder(tmp_path / case)  # for its tokenizer
    make_family(case).save_pretrained(folder)
    loaded = find_model(str(folder)).load(torch.float32, CPU)
    assert loaded.model.config._attn_implementation == ("sdpa" if takes_sdpa(case) else "eager")
    assert (loaded.vocab_size, loaded.context_length) == (VOCAB, POSITIONS)
    assert wrap_attention(loaded.model, "math") == 2


def test_random_weights_are_a_function_of_the_seed():
    tiny = pythia(32, 2, 2, 64, 128)
    before = torch.random.get_rng_state()
    a, b, c = (random_model(tiny, seed, torch.float32, CPU).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)
    assert torch.equal(before, torch.random.get_rng_state())
    source = find_model("random:pythia-70m", seed=3)
    assert (source.weights, source.slug) == ("random", "random-pythia-70m")
    assert source.fingerprint != find_model("random:pythia-70m", seed=4).fingerprint


def test_random_sizes_are_those_of_the_pythia_models(shared_data):
    known = json.loads((shared_data / "pythia-configs.json").read_text())
    ours = {name: size for name, size in RANDOM_SIZES.items() if name.startswith("pythia")}
    assert {name: {key: ours[name][key] for key in sizes} for name, sizes in known.items()} == known
    assert ours.keys() == known.keys()


PUBLISHED = {  # parameters in millions, by the model cards
    "pythia-2.8b": 2775, "llama-3.2-1b": 1236, "llama-3.1-8b": 8030, "qwen2.5-0.5b": 494, "qwen3-0.6b": 596,
    "qwen3-4b": 4022, "qwen3-8b": 8191, "gemma-3-1b": 1000, "mistral-7b": 7248,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_random_models_have_as_many_parameters_as_the_published_ones(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(random_config(RANDOM_SIZES[name]))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == pytest.approx(PUBLISHED[name], abs=0.6)


@pytest.mark.parametrize(
    ("name", "words"),
    [("random:pythia-3b", ["pythia-2.8b"]), ("no/such model", ["no/such model"]), ("random:", ["pythia-70m"])],
)
def test_a_model_that_is_none_is_refused(name, words):
    with pytest.raises(SetupError) as caught:
        find_model(name)
    assert all(word in str(caught.value) for word in words)


def test_where_the_hub_is_out_of_reach_one_line_says_what_was_tried(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SetupError, match=r"hub.*--model path/to/folder") as caught:
        find_model("someone/some-model")
    assert "someone/some-model" in str(caught.value)
    pytest.importorskip("datasets")
    with pytest.raises(SetupError, match=r"--datasets path/to/text.txt"):
        load_texts(["wikitext"])


def test_a_folder_that_holds_no_model_is_refused(tmp_path):
    with pytest.raises(SetupError, match=r"config\.json"):
        find_model(str(tmp_path))
    folder = make_model_folder(tmp_path / "broken")
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(SetupError, match="could not be loaded"):
        find_model(str(folder)).load(torch.float32, CPU)


def test_a_window_of_the_models_own_is_known(tmp_path):
    folder = make_model_folder(tmp_path / "mistral")  # for its tokenizer
    make_family("mistral").save_pretrained(folder)
    loaded = find_model(str(folder)).load(torch.float32, CPU)
    assert loaded.largest_window == loaded.model.config.sliding_window
    assert find_model("demo").load(torch.float32, CPU).largest_window is None


def test_a_model_with_weights_missing_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = make_model_folder(tmp_path / "part")
    weights = load_file(folder / "model.safetensors")
    weights = {name: weight for name, weight in weights.items() if "embed_out" not in name and "lm_head" not in name}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SetupError, match=r"weights are missing \((embed_out|lm_head)\.weight"):
        find_model(str(folder)).load(torch.float32, CPU)


def test_a_busy_machine_is_warned_of_since_times_on_it_mean_little(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("os.getloadavg", lambda: (2.9, 0.0, 0.0))
    assert "\n" not in InProcess(ExperimentConfig(device="cpu")).description
    monkeypatch.setattr("os.getloadavg", lambda: (3.8, 0.0, 0.0))
    assert "warning: other programs keep 3.8 of 4 cores busy" in InProcess(ExperimentConfig(device="cpu")).description
