"""scripts/stream_chat.py: text from tokens, turns, sampling, saving, signals, the terminal; and endless generation."""

from __future__ import annotations

import fcntl
import io
import json
import math
import os
import pty
import random
import select
import signal
import struct
import subprocess
import sys
import termios
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_ids, make_neox
from demo_training_support import ROOT  # puts scripts/ on the module path
from evaluation_support import END, make_model_folder, make_tokenizer
from test_score_long import metaspace_tokenizer
from tokenizers import Tokenizer, decoders
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from experiments.config import SetupError
from streaming_llm import StreamingDecoder, StreamingLLMWrapper

import measure_endless  # isort: skip
import stream_chat  # isort: skip
from streaming_chat.text import LONGEST_RUN, PartialText, UntilMarker  # isort: skip
from streaming_chat.token_stream import Sampler, SamplingError, SamplingSettings, TokenStream  # isort: skip
from streaming_chat.turns import PlainTurns, TemplateTurns, find_turns  # isort: skip

SCRIPT = ROOT / "scripts" / "stream_chat.py"
SIZES = ["--n-sink", "2", "--window-size", "14", "--device", "cpu"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}" + END + "\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
OTHER_SCRIPTS = "Ärger über naïve Ångström; 統計は面白い。🙂👍🏽 e\u0301 — two  spaces\n\tand a tab"

# ------------------------------------------------------------------------------------------------- text from tokens


def demo_tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "experiments" / "assets" / "demo_model")


def byte_fallback_tokenizer():
    """As Llama's, which drops the space in front of a text."""
    trained = json.loads(metaspace_tokenizer().backend_tokenizer.to_str())
    trained["added_tokens"] = [token for token in trained["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(trained))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize("make", [demo_tokenizer, make_tokenizer, byte_fallback_tokenizer])
def test_text_comes_whole_and_never_half_a_character(make):
    tokenizer = make()
    ids = tokenizer(OTHER_SCRIPTS * 3, add_special_tokens=False).input_ids
    whole = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    partial, shown = PartialText(tokenizer), ""
    for number, token in enumerate(ids):
        if number % 5 == 0:  # saved and gone on with
            partial = PartialText(tokenizer, json.loads(json.dumps(partial.state())))
        piece = partial.push(token)
        assert "\ufffd" not in piece
        shown += piece
        assert whole.startswith(shown)
    assert shown == whole
    assert OTHER_SCRIPTS[-10:] in whole


def test_bytes_that_make_no_character_are_shown_and_held_no_longer_than_need_be():
    tokenizer, generator = make_tokenizer(), random.Random(0)
    ids = [generator.randrange(1, 257) for _ in range(3000)] + tokenizer("a", add_special_tokens=False).input_ids
    partial = PartialText(tokenizer)
    shown = "".join(partial.push(token) for token in ids)
    assert shown == tokenizer.decode(ids)
    [lone] = {token for token in range(1, 257) if tokenizer.convert_ids_to_tokens(token) == "ÿ"}
    for token in [lone] * 500:
        shown = partial.push(token)
        assert sum(map(len, partial.state())) <= 2 * LONGEST_RUN
    assert not partial.push(lone)
    assert partial.push(0).startswith("\ufffd"), "a special token ends what was held"


def test_a_marker_is_found_however_it_is_cut():
    for text, before in (("yes\nUser: and", "yes"), ("a\n\nUse\nUser:", "a\n\nUse"), ("no \nUs", "no \nUs")):
        for seed in range(20):
            generator, until, shown, at = random.Random(seed), UntilMarker("\nUser:"), "", 0
            while at < len(text) and not until.found:
                step = generator.randint(1, 4)
                shown += until.push(text[at : at + step])
                assert before.startswith(shown)
                at += step
            assert shown + until.rest() == before
            assert until.found == ("User:" in text)
    until = UntilMarker("")
    assert until.push("anything\n") + until.rest() == "anything\n"


# ------------------------------------------------------------------------------------------------------------ turns


def text_of(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids)


def test_plain_turns():
    tokenizer = make_tokenizer()
    turns = find_turns(tokenizer, [0], plain=False)
    assert isinstance(turns, PlainTurns)
    assert text_of(tokenizer, turns.ids("Hi.", "nothing")) == END + "User: Hi.\nAssistant:"
    assert text_of(tokenizer, turns.ids("Why?", "answer")) == "\nUser: Why?\nAssistant:"
    assert text_of(tokenizer, turns.ids("Why?", "marker")) == " Why?\nAssistant:"


def test_a_template_gives_each_turn_as_it_gives_the_whole_conversation():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    assert isinstance(find_turns(tokenizer, [0], plain=True), PlainTurns)
    turns = find_turns(tokenizer, [0], plain=False)
    assert isinstance(turns, TemplateTurns)
    answer = tokenizer("It is.", add_special_tokens=False).input_ids
    fed = [*turns.ids("Is it?", "nothing"), *answer, *turns.ids("Why so?", "answer")]
    roles = (("user", "Is it?"), ("assistant", "It is."), ("user", "Why so?"))
    whole = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in roles], tokenize=False, add_generation_prompt=True
    )
    assert fed == tokenizer(whole, add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no users here') }}", "no users here"),
        ("{{ messages[-1].content }}", "leaves out earlier answers"),
        ("{% for", "cannot be used"),
    ],
)
def test_a_template_that_does_not_serve_is_refused(template, message):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(SetupError, match=message):
        TemplateTurns(tokenizer)


