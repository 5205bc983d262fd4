"""The parts of the demo model's trainer: corpus, tokenizer, batches, recipe, export, held-out report."""

from __future__ import annotations

import json
import lzma

import numpy as np
import pytest
import torch
from demo_training_support import TINY, make_text
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo_training import byte_bpe, corpus, held_out, recipe as recipe_module  # isort: skip
from demo_training.batches import Batches  # isort: skip
from demo_training.checkpoint import Progress  # isort: skip
from demo_training.loop import SpeedProbe, Trainer  # isort: skip
from demo_training.recipe import Recipe, build_model, export_model  # isort: skip

CPU = torch.device("cpu")
# What a byte-level tokenizer must give back unchanged, and where a careless cut would change the tokens.
ODD_TEXTS = [
    "",
    " ",
    "plain words, and punctuation: it's, they'll -- \"so\" (3.14)!",
    "  two  blanks   three\n\n\nlines \n \n\ttabs\t\tend  ",
    "\r\nold line ends\r\n\x0b\x0c\x1c\x1d\x85\u00a0\u2003\u2028 odd spaces \u3000",
    "naïve café Ελληνικά 漢字かな 🙂🏽 e\u0301 \u200d \ufeff",
    "a" * 500 + " " * 500 + "b\n" * 300,
]


# ---------------------------------------------------------------------------------------------- the corpus


def test_every_kind_of_source_gives_the_same_documents(tmp_path, monkeypatch):
    documents = [make_text(300, seed) for seed in range(3)]
    whole = corpus.DOCUMENT_SEPARATOR.join(documents)
    (tmp_path / "a.txt").write_text(whole)
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(whole.encode()))
    (tmp_path / "folder").mkdir()
    for i, document in enumerate(documents):
        (tmp_path / "folder" / f"{i}.txt").write_text(document)

    class Rows(dict):
        column_names = ("title", "text")

    asked = []

    def load_dataset(*arguments, **keywords):
        asked.append((arguments, keywords))
        return Rows(text=documents)

    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    sources = [tmp_path / "a.txt", tmp_path / "a.txt.xz", tmp_path / "folder", "hf:some/books:config:test", "hf:x"]
    read = [corpus.read_corpus(str(source), min_characters=10) for source in sources]
    assert [list(text.documents) for text in read] == [documents] * len(sources)
    assert len({text.sha256 for text in read}) == 1
    assert asked == [(("some/books", "config"), {"split": "test"}), (("x", None), {"split": "train"})]
    with pytest.raises(ValueError, match="no column 'body'; the columns are title, text"):
        corpus.read_corpus("hf:x::train:body", min_characters=10)


def test_a_hub_that_cannot_be_reached_is_said_in_one_line(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*_, **__):
        raise ConnectionError("no route\nand much more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"'some/books'.*'train'.*no route\); without the hub") as caught:
        corpus.read_corpus("hf:some/books", min_characters=10)
    assert "\n" not in str(caught.value)


def test_short_documents_are_joined_and_nothing_is_lost():
    rows = ["", " = Title = \n", "first line\n", "", "second", "x" * 30, "end"]
    assert corpus.join_short_documents(rows, 20) == [
        " = Title = \nfirst line\n",
        "second\n\n" + "x" * 30 + "\n\nend\n\n",
    ]
    assert corpus.join_short_documents(rows, 1) == [" = Title = \n", "first line\n", "second", "x" * 30, "end"]
    assert corpus.join_short_documents(["a", "b"], 100) == ["a\n\nb\n\n"]


def test_the_tail_is_cut_off_and_not_trained_on():
    text = corpus.make_corpus("t", ["one " * 50, "0123456789" * 20], 0)
    rest, tail = corpus.split_tail(text)
    assert tail == "0123456789" * 2
    assert rest.documents == ("one " * 50, "0123456789" * 18)
    assert rest.sha256 != text.sha256


# ---------------------------------------------------------------------------------------------- the tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    # Runs of blanks and empty lines, so that there are merges of white space that a careless cut would break.
    return byte_bpe.train_tokenizer([make_text(4000) + "\n\n\n    indented" * 200], 400)


def test_the_tokenizer_puts_its_first_token_in_front_by_itself(tokenizer, tmp_path):
    byte_bpe.save_tokenizer(tokenizer, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".json") == []
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
    first, second = (byte_bpe.train_tokenizer(texts, 400) for _ in range(2))
    assert first.to_str() == second.to_str()


