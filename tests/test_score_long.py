"""scripts/score_long.py: tokens of long texts, figures against score_stream in one go, resuming, errors."""

from __future__ import annotations

import itertools
import json
import lzma
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GPU, make_ids, make_neox
from demo_training_support import ROOT  # puts scripts/ on the module path
from evaluation_support import END, TEXT, error_line, make_model_folder, make_text, make_tokenizer
from family_models import SLIDING, make_config
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralForCausalLM, PreTrainedTokenizerFast

from experiments.config import SetupError
from experiments.long_scoring import CHECKPOINT, LongScoring, StoppedError, read_ahead
from experiments.loss_figures import equal_edges, log_edges, tail_length
from experiments.texts import Text, load_as_one
from experiments.tokens import DocumentStream, token_ids
from personal_adapters.neox_flash import wrap_attention
from streaming_llm import StreamingLLMWrapper, blockwise, score_stream

import score_long  # isort: skip

pytestmark = pytest.mark.usefixtures("no_collection")
SIZES = ["--n-sink", "2", "--window-size", "14", "--block-size", "64", "--device", "cpu", "--no-progress"]
BOOK = (ROOT / "experiments" / "assets" / "texts" / "demo_narrative.txt").read_text(encoding="utf-8")


# --------------------------------------------------------------------------------------------------------- tokens