# --------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    "settings",
    [
        SamplingSettings(1.0, 0, 1.0, seed=3),
        SamplingSettings(0.7, 12, 0.9, seed=4),
        SamplingSettings(1.3, 0, 0.5, seed=5),
        SamplingSettings(0.0),
    ],
)
def test_tokens_are_those_of_generate(settings):
    model, ids = make_neox(), make_ids(30)
    with StreamingLLMWrapper(model, 4, 28) as stream:
        torch.manual_seed(settings.seed)
        sampled = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
        how = {"do_sample": True, **sampled} if settings.temperature else {"do_sample": False}
        expected = stream.generate(ids, max_new_tokens=100, **how)[0, 30:].tolist()
    with StreamingDecoder(model, 4, 28) as decoder:
        ours = TokenStream(decoder, Sampler(settings, torch.device("cpu")))
        ours.pending = ids[0].tolist()
        assert list(islice(ours.tokens(), 100)) == expected
        assert (ours.n_fed, ours.pending) == (decoder.cache.get_seq_length(), expected[-1:])


def test_logits_that_are_not_finite_and_foreign_ids_are_named():
    sampler = Sampler(SamplingSettings(), torch.device("cpu"))
    with pytest.raises(SamplingError, match="another --dtype"):
        sampler.draw(torch.full((1, 5), torch.nan))
    with StreamingDecoder(make_neox(), 4, 28) as decoder:
        stream = TokenStream(decoder, sampler)
        stream.pending = [101]
        with pytest.raises(SetupError, match="101"):
            next(stream.tokens())
        assert not stream.at_rest