@pytest.mark.parametrize("length", [1, 2, 3, 7, 100])
def test_pieces_encode_to_what_the_whole_encodes_to(tokenizer, length):
    for text in [*ODD_TEXTS, " ".join(ODD_TEXTS), make_text(50)]:
        pieces = list(byte_bpe.split_pieces(text, length))
        assert "".join(pieces) == text
        ids = [i for piece in pieces for i in tokenizer.encode(piece, add_special_tokens=False).ids]
        assert ids == tokenizer.encode(text, add_special_tokens=False).ids


def test_documents_are_encoded_in_order_over_many_calls(tokenizer, monkeypatch):
    monkeypatch.setattr(byte_bpe, "PIECES_PER_CALL", 2)
    monkeypatch.setattr(byte_bpe, "split_pieces", lambda text, split=byte_bpe.split_pieces: split(text, 50))
    documents = [make_text(n, seed=n) for n in (3, 200, 1, 40)]
    ids, lengths = byte_bpe.encode_documents(tokenizer, documents, sum(map(len, documents)))
    expected = [tokenizer.encode(document, add_special_tokens=False).ids for document in documents]
    assert ids.dtype == np.uint16
    assert ids.tolist() == [i for one in expected for i in one]
    assert lengths.tolist() == [len(one) for one in expected]


# ---------------------------------------------------------------------------------------------- batches, recipe


def numbered_batches(lengths: list[int], seed: int = 0, batch_size: int = 3) -> Batches:
    """Documents whose tokens are their own position in the text, so that a window shows where it comes from."""
    ids = np.arange(1, sum(lengths) + 1, dtype=np.uint16)
    sizes = np.asarray(lengths, dtype=np.int64)
    return Batches(ids, sizes, context_length=11, batch_size=batch_size, seed=seed, device=CPU)


def test_every_sequence_is_the_first_token_and_a_window_of_one_document():
    lengths = [25, 9, 100, 10, 31]  # the second is too short, the fourth just long enough
    ends = np.cumsum(lengths)
    batches = numbered_batches(lengths)
    assert batches.windows_per_epoch == 1 + 0 + 9 + 1 + 2
    for step in range(50):
        batch = batches.batch(step)
        assert batch.shape == (3, 11)
        assert batch.dtype == torch.int64
        assert (batch[:, 0] == 0).all()
        assert (batch[:, 2:] == batch[:, 1:-1] + 1).all()
        first, last = batch[:, 1].numpy() - 1, batch[:, -1].numpy() - 1
        assert (np.searchsorted(ends, first, side="right") == np.searchsorted(ends, last, side="right")).all()


def test_an_epoch_visits_every_window_once_and_the_next_one_cuts_anew():
    batches = numbered_batches([25, 100, 31], batch_size=1)
    epochs = [[batches.batch(e * 12 + i)[0, 1].item() for i in range(12)] for e in range(3)]
    for starts in epochs:
        covered = [start + i for start in starts for i in range(10)]
        assert len(set(covered)) == 120, "no token twice in an epoch"
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) != sorted(epochs[1])
    assert batches.epochs(12) == 1


def test_a_batch_depends_on_seed_and_step_alone():
    lengths = [25, 100, 31]
    in_order = numbered_batches(lengths)
    sequence = [in_order.batch(step) for step in range(30)]  # 12 windows: many batches span two epochs
    for step in (29, 3, 17, 4, 0):
        assert torch.equal(numbered_batches(lengths).batch(step), sequence[step])
        assert torch.equal(in_order.batch(step), sequence[step])
    assert not torch.equal(numbered_batches(lengths, seed=1).batch(0), sequence[0])


def test_a_text_without_a_single_window_is_refused():
    with pytest.raises(ValueError, match=r"no document has 10 tokens \(the longest has 9\)"):
        numbered_batches([9, 3])


