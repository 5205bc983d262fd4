"""Texts and their tokens: what is read and how, what is refused and with which words, what stands in front."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import sys
from pathlib import Path

import pytest
import torch
from evaluation_support import END, TEXT, make_model_folder, make_text, make_tokenizer

from experiments import texts as texts_module
from experiments.config import SetupError
from experiments.models import find_model
from experiments.texts import Text, load_as_one, load_texts
from experiments.tokens import beginning_of, first_tokens, random_tokens

RECORDS = [{"text": "one"}, {"text": "two"}]
JSON_LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)


@pytest.fixture
def datasets():
    """The package that reads all but plain text; tests of such texts skip where it is not installed."""
    return pytest.importorskip("datasets")


needs_datasets = pytest.mark.usefixtures("datasets")


def text_of(*documents: str) -> Text:
    sha256 = hashlib.sha256("\x1c".join(documents).encode()).hexdigest()
    return Text("key", "Key", "key", lambda: iter(documents), sha256)


def documents_of(path: Path, **options) -> list[str]:
    return list(load_texts([str(path)], **options)[0].documents())


# --- what is read ------------------------------------------------------------------------------------------------


@needs_datasets
def test_records_hold_texts_under_their_key(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(RECORDS))
    (tmp_path / "b.jsonl").write_text(JSON_LINES.replace("\n", "\n\n", 1))
    (tmp_path / "c.json").write_text(json.dumps({"text": "one", "split": "test"}, indent=2))
    (tmp_path / "d.csv").write_text('text,n\n"one, 1",1\nNA,2\n3,3\n')
    (tmp_path / "e.tsv").write_text("n\ttext\n1\tone\n")
    found = {path.name: documents_of(path) for path in sorted(tmp_path.iterdir())}
    assert found == {
        "a.json": ["one", "two"], "b.jsonl": ["one", "two"], "c.json": ["one"],
        "d.csv": ["one, 1", "NA", "3"], "e.tsv": ["one"],
    }  # fmt: skip


@needs_datasets
def test_records_may_differ_in_all_but_the_text(tmp_path):
    lines = ['{"text": "a", "m": 1}', '{"m": "x", "text": "b"}', '{"text": "c", "m": {"z": [1, "k"]}, "more": null}']
    (tmp_path / "mixed.jsonl").write_text("\n".join(lines))
    assert documents_of(tmp_path / "mixed.jsonl") == ["a", "b", "c"]


def test_parquet_and_another_key(tmp_path, datasets):
    table = datasets.Dataset.from_dict({"content": ["one", "two"], "text": [1, 2]})
    table.to_parquet(tmp_path / "a.parquet")
    assert documents_of(tmp_path / "a.parquet", text_key="content") == ["one", "two"]
    (tmp_path / "b.jsonl").write_text('{"content": "three"}')
    assert documents_of(tmp_path / "b.jsonl", text_key="content") == ["three"]


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress)]
)
def test_compressed_files(tmp_path, suffix, compress):
    (tmp_path / f"book.txt{suffix}").write_bytes(compress(b"\xef\xbb\xbfOne.\r\nTwo.\x1cThree \xc3\xa9."))
    (tmp_path / f"book{suffix}").write_bytes(compress(b"plain"))
    assert documents_of(tmp_path / f"book.txt{suffix}") == ["One.\r\nTwo.", "Three é."]
    assert documents_of(tmp_path / f"book{suffix}") == ["plain"]
    assert load_texts([str(tmp_path / f"book.txt{suffix}")])[0].key == "book"
    pytest.importorskip("datasets")
    (tmp_path / f"book.jsonl{suffix}").write_bytes(compress(JSON_LINES.encode()))
    assert documents_of(tmp_path / f"book.jsonl{suffix}") == ["one", "two"]


@needs_datasets
def test_line_separators_of_unicode_may_stand_in_a_record(tmp_path):
    line, paragraph, next_line = "\u2028", "\u2029", "\x85"
    text = f"a{line}b{paragraph}c{next_line}d"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + '\n{"text": "e"}', "utf-8")
    assert documents_of(tmp_path / "a.jsonl") == [text, "e"]


@needs_datasets
def test_a_folder_is_read_with_all_that_is_below_it_and_what_is_skipped_is_named(tmp_path):
    for name in ("b.txt", "a/deep/c.txt", "a/d.TXT"):
        (tmp_path / "shelf" / name).parent.mkdir(parents=True, exist_ok=True)
        make_text(tmp_path / "shelf" / name, name)
    (tmp_path / "shelf" / "a" / "e.jsonl").write_text(JSON_LINES)
    make_text(tmp_path / "shelf" / "a" / "picture.png", "")
    (text,) = load_texts([str(tmp_path / "shelf")])
    assert list(text.documents()) == ["a/d.TXT", "a/deep/c.txt", "one", "two", "b.txt"]
    assert (text.key, text.num_documents) == ("shelf", 5)
    assert "picture.png" in text.warning
    (tmp_path / "empty").mkdir()
    with pytest.raises(SetupError, match="empty: the folder holds no text"):
        load_texts([str(tmp_path / "empty")])
    make_text(tmp_path / "empty" / "notes.pdf", "")
    with pytest.raises(SetupError, match=r"empty: the folder holds no text: none of its 1 files"):
        load_texts([str(tmp_path / "empty")])


@needs_datasets
def test_several_data_sets_as_one(tmp_path):
    make_text(tmp_path / "a.txt", "one\x1c\x1ctwo\x1c")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}')
    text = load_as_one([str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")])
    assert list(text.documents()) == list(text.documents()) == ["one", "two", "three"]  # as often as it is asked for
    assert (text.dataset, text.num_documents, text.num_characters) == ("a.txt + b.jsonl", 3, 11)
    assert text.sha256 == hashlib.sha256(b"one\x1ctwo\x1cthree").hexdigest()


def test_data_sets_of_the_hub(monkeypatch, datasets):
    asked = []

    def load_dataset(repo, config, split, download_config):
        asked.append((repo, config, split, download_config.local_files_only))
        table = datasets.Dataset.from_dict({"body": ["one", "", "two"]})
        return table if split else datasets.DatasetDict({"train": table, "validation": table})

    monkeypatch.setattr("experiments.hub.ask_hub", lambda repo, kind: ("c0ffee", ""))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    names = ["someone/books", "someone/books:new@train[:10]"]
    one, other = load_texts(names, text_key="body")
    assert asked == [("someone/books", None, None, False), ("someone/books", "new", "train[:10]", False)]
    assert (one.key, one.dataset) == ("someone--books", "someone/books@validation")
    assert other.dataset == "someone/books:new@train[:10]"
    assert list(one.documents()) == ["one", "two"]
    with pytest.raises(SetupError, match=r"record 1: .*'text' is missing \(it has: body\); --text-key"):
        load_texts(names[:1])


@needs_datasets
def test_a_hub_that_does_not_answer_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("someone/books", "wikitext"):
        with pytest.raises(SetupError, match=r"could not be loaded.*HF_HUB_OFFLINE is set.*pass a local file"):
            load_texts([name])


def test_keys_say_where_a_text_came_from(tmp_path):
    (tmp_path / "x").mkdir()
    names = [make_text(tmp_path / "book.txt", "a b"), make_text(tmp_path / "x" / "book.txt", "c d")]
    names += [make_text(tmp_path / "wikitext.txt", "e f"), make_text(tmp_path / "alone.txt", "g h")]
    texts = load_texts([str(name) for name in names])
    hashes = [hashlib.sha256("".join(text.documents()).encode()).hexdigest()[:8] for text in texts]
    expected = [f"book-{hashes[0]}", f"book-{hashes[1]}", f"wikitext-{hashes[2]}", "alone"]
    assert [text.key for text in texts] == expected


def test_the_bundled_texts_are_there():
    texts = load_texts(["demo_encyclopaedia", "demo_narrative"])
    assert [text.key for text in texts] == ["demo_encyclopaedia", "demo_narrative"]
    assert all(text.num_characters > 20_000 for text in texts)
    for text in texts:
        assert text.sha256 == hashlib.sha256((texts_module.ASSETS / f"{text.key}.txt").read_bytes()).hexdigest()


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", "empty"),
        ("blank.txt", b" \n \n", "empty"),
        ("blanks.txt", b" \n\x1c\n ", "empty"),
        ("binary.txt", bytes(range(256)), "not UTF-8"),
        ("late.txt", b"a" * (1 << 20) + b"abc\xe4bc" + b"a" * 99, r"not UTF-8 text \(byte 1048579\)"),
        ("nul.txt", b"a\x00b", "NUL"),
        ("book.pdf", b"%PDF", "not one of"),
        ("broken.json", b'{"text": "a', "JSON parse error"),
        ("keyless.json", b'{"body": "a"}', r"record 1: .*'text' is missing \(it has: body\); --text-key"),
        ("later.jsonl", b'{"text": "a"}\n{"text": "b"}\n{"body": "a"}\n', "record 3: .*'text' is missing"),
        ("number.jsonl", b'{"text": "a"}\n3\n', "line 2 is not a JSON object"),
        ("kind.jsonl", b'{"text": "a"}\n{"text": 3}\n', "record 2: .*'text' is int"),
        ("broken.jsonl", b'{"text": "a"}\n{\n', "line 2 is not valid JSON"),
        ("broken.jsonl.gz", gzip.compress(b'{"text": "a"}\n{\n', mtime=0), "line 2 is not valid JSON"),
        ("none.txt.xz", b"no xz at all", "cannot be read"),
        ("cut.txt.xz", lzma.compress(TEXT.encode())[:-40], "cut.txt.xz: cannot be read: Compressed file ended"),
        ("cut.txt.gz", gzip.compress(TEXT.encode(), mtime=0)[:-20], "cannot be read: Compressed file ended"),
        ("broken.parquet", b"PAR1", "broken.parquet: cannot be read"),
        ("column.csv", b"body\na\n", "record 1: .*'text' is missing"),
        ("nothing.json", b"[]", "empty"),
        ("nothing.jsonl", b"", "empty"),
        ("surrogate.json", b'{"text": "\\ud800"}', "surrogate"),
    ],
)
def test_a_file_that_is_no_text_is_refused(tmp_path, name, content, words, caplog, capfd):
    if ".txt" not in name and ".pdf" not in name:
        pytest.importorskip("datasets")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SetupError, match=words) as caught:
        load_texts([str(tmp_path / name)])
    assert "\n" not in str(caught.value)
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_without_the_package_datasets_plain_text_is_read_and_all_else_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "book.txt.xz").write_bytes(lzma.compress(b"plain"))
    (tmp_path / "a.jsonl").write_text(JSON_LINES)
    assert documents_of(tmp_path / "book.txt.xz") == ["plain"]
    for name in (str(tmp_path / "a.jsonl"), "someone/books", "wikitext"):
        with pytest.raises(SetupError, match=r"package datasets, which is not installed: pip install datasets, or"):
            load_texts([name])


def test_a_missing_file_and_an_unknown_name_are_refused(tmp_path):
    for name in ("missing.txt", "missing.parquet", "no/such/folder", "./nothing"):
        with pytest.raises(SetupError, match="no such file"):
            load_texts([name if name.startswith(".") else str(tmp_path / name)])
    with pytest.raises(SetupError, match="did you mean 'wikitext'"):
        load_texts(["wikitxt"])


# --- tokens ------------------------------------------------------------------------------------------------------


def tokenise(text: Text, tokenizer, limit: int) -> torch.Tensor:
    return first_tokens(text, tokenizer, beginning_of(tokenizer).ids, limit)


def test_tokens_are_the_tokenizers_own_and_come_with_its_first_token():
    ids = tokenise(text_of("abc"), make_tokenizer(), 10)
    assert ids.shape == (1, 4)
    assert ids.dtype == torch.int64
    assert ids[0, 0] == 0
    assert tokenise(text_of("abc"), make_tokenizer(), 2).shape == (1, 2)


def test_documents_are_joined_by_blank_lines():
    tokenizer = make_tokenizer()
    assert tokenise(text_of("ab", "cd"), tokenizer, 100)[0].tolist() == tokenizer("ab\n\ncd").input_ids


def test_a_text_of_fewer_than_two_tokens_is_refused_special_ones_not_counted():
    with pytest.raises(SetupError, match="fewer than two tokens"):
        tokenise(text_of("a"), make_tokenizer(), 10)
    with pytest.raises(SetupError, match="fewer than two tokens"):
        tokenise(text_of(END), make_tokenizer(), 10)
    assert tokenise(text_of(" " * 2000), make_tokenizer(), 10).shape == (1, 10)


def test_the_first_tokens_of_a_long_text_are_those_of_the_whole():
    tokenizer, text = make_tokenizer(), TEXT * 20  # several windows
    whole = tokenizer(text).input_ids
    for limit in (2, 50, 101, 70_000, len(whole), len(whole) + 5):
        assert tokenise(text_of(text), tokenizer, limit)[0].tolist() == whole[:limit]


def test_random_tokens_are_a_function_of_seed_and_text():
    a, b = text_of("a"), text_of("b")
    first = random_tokens(a, 50, 100, seed=0)
    assert first.shape == (1, 100)
    assert int(first.max()) < 50
    assert torch.equal(first, random_tokens(a, 50, 100, seed=0))
    assert not torch.equal(first, random_tokens(a, 50, 100, seed=1))
    assert not torch.equal(first, random_tokens(b, 50, 100, seed=0))


# --- what stands in front ----------------------------------------------------------------------------------------


def bare_tokenizer(bos: str | None = "<s>", eos: str = END, chat_template: str | None = None):
    """A tokenizer that puts nothing in front by itself."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {END: 0, "<s>": 1} | {letter: n for n, letter in enumerate(letters, start=2)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([END, "<s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, chat_template=chat_template
    )