# ------------------------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def chat(folder, monkeypatch, capsys):
    """Runs the command line on lines of input; gives exit code, output and errors."""

    def run(*arguments: str, messages: str | bytes = "", model: Path = folder) -> tuple[int, str, str]:
        raw = messages if isinstance(messages, bytes) else messages.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
        capsys.readouterr()
        code = stream_chat.main(["--model", str(model), *SIZES, *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def test_a_conversation_over_a_pipe(chat):
    code, out, err = chat("--max-new-tokens", "50", "--temperature", "1", messages="Hello.\n\nÄrger?\nWhat now?\n")
    assert (code, err) == (0, "")
    assert len(out) > 60
    assert chat("--max-new-tokens", "50", "--temperature", "1", messages="Hello.\nÄrger?\nWhat now?")[1] == out
    assert chat("--max-new-tokens", "50", "--temperature", "1", "--seed", "1", messages="Hello.\n")[1] != out
    assert chat(messages="")[:2] == (0, "")


def test_a_conversation_ends_answers_where_the_model_does(chat, monkeypatch, folder, tmp_path):
    script = [*b"Yes", 0, *b" No\nUser:", *b"And on and on"]
    tokens = iter(
        [0 if byte == 0 else make_tokenizer()(chr(byte), add_special_tokens=False).input_ids[0] for byte in script]
    )
    fed = []
    real = TokenStream._feed
    monkeypatch.setattr(Sampler, "draw", lambda self, logits: next(tokens))
    monkeypatch.setattr(TokenStream, "_feed", lambda self, ids: fed.extend(ids) or real(self, ids))
    code, out, _ = chat("--max-new-tokens", "9", messages="a\nb\nc\n")
    assert (code, out) == (0, "Yes\nNo\nAnd on an\n")
    assert make_tokenizer().decode(fed) == (
        END + "User: a\nAssistant:Yes\nUser: b\nAssistant: No\nUser: c\nAssistant:And on a"
    )


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_an_endless_text_saved_and_gone_on_with_is_the_same(chat, tmp_path, temperature):
    path, given = tmp_path / "stream.safetensors", ["--endless", "--temperature", temperature]
    code, whole, err = chat(*given, "--prompt", "It was", "--max-new-tokens", "90")
    assert (code, err) == (0, "")
    assert whole.startswith("It was")
    code, text, _ = chat(*given, "--prompt", "It was", "--max-new-tokens", "31", "--save", path)
    text = text.removesuffix("\n")
    for n in ("29", "30"):
        code, more, err = chat(*given, "--resume", path, "--max-new-tokens", n, "--save", path, "--seed", "77")
        assert (code, err) == (0, "")
        text += more.removesuffix("\n")
    assert text == whole.removesuffix("\n")


def test_a_conversation_saved_and_gone_on_with_is_the_same(chat, tmp_path):
    path, given = tmp_path / "stream.safetensors", ["--max-new-tokens", "20", "--temperature", "1"]
    whole = chat(*given, messages="Hello.\nWho?\nWhy?\n")[1]
    first = chat(*given, "--save", path, messages="Hello.\n")[1]
    second = chat(*given, "--resume", path, "--save", path, messages="Who?\n")[1]
    assert first + second + chat(*given, "--resume", path, messages="Why?\n")[1] == whole


def test_what_does_not_fit_is_refused(chat, tmp_path, folder):
    path = tmp_path / "stream.safetensors"
    assert chat("--endless", "--max-new-tokens", "40", "--save", path)[0] == 0
    other = make_model_folder(tmp_path / "other", seed=5)
    larger = make_model_folder(tmp_path / "larger", num_hidden_layers=3)
    (tmp_path / "text.txt").write_text("once upon a time")
    with StreamingDecoder(make_neox(), 4, 28) as decoder:
        decoder.cache.save(tmp_path / "library.safetensors")
    for arguments, message in (
        (["--resume", path], "saved with --endless"),
        (["--endless", "--resume", path, "--window-size", "15"], "--window-size 15: the saved stream has 14"),
        (["--endless", "--resume", path, "--dtype", "float64"], "dtype: float32 there, float64 here"),
        (["--endless", "--resume", tmp_path / "text.txt"], "not a saved stream"),
        (["--endless", "--resume", tmp_path / "library.safetensors"], "none of this program"),
        (["--endless", "--resume", tmp_path / "nowhere"], "nowhere"),
    ):
        code, out, err = chat(*arguments)
        assert (code, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1
    assert "weights are not those" in chat("--endless", "--resume", path, model=other)[2]
    assert "num_hidden_layers: 2 there, 3 here" in chat("--endless", "--resume", path, model=larger)[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "random:pythia-70m"], "no tokenizer"),
        (["--model", "no-such-folder/no-model"], "no-such-folder"),
        (["--temperature", "-1"], "--temperature"),
        (["--temperature", "nan"], "--temperature"),
        (["--top-p", "0"], "--top-p"),
        (["--top-k", "-1"], "--top-k"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--n-sink", "-1"], "n_sink"),
        (["--prompt", "a"], "--endless"),
        (["--decode-engine", "steam"], "steam"),
        (["--attn-backend", "flush"], "flush"),
        (["--dtype", "float12"], "float12"),
        (["--save", "/dev/null/stream"], "cannot be written"),
        (["--save", "/"], "is a folder"),
    ],
)
def test_bad_input_gets_one_line(chat, arguments, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, err = chat(*arguments, messages="Hello.\n")
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_input_that_is_no_text(chat):
    code, _, err = chat("--max-new-tokens", "3", messages=b"ok\n\xff\xfe\n")
    assert (code, err) == (2, "error: the input is not UTF-8 text (invalid start byte)\n")


def test_ctrl_c_stops_the_answer_and_then_the_program(chat, monkeypatch, tmp_path):
    real, said = stream_chat.say, []

    def say(text: str) -> None:
        said.append(text)
        if len(said) in stops:
            os.kill(os.getpid(), signal.SIGINT)
        real(text)

    monkeypatch.setattr(stream_chat, "say", say)
    monkeypatch.setattr(stream_chat, "stop_ids", lambda loaded: frozenset())
    given = ["--max-new-tokens", "4000", "--save", tmp_path / "stream.safetensors"]
    stops = {40, 80}
    code, _, err = chat(*given, messages="Hello.\nWho?\n")
    assert (code, err) == (0, ""), "one for each answer"
    assert 80 <= len(said) < 100
    assert (tmp_path / "stream.safetensors").exists()
    said, stops = [], {40}
    assert chat("--endless", *given)[0] == 130
    assert (tmp_path / "stream.safetensors").exists()
    monkeypatch.setattr(stream_chat, "say", real)

    step = StreamingDecoder.step

    def interrupted(self, token_ids):
        if self.cache.get_seq_length() == 50:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        return step(self, token_ids)

    monkeypatch.setattr(StreamingDecoder, "step", interrupted)
    code, _, err = chat(*given[:2], "--save", tmp_path / "other.safetensors", messages="Hello.\n")
    assert code == 130
    assert "in the middle of a token" in err
    assert not (tmp_path / "other.safetensors").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def command(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "--model", str(folder), *SIZES, *arguments]


def test_a_reader_that_has_enough(folder):
    run = command(folder, "--endless")
    with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout.read(50)
        process.stdout.close()
        assert process.wait(60) == 0
        assert process.stderr.read() == b""


class Terminal:
    """The other side of a terminal of 30 rows and 90 columns in which a command runs."""

    def __init__(self, run: list[str]) -> None:
        self.main, side = pty.openpty()
        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 90, 0, 0))
        environment = {**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            run,
            stdin=side,
            stdout=side,
            stderr=side,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C goes there
        )
        os.close(side)
        self.shown = b""

    def wait_for(self, text: bytes) -> None:
        """Read what is shown until ``text`` comes; an empty one: until the command ends."""
        begin = len(self.shown)
        while not text or text not in self.shown[begin:]:
            assert select.select([self.main], [], [], 30)[0], f"{text} did not come after {self.shown[-500:]}"
            try:
                part = os.read(self.main, 1 << 16)
            except OSError:  # Linux's word for an end
                part = b""
            if not part:
                assert not text, f"it ended before {text}: {self.shown[-500:]}"
                return
            self.shown += part

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.main)