@pytest.fixture(scope="module")
def demo_tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "experiments" / "assets" / "demo_model")


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama's: a space in front of the text, words not split off before merging, unknown characters as bytes."""
    from tokenizers import Tokenizer, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bytes_ = [f"<0x{n:02X}>" for n in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>", "<s>", *bytes_], max_token_length=12)
    tokenizer.train_from_iterator([BOOK[i : i + 200] for i in range(0, 8000, 200)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


AWKWARD = {
    "prose": BOOK[:12_000],
    "spaces": BOOK[:900] + " " * 3000 + BOOK[900:2500],
    "one letter": BOOK[:700] + "a" * 2500 + BOOK[700:2500],
    "dashes and lines": ("-" * 77 + "\n\n\n") * 40 + BOOK[:1500],
    "other scripts": "Ärger über naïve Ångström; 統計は面白い。🙂 e\u0301 " * 120,
    "special token": (BOOK[:333] + END) * 12,
    "short": "two words",
}


@pytest.mark.parametrize("kind", ["demo", "metaspace", "pythia"])
@pytest.mark.parametrize("text", AWKWARD.values(), ids=AWKWARD)
def test_ids_in_parts_are_those_of_the_whole_document(kind, text, demo_tokenizer, request):
    if kind == "demo":
        tokenizer = demo_tokenizer
    elif kind == "metaspace":
        tokenizer = metaspace_tokenizer()
    else:
        data = request.getfixturevalue("shared_data")
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(data / "pythia-tokenizer" / "tokenizer.json"))
    generator = random.Random(0)
    cuts = [0, *sorted(generator.sample(range(1, len(text)), min(5, len(text) - 1))), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(cuts)]
    parts = list(token_ids(tokenizer, pieces, window=700, overlap=250))
    whole = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    assert [token for ids, _ in parts for token in ids] == whole
    assert parts[-1][1] == len(text)
    if text is AWKWARD["prose"]:
        assert len(parts) > 10  # it was really done in parts


def text_of(*documents: str) -> Text:
    return Text("texts", "Texts", "texts", lambda: iter(documents), num_characters=sum(map(len, documents)))


def test_documents_are_joined_as_they_come(demo_tokenizer):
    first, second = BOOK[:500], BOOK[500:900]
    ids = [demo_tokenizer(text, add_special_tokens=False).input_ids for text in (first, second)]

    def stream(start: int = 0, limit: int | None = None, between: tuple[int, ...] = ()) -> list[int]:
        chunks = DocumentStream(text_of(first, "", second), demo_tokenizer, [0], limit, between).chunks(start)
        return [token for chunk in chunks for token in chunk[0].tolist()]

    assert stream() == [0, *ids[0], *ids[1]]
    assert stream(between=(0,)) == [0, *ids[0], 0, *ids[1]]
    assert stream(start=len(ids[0]) + 3, limit=len(ids[0]) + 9) == ids[1][2:8]


def test_an_endless_text_is_read_as_far_as_needed(demo_tokenizer):
    endless = Text("endless", "", "endless", lambda: itertools.repeat(BOOK[:5000]), num_characters=10**9)
    stream = DocumentStream(endless, demo_tokenizer, [0], 60_000)
    assert sum(chunk.shape[1] for chunk in stream.chunks()) == 60_000
    assert stream.expected_tokens() == 60_000
    parts = token_ids(demo_tokenizer, itertools.repeat(BOOK[:5000]))  # one document without end
    assert sum(len(ids) for ids, _ in itertools.islice(parts, 40)) > 10_000


def test_expected_length(demo_tokenizer):
    stream = DocumentStream(text_of(*([BOOK] * 9)), demo_tokenizer, [0], None)
    length = sum(chunk.shape[1] for chunk in stream.chunks())
    chunks = stream.chunks()
    next(chunks)
    assert stream.expected_tokens() == pytest.approx(length, rel=0.2)
    list(chunks)
    assert stream.expected_tokens() == pytest.approx(length, rel=0.01)


def test_reading_ahead_changes_nothing_and_ends():
    chunks = make_ids(100).split(7, dim=1)
    assert torch.equal(torch.cat(list(read_ahead(iter(chunks), 4)), dim=1), torch.cat(chunks, dim=1))

    def broken():
        yield chunks[0]
        raise SetupError("the file has gone")

    reader = read_ahead(broken(), 4)
    assert torch.equal(next(reader), chunks[0])
    with pytest.raises(SetupError, match="gone"):
        next(reader)
    reader = read_ahead(iter(chunks), 4)
    next(reader)
    reader.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read_ahead")]


def test_texts_of_every_kind_hold_the_same(tmp_path):
    texts = [BOOK[:3000], "Second é.\r\n", TEXT[:2000]]
    joined = "\x1c".join(texts)
    make_text(tmp_path / "book.txt", joined + "\x1c")
    (tmp_path / "book.txt.xz").write_bytes(lzma.compress(b"\xef\xbb\xbf" + joined.encode()))
    records = [json.dumps({"text": text}) for text in texts]
    make_text(tmp_path / "book.jsonl", "\n\n".join(records) + "\n")
    make_text(tmp_path / "book.json", f"[{','.join(records)}]")
    (tmp_path / "folder").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "folder" / f"{number}.txt").write_bytes(text.encode())
    names = ["book.txt", "book.txt.xz", "book.jsonl", "book.json", "folder"]
    found = [load_as_one([str(tmp_path / name)]) for name in names]
    found.append(load_as_one([str(tmp_path / "folder" / f"{n}.txt") for n in range(3)]))
    assert {(text.sha256, text.num_documents, text.num_characters) for text in found} == {
        (found[0].sha256, 3, sum(map(len, texts)))
    }
    assert all(list(text.documents()) == texts for text in found)


# ---------------------------------------------------------------------------------------------------- exact state


class StopsAfterEachBlock:
    """A request to stop that is there whenever a block has been scored."""

    def __init__(self, active: bool):
        self.asked, self.active = 0, active

    @property
    def signal_number(self) -> int | None:
        self.asked += 1
        return signal.SIGINT if self.active and self.asked > 1 else None


def score_in_sessions(stream, work: Path, ids: torch.Tensor, block_size: int, stops: bool) -> tuple[np.ndarray, int]:
    """The losses of a stream, and the number of sessions that it took."""
    work.mkdir()
    sessions = 0
    while True:
        sessions += 1
        run = LongScoring(work, {}, stream, block_size, 1e9, StopsAfterEachBlock(stops), print)
        try:
            losses = run.run("stream", lambda start: iter([ids[:, start:]]), lambda *_: None)
            return np.array(losses), sessions
        except StoppedError:
            continue


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n_sink", "window_size"), [(4, 20), (0, 16), (2, 1)])
@pytest.mark.parametrize(("length", "block_size"), [(120, 10), (30, 1), (133, 33), (152, 100)])
def test_a_stream_goes_on_to_the_bit_from_any_checkpoint(dtype, n_sink, window_size, length, block_size, tmp_path):
    model, ids = make_neox(dtype), make_ids(length)
    with StreamingLLMWrapper(model, n_sink, window_size) as stream:
        expected, _ = score_in_sessions(stream, tmp_path / "whole", ids, block_size, stops=False)
        found, sessions = score_in_sessions(stream, tmp_path / "stopped", ids, block_size, stops=True)
    assert sessions == -(-length // block_size)
    assert np.array_equal(found, expected)
    whole = score_stream(model.double(), ids, n_sink, window_size)[0].numpy()
    np.testing.assert_allclose(found, whole, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.3)


# ------------------------------------------------------------------------------------------------ the command line


@pytest.fixture
def world(tmp_path):
    make_model_folder(tmp_path / "tiny")
    make_text(tmp_path / "text.txt", TEXT[:6000] + "\x1c" + TEXT[3000:])
    return tmp_path


def arguments(world: Path, output: str, *more: str) -> list[str]:
    given = ["--model", world / "tiny", "--datasets", world / "text.txt", "--output", world / output]
    return [str(item) for item in (*given, *SIZES, *more)]


def stream_ids(world: Path, limit: int | None = None) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(world / "tiny")
    documents = (world / "text.txt").read_text(encoding="utf-8").split("\x1c")
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in documents]
    return torch.tensor([[0, *ids[0], *ids[1]][:limit]])


def scored_in_one_go(world: Path, ids: torch.Tensor) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(world / "tiny")
    wrap_attention(model, "math")
    return score_stream(model, ids, 2, 14, block_size=64)[0].numpy()


def result(world: Path) -> dict:
    return json.loads((world / "out.json").read_text())


def losses(path: Path) -> np.ndarray:
    return np.load(path)["nll"]


def test_sizes_that_are_not_given_suit_the_model(world, capsys):
    subject = ["--model", world / "tiny", "--datasets", world / "text.txt", "--output", world / "out.json"]
    command = [str(item) for item in (*subject, "--max-tokens", "100", "--device", "cpu", "--no-progress")]
    assert score_long.main(command) == 0
    value = result(world)
    assert value["block_size"] % value["streaming_llm"]["window_size"] == 0
    MistralForCausalLM(make_config("mistral", vocab_size=300)).save_pretrained(world / "tiny")
    assert score_long.main([*command, "--force"]) == 0
    assert result(world)["streaming_llm"]["max_cache_size"] == SLIDING, "a sliding window of the model's own"
    assert f"--window-size at most {SLIDING}" in refused([*command, "--window-size", "900", "--force"], capsys)


@pytest.mark.parametrize(
    ("option", "where", "ids"),
    [("auto", "nowhere", []), ("never", "nowhere", []), ("always", "at the start of the stream", [0])],
)
def test_what_the_stream_begins_with_is_told_truly(world, option, where, ids, capsys):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None  # has a token for the beginning, and does not use it
    tokenizer.save_pretrained(world / "tiny")
    assert score_long.main(arguments(world, "out.json", "--save-token-nll", "--bos", option)) == 0
    value = result(world)
    assert value["beginning_of_sequence"] == where
    assert (value["bos"]["token"], value["bos"]["in_front"], value["bos"]["option"]) == (END, bool(ids), option)
    assert ("--bos always" in capsys.readouterr().err) == (option == "auto")
    expected = scored_in_one_go(world, torch.tensor([ids + stream_ids(world)[0, 1:].tolist()]))
    np.testing.assert_allclose(losses(world / "out.streaming.nll.npz"), expected, atol=1e-6)


def test_the_result_is_that_of_score_stream_in_one_go(world, capsys):
    assert score_long.main(arguments(world, "out.json", "--save-token-nll", "--fresh-tail", "0.25")) == 0
    value, ids = result(world), stream_ids(world)
    nll = scored_in_one_go(world, ids)
    saved = np.load(world / "out.streaming.nll.npz")
    assert np.array_equal(saved["nll"], nll)
    assert np.array_equal(saved["position"], np.arange(1, ids.shape[1]))
    assert value["num_tokens"] == ids.shape[1]
    assert value["documents"] == 2
    assert value["mean_nll"] == pytest.approx(nll.mean(dtype=np.float64), rel=1e-12)
    assert value["perplexity"] == pytest.approx(math.exp(nll.mean(dtype=np.float64)), rel=1e-12)
    for rows in (value["tenths"], value["curve"]["log"], value["curve"]["equal"]):
        assert rows[0]["start"] == 1
        assert rows[-1]["stop"] == ids.shape[1]
        assert rows[-1]["running_perplexity"] == pytest.approx(value["perplexity"], rel=1e-9)
        assert all(a["stop"] == b["start"] for a, b in itertools.pairwise(rows))
        for row in rows:
            part = nll[row["start"] - 1 : row["stop"] - 1].astype(np.float64)
            assert (row["tokens"], row["mean_nll"]) == (len(part), pytest.approx(part.mean(), rel=1e-12))

    tail = value["fresh_tail"]
    n_tail = round(0.25 * ids.shape[1])
    fresh = scored_in_one_go(world, torch.cat((torch.zeros(1, 1, dtype=torch.int64), ids[:, -n_tail:]), dim=1))
    assert (tail["start"], tail["all"]["tokens"]) == (ids.shape[1] - n_tail, n_tail)
    assert tail["all"]["fresh"]["mean_nll"] == pytest.approx(fresh.mean(dtype=np.float64), rel=1e-12)
    assert tail["settled"]["tokens"] == n_tail - 16
    assert tail["settled"]["in_stream"]["mean_nll"] == pytest.approx(
        nll[-n_tail + 16 :].mean(dtype=np.float64), rel=1e-12
    )

    assert not list(world.glob("*.resume"))
    assert value["toks_per_sec"] == value["num_tokens"] / value["scoring_sec"]
    capsys.readouterr()
    assert score_long.main(arguments(world, "out.json", "--fresh-tail", "0.25")) == 0
    assert "there already" in capsys.readouterr().out
    (world / "out.streaming.nll.npz").unlink()
    assert score_long.main(arguments(world, "out.json", "--save-token-nll", "--fresh-tail", "0.25")) == 0
    assert np.array_equal(losses(world / "out.streaming.nll.npz"), nll)


def comparable(path: Path) -> dict:
    value = json.loads(path.read_text())
    times = ("scoring_sec", "waiting_for_text_sec", "toks_per_sec", "checkpoint_sec", "peak_memory_mb")
    for key in (*times, "sessions", "environment", "timestamp"):
        del value[key]
    return value


def test_killed_again_and_again_it_gives_the_same(world):
    given = ["--save-token-nll", "--fresh-tail", "0.3", "--checkpoint-every", "0", "--max-tokens", "8000"]
    words = arguments(world, "out.json", *given)
    command = [sys.executable, str(ROOT / "scripts" / "score_long.py"), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    checkpoint, seen, generator = world / "out.json.resume" / CHECKPOINT, [], random.Random(1)
    for _ in range(2):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        while process.poll() is None and (not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before):
            time.sleep(0.002)
        time.sleep(generator.random() * 0.03)
        process.kill()
        process.wait()
        assert not (world / "out.json").exists(), "it was too fast to be killed"
        passes = json.loads(checkpoint.read_text())["passes"]
        seen.append(sum(state["tokens"] for state in passes.values()))
    assert seen == sorted(set(seen)), "each session went on where the one before had come"
    assert score_long.main(words) == 0
    assert result(world)["sessions"] == 3

    assert score_long.main(arguments(world, "whole.json", *given)) == 0
    assert comparable(world / "out.json") == comparable(world / "whole.json")
    assert np.array_equal(losses(world / "out.streaming.nll.npz"), losses(world / "whole.streaming.nll.npz"))


def interrupt_at(monkeypatch, token: int, act) -> None:
    real, fed = blockwise.BlockScorer.score, [0]

    def score(self, block):
        if fed[0] >= token:
            act()
        fed[0] += block.shape[1]
        return real(self, block)

    monkeypatch.setattr(blockwise.BlockScorer, "score", score)


def test_ctrl_c_leaves_a_checkpoint(world, monkeypatch, capsys, ctrl_c):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 640, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert score_long.main(arguments(world, "out.json")) == 130
    message = capsys.readouterr().err
    assert message == "error: interrupted at token 704; the same command goes on from there\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert score_long.main(arguments(world, "out.json", "--save-token-nll")) == 0
    assert "goes on at token 704" in capsys.readouterr().out
    assert np.array_equal(losses(world / "out.streaming.nll.npz"), scored_in_one_go(world, stream_ids(world)))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["math", "flash"])
def test_on_a_gpu_and_resumed_there(world, monkeypatch, backend, ctrl_c):
    given = ["--device", GPU, "--dtype", "bfloat16", "--attn-backend", backend, "--save-token-nll"]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 640, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert score_long.main(arguments(world, "out.json", *given)) == 130
    assert score_long.main(arguments(world, "out.json", *given)) == 0
    assert score_long.main(arguments(world, "whole.json", *given)) == 0
    resumed, whole = (losses(world / f"{stem}.streaming.nll.npz") for stem in ("out", "whole"))
    np.testing.assert_allclose(resumed, whole, atol=1e-3)
    assert abs(whole.mean() - scored_in_one_go(world, stream_ids(world)).mean()) < 0.02


@pytest.fixture
def interrupted(world, monkeypatch, capsys, ctrl_c):
    """A world with the checkpoint of a run that was interrupted."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, 640, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert score_long.main(arguments(world, "out.json")) == 130
    capsys.readouterr()
    return world


def refused(command: list[str], capsys) -> str:
    return error_line(lambda: score_long.main(command), capsys)


def test_a_checkpoint_of_another_run_is_refused(interrupted, capsys):
    options = ["--n-sink", "3"], ["--block-size", "32"], ["--max-tokens", "3000"], ["--dtype", "float64"]
    for option in (*options, ["--attn-backend", "flash"], ["--bos-per-document"]):
        key = option[0].removeprefix("--attn-").removeprefix("--").replace("-", "_")
        assert f"{key}: " in refused(arguments(interrupted, "out.json", *option), capsys)
    make_text(interrupted / "text.txt", TEXT[:-1])
    assert "data_sha256: " in refused(arguments(interrupted, "out.json"), capsys)
    make_model_folder(interrupted / "tiny", seed=3)
    assert "model: " in refused(arguments(interrupted, "out.json"), capsys)
    assert score_long.main(arguments(interrupted, "out.json", "--force")) == 0
    assert result(interrupted)["sessions"] == 1


def test_a_broken_checkpoint_is_named(interrupted, capsys):
    work = interrupted / "out.json.resume"
    whole = (work / "stream.f32").read_bytes()
    (work / "stream.f32").write_bytes(whole[:100])
    assert "stream.f32" in refused(arguments(interrupted, "out.json"), capsys)
    (work / "stream.f32").write_bytes(whole + b"written after the checkpoint")
    checkpoint = (work / CHECKPOINT).read_text()
    (work / CHECKPOINT).write_text(checkpoint[:500])
    assert "checkpoint.json: not a readable checkpoint" in refused(arguments(interrupted, "out.json"), capsys)
    (work / CHECKPOINT).write_text('{"format": 1, "passes": {}}')
    assert "of another version; --force starts anew" in refused(arguments(interrupted, "out.json"), capsys)
    (work / CHECKPOINT).write_text(checkpoint)
    (cache,) = work.glob("cache-*.safetensors")
    cache.write_bytes(cache.read_bytes()[:300])
    assert "--force starts anew" in refused(arguments(interrupted, "out.json"), capsys)


def test_two_runs_of_one_output(interrupted, capsys):
    from experiments.storage import folder_lock

    with folder_lock(interrupted / "out.json.resume" / "lock"):
        assert f"process {os.getpid()}" in refused(arguments(interrupted, "out.json"), capsys)
    assert score_long.main(arguments(interrupted, "out.json")) == 0


def test_failures_while_running(world, monkeypatch, capsys):
    def out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        interrupt_at(patch, 640, out_of_memory)
        assert score_long.main(arguments(world, "out.json", "--checkpoint-every", "0")) == 1
    assert capsys.readouterr().err.startswith("error: CUDA out of memory; the same command goes on")
    real = blockwise.token_nll
    with monkeypatch.context() as patch:
        patch.setattr(blockwise, "token_nll", lambda *args: real(*args) * (math.nan if scorer_at(args) else 1))
        assert score_long.main(arguments(world, "nan.json")) == 1
    assert "the loss of token 64 is not finite" in capsys.readouterr().err
    assert not (world / "nan.json").exists()


def scorer_at(args) -> bool:
    """Whether a call of token_nll is for a block after the first, which has 63 losses."""
    return args[2].shape[1] == 64


def test_an_earlier_result_is_set_aside(world):
    assert score_long.main(arguments(world, "out.json", "--max-tokens", "200", "--save-token-nll")) == 0
    assert score_long.main(arguments(world, "out.json", "--max-tokens", "300")) == 0
    assert result(world)["num_tokens"] == 300
    [aside] = (world / "superseded").glob("out.*.json")
    assert json.loads(aside.read_text())["num_tokens"] == 200
    assert not (world / "out.streaming.nll.npz").exists(), "the losses of another result"
    assert len(list((world / "superseded").glob("out.streaming.nll*"))) == 1


def test_random_weights_have_no_text(tmp_path, capsys):
    given = ["--model", "random:pythia-70m", "--output", str(tmp_path / "out.json"), *SIZES]
    assert "random weights have no text" in refused([*given, "--max-tokens", "9"], capsys)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--n-sink", "-1"], "n_sink"),
        (["--window-size", "0"], "window_size"),
        (["--max-tokens", "1"], "--max-tokens"),
        (["--block-size", "0"], "--block-size"),
        (["--fresh-tail", "1"], "--fresh-tail"),
        (["--checkpoint-every", "-1"], "--checkpoint-every"),
        (["--dtype", "float12"], "float12"),
        (["--device", "abacus"], "abacus"),
        (["--attn-backend", "flush"], "flush"),
        (["--model", "no-such-folder/no-model"], "no-such-folder"),
        (["--datasets", "demo_narative"], "did you mean 'demo_narrative'"),
        (["--datasets", "missing.txt"], "missing.txt: no such file"),
        (["--datasets", "random_tokens"], "random weights"),
        (["--bos-per-document", "--bos", "never"], "--bos never"),
        (["--datasets", "{}/empty.txt"], "empty"),
        (["--datasets", "{}/one.txt"], "fewer than two tokens"),
        (["--output", "result.txt"], ".json"),
        (["--output", "/dev/null/result.json"], "cannot be written"),
    ],
)
def test_bad_input_gets_one_line(world, more, message, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    make_text(world / "empty.txt", "")
    make_text(world / "one.txt", "a")
    assert message in refused(arguments(world, "out.json", *(item.format(world) for item in more)), capsys)
    assert not (world / "out.json").exists()


def test_edges():
    assert log_edges(20) == [1, 2, 3, 4, 6, 8, 11, 16, 20]
    assert equal_edges(2, 10) == [1, 2]
    assert equal_edges(102, 10) == [1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 102]
    for num_tokens in (2, 3, 17, 1000, 4097):
        for edges in (log_edges(num_tokens), equal_edges(num_tokens, 50)):
            assert edges == sorted(set(edges))
            assert (edges[0], edges[-1]) == (1, num_tokens)
    assert (tail_length(2, 0.01), tail_length(2, 0.99), tail_length(1000, 0.1)) == (1, 1, 100)


def test_a_tokenizer_without_offsets_is_given_the_text_whole(demo_tokenizer):
    class Slow:
        is_fast = False

        def __call__(self, text, **options):
            return demo_tokenizer(text, **options)

    parts = list(token_ids(Slow(), [BOOK[:300], BOOK[300:9000]], window=700))
    assert parts == [(demo_tokenizer(BOOK[:9000], add_special_tokens=False).input_ids, 9000)]


def test_the_demo_is_the_default_model():
    assert score_long.build_parser().parse_args(["--output", "out.json"]).model == "demo"
