"""The parts of the demo model's trainer: texts, tokenizer, windows, held-out report."""

from __future__ import annotations

import json
import lzma

import numpy as np
import pytest
import torch
from demo_training_support import TINY, make_text
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM, get_scheduler

from experiments.demo_training import held_out, sequences  # isort: skip
from experiments.demo_training.sequences import Windows, read_documents  # isort: skip
from experiments.demo_training.recipe import Options, Recipe  # isort: skip

# What a byte-level tokenizer must give back unchanged.
ODD_TEXTS = [
    "",
    " ",
    "plain words, and punctuation: it's, they'll -- \"so\" (3.14)!",
    "  two  blanks   three\n\n\nlines \n \n\ttabs\t\tend  ",
    "\r\nold line ends\r\n\x0b\x0c\x1c\x1d\x85\u00a0\u2003\u2028 odd spaces \u3000",
    "naïve café Ελληνικά 漢字かな 🙂🏽 e\u0301 \u200d \ufeff",
    "a" * 500 + " " * 500 + "b\n" * 300,
]


# ---------------------------------------------------------------------------------------------- texts


def test_every_kind_of_source_gives_the_same_documents(tmp_path, monkeypatch):
    documents = [make_text(300, seed) for seed in range(3)]
    together = sequences.DOCUMENT_SEPARATOR.join(documents)
    (tmp_path / "a.txt").write_text(together)
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(together.encode()))
    (tmp_path / "folder").mkdir()
    for i, document in enumerate(documents):
        (tmp_path / "folder" / f"{i}.txt").write_text(document)
    asked = []

    def load_dataset(*arguments, **keywords):
        asked.append((arguments, keywords))
        return {"text": documents}

    monkeypatch.setattr(sequences.datasets, "load_dataset", load_dataset)
    sources = [tmp_path / "a.txt", tmp_path / "a.txt.xz", tmp_path / "folder", "hf:some/books:config:test", "hf:x"]
    assert [read_documents(str(source), 10) for source in sources] == [documents] * len(sources)
    assert asked == [(("some/books", "config"), {"split": "test"}), (("x", None), {"split": "train"})]
    with pytest.raises(ValueError, match=r"--data hf:x::train:body: could not be loaded.*body"):
        read_documents("hf:x::train:body", 10)