@torch.no_grad()
def without_end(folder: Path) -> None:
    """Make a model never choose <|endoftext|>."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.gpt_neox.final_layer_norm.bias.fill_(1.0)
    model.get_output_embeddings().weight[0] = -1.0
    model.save_pretrained(folder)


def test_in_a_terminal_it_shows_speed_and_cache_in_the_last_row(tmp_path):
    folder = make_model_folder(tmp_path / "tiny")
    without_end(folder)
    terminal = Terminal(command(folder, "--max-new-tokens", "3000", "--plain"))
    try:
        for _ in range(2):  # Ctrl-C stops the answer, and the next question is asked
            terminal.wait_for(b"\n> ")
            os.write(terminal.main, b"Hello.\n")
            terminal.wait_for(b"tokens/s | cache 16 of 16")
            os.write(terminal.main, b"\x03")
        terminal.wait_for(b"\n> ")
        os.write(terminal.main, b"\x04")
        terminal.wait_for(b"")
        assert terminal.process.wait(60) == 0
    finally:
        terminal.close()
    assert b"\x1b[1;29r" in terminal.shown, "the last of 30 rows is set apart"
    assert terminal.shown.rindex(b"\x1b[r") > terminal.shown.rindex(b"tokens/s"), "and given back"


# ---------------------------------------------------------------------------------------------- endless, measured


def test_measuring_endless_generation(folder, tmp_path, capsys):
    output = tmp_path / "endless.json"
    given = ["--model", str(folder), *SIZES, "--tokens", "2000", "--streams", "2", "--output", str(output)]
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