@pytest.mark.parametrize(
    ("tokenizer", "known", "ids", "words", "is_doubtful"),
    [
        (make_tokenizer(), {}, (0,), "the tokenizer puts it there", False),
        (bare_tokenizer(bos=None), {}, (), "no beginning-of-sequence token", False),
        (bare_tokenizer(), {"model_bos_id": 1}, (1,), "does nothing but begin texts", True),
        (bare_tokenizer(), {"model_bos_id": None}, (), "configuration does not name it", True),
        (bare_tokenizer(bos=END), {"model_bos_id": 0}, (), "it also ends texts", True),
        (bare_tokenizer(chat_template="{{ '<s>' + role }}"), {"model_bos_id": 1}, (), "turns of a chat", True),
        (bare_tokenizer(chat_template="{{ bos_token }}"), {"model_bos_id": 1}, (1,), "does nothing but", True),
        (bare_tokenizer(), {"model_bos_id": 1, "stated": False}, (), "add_bos_token: False", True),
        (bare_tokenizer(bos=END), {"stated": True}, (0,), "add_bos_token: True", True),
    ],
)
def test_auto_asks_what_the_model_was_trained_on_and_says_how_it_knows(tokenizer, known, ids, words, is_doubtful):
    beginning = beginning_of(tokenizer, "auto", **known)
    assert beginning.ids == ids
    assert words in beginning.reason
    assert beginning.record() == {
        "option": "auto", "token": tokenizer.bos_token, "in_front": bool(ids), "reason": beginning.reason,
    }  # fmt: skip
    assert bool(beginning.warning) == is_doubtful
    assert not is_doubtful or ("--bos always" in beginning.warning and repr(tokenizer.bos_token) in beginning.warning)


def test_always_and_never_mean_what_they_say():
    assert beginning_of(make_tokenizer(), "never").ids == ()
    assert beginning_of(make_tokenizer(), "always").ids == (0,)
    assert beginning_of(bare_tokenizer(), "always").ids == (1,)
    assert not beginning_of(bare_tokenizer(), "always").warning
    with pytest.raises(SetupError, match="--bos always: the tokenizer has no"):
        beginning_of(bare_tokenizer(bos=None), "always")


@pytest.mark.parametrize(("stated", "expected"), [(True, (1,)), (False, ()), (None, ())])
def test_what_a_folder_states_about_its_tokenizer_is_read(tmp_path, stated, expected):
    folder = make_model_folder(tmp_path / "tiny")  # its configuration names 0
    bare_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings if stated is None else {**settings, "add_bos_token": stated}))
    loaded = find_model(str(folder)).load(torch.float32, torch.device("cpu"))
    assert loaded.beginning("auto").ids == expected