def test_the_learning_rate_warms_up_and_ends_at_zero():
    recipe = Recipe(steps=1000, warmup_steps=100, learning_rate=1.0)
    rates = [recipe.learning_rate_at(step, 1000) for step in range(1001)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == rates[99] == rates[100] == 1.0
    assert rates[550] == pytest.approx(0.5)
    assert rates[1000] == pytest.approx(0)
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert [recipe.learning_rate_at(step, 500) for step in range(100)] == rates[:100]


def test_max_minutes_fixes_the_steps_from_the_speed_measured():
    recipe = Recipe(steps=1000, warmup_steps=100, max_minutes=1.0)
    progress = Progress()
    probe = SpeedProbe(progress, recipe)
    said = []
    for step in range(1, 101):
        progress.step = step
        progress.train_sec = 5 + 0.1 * step  # five seconds of start-up, then ten steps a second
        if probe.is_due():
            probe.read(said.append)
    assert progress.total_steps == pytest.approx(80 + (60 - 5 - 8) * 10, abs=1)
    assert said[0].startswith("--max-minutes 1: ")
    assert said[1].startswith("10.0 steps/s")


# ---------------------------------------------------------------------------------------------- model and report


def test_the_written_weights_are_the_trained_ones_in_half_precision(tmp_path):
    recipe = Recipe(**TINY, warmup_steps=4)
    model = build_model(recipe)
    export_model(recipe, model.state_dict(), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded[name], weight.half().float()), name
    assert (tmp_path / "model.safetensors").stat().st_size < 2.1 * sum(p.numel() for p in model.parameters()) + 8192


def test_the_training_loss_is_the_loss_that_transformers_computes(tmp_path):
    recipe = Recipe(**TINY, warmup_steps=4)
    batches = Batches(
        np.random.default_rng(0).integers(1, 300, 500).astype(np.uint16),
        np.array([500]),
        context_length=TINY["context_length"],
        batch_size=TINY["batch_size"],
        seed=0,
        device=CPU,
    )
    trainer = Trainer(
        recipe,
        batches,
        device=CPU,
        checkpoint_path=tmp_path / "checkpoint.pt",
        checkpoint_every_sec=60,
        identity={},
        compile_model=None,
    )
    ids = batches.batch(0)
    plain = build_model(recipe)  # the same seed: the same weights, with Transformers' own attention
    expected = plain(input_ids=ids, labels=ids).loss
    assert trainer._eager_loss(ids).item() == pytest.approx(expected.item(), rel=1e-6)


def test_weights_of_a_transformers_that_names_the_output_layer_otherwise_are_written_the_same(tmp_path):
    recipe = Recipe(**TINY, warmup_steps=4)

    class Renamed(torch.nn.Module):
        """Stands for a GPT-NeoX whose output layer is called `lm_head`."""

        def __init__(self) -> None:
            super().__init__()
            self.lm_head = torch.nn.Linear(2, 3, bias=False)

    model = Renamed()
    saved = recipe_module.named_weights(model)
    assert list(saved) == ["embed_out.weight"]
    other = Renamed()
    recipe_module.load_named_weights(other, saved)
    assert torch.equal(other.lm_head.weight, model.lm_head.weight)
    assert "embed_out.weight" in recipe_module.named_weights(build_model(recipe))


def test_held_out_perplexities_against_a_plain_forward(tokenizer, tmp_path):
    recipe = Recipe(**{**TINY, "vocab_size": 400}, warmup_steps=4)
    model = build_model(recipe)
    export_model(recipe, model.state_dict(), tmp_path)
    encode = byte_bpe.as_transformers(tokenizer)
    text = held_out.make_held_out_text(
        encode, "t", make_text(400, 9), start_character=10, max_tokens=100, min_tokens=64
    )
    assert text.ids.shape == (1, 100)
    assert text.ids[0, 0] == 0
    assert text.tail_characters == len(encode.decode(text.ids[0, 50:]))
    (result,) = held_out.measure(tmp_path, [text], 16, CPU)

    model = AutoModelForCausalLM.from_pretrained(tmp_path).double().eval()
    with torch.no_grad():
        log_probabilities = model(text.ids).logits.log_softmax(-1)[0, 49:-1]  # predicts tokens 50..99
    nll = -log_probabilities.gather(1, text.ids[0, 50:, None]).mean()
    assert result.dense == pytest.approx(nll.exp().item(), rel=1e-5)
    assert result.first_position == 50
    assert result.window_to_streaming == pytest.approx(result.window / result.streaming)
    assert result.dense_to_streaming == pytest.approx(result.dense / result.streaming)
    bits = np.log2(result.streaming) * 50 / text.tail_characters
    assert result.streaming_bits_per_character == pytest.approx(bits)


def test_the_share_of_attention_on_the_first_token(tokenizer, tmp_path):
    """Where no query prefers any key, the query at position q gives token 0 one part in q + 1."""
    recipe = Recipe(**{**TINY, "vocab_size": 400}, warmup_steps=4)
    model = build_model(recipe)
    for layer in model.gpt_neox.layers:
        torch.nn.init.zeros_(layer.attention.query_key_value.weight)
        torch.nn.init.zeros_(layer.attention.query_key_value.bias)
    export_model(recipe, model.state_dict(), tmp_path)
    text = held_out.make_held_out_text(
        byte_bpe.as_transformers(tokenizer), "t", make_text(400), start_character=0, max_tokens=100, min_tokens=64
    )
    shares = held_out.sink_shares(tmp_path, [text, text], recipe.context_length, CPU)
    expected = np.mean([1 / (q + 1) for q in range(16, 32)])
    assert shares == pytest.approx([expected] * TINY["num_layers"], rel=1e-5)