def test_a_hub_that_cannot_be_reached_is_said_in_one_line(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route\nand much more")

    monkeypatch.setattr(sequences.datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"--data hf:some/books: could not be loaded .*no route\)$"):
        read_documents("hf:some/books", 10)


def test_short_documents_are_joined_and_nothing_is_lost(tmp_path):
    rows = ["", " = Title = ", "first line", "", "second", "x" * 30, "end"]
    path = tmp_path / "rows.txt"
    path.write_text(sequences.DOCUMENT_SEPARATOR.join(rows))
    assert read_documents(str(path), 20) == [" = Title = \n\nfirst line", "second\n\n" + "x" * 30, "end"]
    assert read_documents(str(path), 1) == [" = Title = ", "first line", "second", "x" * 30, "end"]
    assert len(read_documents(str(path), 1000)) == 1


# ---------------------------------------------------------------------------------------------- the tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return sequences.train_tokenizer([make_text(4000) + "\n\n\n    indented" * 200], 400)


def test_the_tokenizer_puts_its_first_token_in_front_by_itself(tokenizer, tmp_path):
    sequences.save_tokenizer(tokenizer, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in ODD_TEXTS:
        ids = loaded(text).input_ids
        assert ids[0] == 0
        assert 0 not in ids[1:]
        assert loaded.decode(ids[1:]) == text
        assert loaded(text, add_special_tokens=False).input_ids == ids[1:]
    assert loaded.bos_token_id == loaded.eos_token_id == 0
    assert loaded.convert_ids_to_tokens(0) == "<|endoftext|>"
    assert set(loaded("two", "texts")) == {"input_ids", "attention_mask"}
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_training_the_tokenizer_twice_gives_the_same():
    texts = [make_text(4000), make_text(2000, seed=1)]
    first, second = (sequences.train_tokenizer(texts, 400).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_documents_are_encoded_in_order_over_many_calls(tokenizer, monkeypatch):
    monkeypatch.setattr(sequences, "ENCODED_AT_ONCE", 3)
    documents = [make_text(n, seed=n) for n in (3, 200, 1, 40)]
    encoded = sequences.encode(tokenizer, documents)
    assert [ids.tolist() for ids in encoded] == [tokenizer(d, add_special_tokens=False).input_ids for d in documents]
    assert {ids.dtype for ids in encoded} == {np.dtype(np.uint16)}


# ---------------------------------------------------------------------------------------------- windows, recipe


def numbered(lengths: list[int], seed: int = 0, count: int = 300) -> Windows:
    """Documents whose tokens are their own position in the text, so that a window shows where it comes from."""
    documents = np.split(np.arange(1, sum(lengths) + 1, dtype=np.uint16), np.cumsum(lengths)[:-1])
    return Windows(documents, context_length=11, count=count, seed=seed)


def ids_of(windows: Windows, *indices: int) -> torch.Tensor:
    return windows.__getitems__(list(indices))["input_ids"]


def test_every_sequence_is_the_first_token_and_a_window_of_one_document():
    lengths = [25, 9, 100, 10, 31]  # the second is too short, the fourth just long enough
    ends = np.cumsum(lengths)
    windows = numbered(lengths)
    assert len(windows) == 300
    assert windows.per_epoch == 1 + 0 + 9 + 1 + 2
    batch = windows.__getitems__(list(range(150)))
    ids = batch["input_ids"]
    assert ids.shape == (150, 11)
    assert ids.dtype == torch.int64
    assert (ids[:, 0] == 0).all()
    assert (ids[:, 2:] == ids[:, 1:-1] + 1).all()
    assert (batch["labels"][:, 0] == -100).all()
    assert torch.equal(batch["labels"][:, 1:], ids[:, 1:])
    first, last = ids[:, 1].numpy() - 1, ids[:, -1].numpy() - 1
    assert (np.searchsorted(ends, first, side="right") == np.searchsorted(ends, last, side="right")).all()


def test_an_epoch_visits_every_window_once_and_the_next_one_cuts_anew():
    windows = numbered([25, 100, 31])
    epochs = [ids_of(windows, *range(e * 12, e * 12 + 12))[:, 1].tolist() for e in range(3)]
    for starts in epochs:
        covered = [start + i for start in starts for i in range(10)]
        assert len(set(covered)) == 120, "no token twice in an epoch"
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) != sorted(epochs[1])


def test_a_sequence_depends_on_seed_and_number_alone():
    in_order = ids_of(numbered([25, 100, 31]), *range(90))  # 12 windows an epoch
    for i in (89, 9, 51, 12, 0):
        assert torch.equal(ids_of(numbered([25, 100, 31]), i)[0], in_order[i])
    assert not torch.equal(ids_of(numbered([25, 100, 31], seed=1), *range(12)), in_order[:12])


def test_a_text_without_a_single_window_is_refused():
    with pytest.raises(ValueError, match=r"no document has 10 tokens \(the longest has 9\)"):
        numbered([9, 3])


def test_the_learning_rate_warms_up_and_ends_at_zero(tmp_path):
    arguments = Recipe(steps=1000, warmup_steps=100, learning_rate=1.0).training(Options("x", tmp_path, device="cpu"))
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=arguments.learning_rate)
    schedule = get_scheduler(arguments.lr_scheduler_type, optimizer, arguments.warmup_steps, arguments.max_steps)
    rates = []
    for _ in range(1001):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert max(rates) == rates[100] == 1.0
    assert rates[50] == pytest.approx(0.5)
    assert rates[550] == pytest.approx(0.5)
    assert rates[1000] == pytest.approx(0)
    assert rates[100:] == sorted(rates[100:], reverse=True)


# ---------------------------------------------------------------------------------------------- the report


@pytest.fixture
def model(tmp_path) -> GPTNeoXForCausalLM:
    """A random model, written into the test's folder by its `save`."""
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig.from_dict(Recipe(**{**TINY, "vocab_size": 400}).config()))


def test_held_out_perplexities_against_a_plain_forward(tokenizer, model, tmp_path):
    model.save_pretrained(tmp_path)
    ids = held_out.make_stream(tokenizer, "t", make_text(400, 9), max_tokens=100, min_tokens=64)
    assert ids.shape == (1, 100)
    assert ids[0, 0] == 0
    (result,) = held_out.measure(tmp_path, tokenizer, {"t": ids}, 16, "cpu")

    model = AutoModelForCausalLM.from_pretrained(tmp_path).double().eval()
    with torch.no_grad():
        log_probabilities = model(ids).logits.log_softmax(-1)[0, 49:-1]  # predicts tokens 50..99
    nll = -log_probabilities.gather(1, ids[0, 50:, None]).mean()
    assert result["dense"] == pytest.approx(nll.exp().item(), rel=1e-5)
    assert result["first_position"] == 50
    assert result["window_to_streaming"] == pytest.approx(result["window"] / result["streaming"])
    assert result["dense_to_streaming"] == pytest.approx(result["dense"] / result["streaming"])
    bits = np.log2(result["streaming"]) * 50 / len(tokenizer.decode(ids[0, 50:]))
    assert result["streaming_bits_per_character"] == pytest.approx(bits)


def test_the_share_of_attention_on_the_first_token(tokenizer, model, tmp_path):
    """Where no query prefers any key, the query at position q gives token 0 one part in q + 1."""
    for layer in model.gpt_neox.layers:
        torch.nn.init.zeros_(layer.attention.query_key_value.weight)
        torch.nn.init.zeros_(layer.attention.query_key_value.bias)
    model.save_pretrained(tmp_path)
    ids = held_out.make_stream(tokenizer, "t", make_text(400), max_tokens=100, min_tokens=64)
    shares = held_out.sink_shares(tmp_path, [ids, ids], TINY["context_length"], "cpu")
    expected = np.mean([1 / (q + 1) for q in range(16, 32)])
    assert shares == pytest.approx([expected] * TINY["num_layers"], rel=1e-5)
