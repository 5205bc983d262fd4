"""Configurations, models and texts: what is accepted, what is refused, and with which words."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from evaluation_support import END, TEXT, make_model_folder, make_text, make_tokenizer
from family_models import POSITIONS, VOCAB, make_family, takes_sdpa

from experiments.config import ExperimentConfig, SetupError, settings_for, window_ladder
from experiments.models import RANDOM_SIZES, find_model, random_model
from experiments.texts import Text, load_texts, random_tokens, tokenise
from personal_adapters.neox_flash import wrap_attention

CPU = torch.device("cpu")


def text_of(content: str) -> Text:
    return Text("key", "Key", "key", content, hashlib.sha256(content.encode()).hexdigest())


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
        ({"decode_engine": "warp"}, ["warp", "eager"]),
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
    tiny = type(RANDOM_SIZES["pythia-70m"])(32, 2, 2, 64, 128)
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
    assert {name: vars(size) for name, size in RANDOM_SIZES.items()} == known


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


@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom", "mpt"])
def test_a_model_without_rotary_positions_is_refused_before_its_weights_are_read(tmp_path, family):
    from transformers import AutoConfig

    AutoConfig.for_model(family).save_pretrained(tmp_path / family)
    source = find_model(str(tmp_path / family))
    with pytest.raises(SetupError, match=r"cannot stream: it has (learned|ALiBi)"):
        source.load(torch.float32, CPU)


def test_a_folder_that_holds_no_model_is_refused(tmp_path):
    with pytest.raises(SetupError, match=r"config\.json"):
        find_model(str(tmp_path))
    folder = make_model_folder(tmp_path / "broken")
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(SetupError, match="could not be loaded"):
        find_model(str(folder)).load(torch.float32, CPU)


def test_a_model_with_weights_missing_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = make_model_folder(tmp_path / "part")
    weights = load_file(folder / "model.safetensors")
    weights = {name: weight for name, weight in weights.items() if "embed_out" not in name and "lm_head" not in name}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SetupError, match=r"weights are missing \((embed_out|lm_head)\.weight"):
        find_model(str(folder)).load(torch.float32, CPU)


# --- texts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", "empty"),
        ("blank.txt", b" \n \n", "empty"),
        ("binary.txt", bytes(range(256)), "not UTF-8"),
        ("nul.txt", b"a\x00b", "NUL"),
        ("book.pdf", b"%PDF", "not one of"),
        ("broken.json", b'{"text": "a', "not valid JSON"),
        ("keyless.json", b'{"body": "a"}', "'text'"),
        ("number.jsonl", b'{"text": "a"}\n3\n', "'text'"),
        ("broken.jsonl", b'{"text": "a"}\n{\n', "line 2"),
        ("nothing.json", b"[]", "empty"),
        ("surrogate.json", b'{"text": "\\ud800"}', "surrogates"),
    ],
)
def test_a_file_that_is_no_text_is_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SetupError, match=words):
        load_texts([str(tmp_path / name)])


def test_a_missing_file_and_an_unknown_name_are_refused(tmp_path):
    with pytest.raises(SetupError, match="No such file"):
        load_texts([str(tmp_path / "missing.txt")])
    with pytest.raises(SetupError, match="did you mean 'wikitext'"):
        load_texts(["wikitxt"])


def test_json_and_jsonl_hold_texts_under_their_key(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"text": "one"}, {"text": "two"}]))
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    (tmp_path / "c.json").write_text(json.dumps({"text": "one", "split": "test"}))
    assert [t.text for t in load_texts([str(tmp_path / n) for n in ("a.json", "b.jsonl", "c.json")])] == [
        "one\n\ntwo", "one\n\ntwo", "one",
    ]  # fmt: skip


def test_keys_say_where_a_text_came_from(tmp_path):
    (tmp_path / "x").mkdir()
    names = [make_text(tmp_path / "book.txt", "a b"), make_text(tmp_path / "x" / "book.txt", "c d")]
    names += [make_text(tmp_path / "wikitext.txt", "e f"), make_text(tmp_path / "alone.txt", "g h")]
    texts = load_texts([str(name) for name in names])
    hashes = [hashlib.sha256(text.text.encode()).hexdigest()[:8] for text in texts]
    expected = [f"book-{hashes[0]}", f"book-{hashes[1]}", f"wikitext-{hashes[2]}", "alone"]
    assert [text.key for text in texts] == expected


def test_the_bundled_texts_are_there():
    texts = load_texts(["demo_encyclopaedia", "demo_narrative"])
    assert [text.key for text in texts] == ["demo_encyclopaedia", "demo_narrative"]
    assert all(len(text.text) > 20_000 for text in texts)


def test_tokens_are_the_tokenizers_own_and_come_with_its_first_token():
    ids = tokenise(text_of("abc"), make_tokenizer(), 10)
    assert ids.shape == (1, 4)
    assert ids.dtype == torch.int64
    assert ids[0, 0] == 0
    assert tokenise(text_of("abc"), make_tokenizer(), 2).shape == (1, 2)


def test_a_text_of_fewer_than_two_tokens_is_refused_special_ones_not_counted():
    with pytest.raises(SetupError, match="fewer than two tokens"):
        tokenise(text_of("a"), make_tokenizer(), 10)
    with pytest.raises(SetupError, match="fewer than two tokens"):
        tokenise(text_of(END), make_tokenizer(), 10)
    assert tokenise(text_of(" " * 2000), make_tokenizer(), 10).shape == (1, 10)


def test_the_first_tokens_of_a_long_text_are_those_of_the_whole(monkeypatch):
    tokenizer = make_tokenizer()
    whole = tokenizer(TEXT).input_ids
    monkeypatch.setattr("experiments.texts._WHOLE_TEXT_CHARS", 100)
    monkeypatch.setattr("experiments.texts._CHARS_PER_TOKEN", 0)
    for limit in (2, 50, 101, 1000, len(whole), len(whole) + 5):
        assert tokenise(text_of(TEXT), tokenizer, limit)[0].tolist() == whole[:limit]


def test_random_tokens_are_a_function_of_seed_and_text():
    a, b = text_of("a"), text_of("b")
    first = random_tokens(a, 50, 100, seed=0)
    assert first.shape == (1, 100)
    assert int(first.max()) < 50
    assert torch.equal(first, random_tokens(a, 50, 100, seed=0))
    assert not torch.equal(first, random_tokens(a, 50, 100, seed=1))
    assert not torch.equal(first, random_tokens(b, 50, 100, seed=0))
