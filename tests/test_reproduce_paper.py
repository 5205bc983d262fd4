"""The paper's tables in one command: what is asked and counted, what a small run writes, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_support import error_line, make_model_folder, make_text, make_tokenizer

from experiments.config import SetupError
from experiments.paper.asking import Asked, answered, make_stream, method_sizes
from experiments.paper.questions import conversation, read_questions
from experiments.paper.run import EXPERIMENTS
from experiments.paper.setting import Lengths, Setting, curve
from experiments.plotting.paper_figures import DRAW
from experiments.plotting.paper_page import REPORTED
from experiments.reproduce_paper import main

SMALL = ("--cache-size", "24", "--max-eval-tokens", "300", "--samples", "1", "--device", "cpu")
ARC = {"id": "1", "question": {"stem": "What is wet?", "choices": [{"text": "fire", "label": "A"},
       {"text": "water", "label": "B"}]}, "answerKey": "B"}  # fmt: skip
HUB = {"id": "2", "question": "Which is a number?", "choices": {"text": ["two", "tree"], "label": ["1", "2"]},
       "answerKey": "1"}  # fmt: skip


class Fixed(Setting):
    """A setting of a model that is at hand."""

    def __init__(self, folder: Path):
        from experiments.config import ExperimentConfig
        from experiments.measuring import resolve_machine
        from experiments.models import find_model
        from experiments.texts import load_as_one

        config = ExperimentConfig(model=str(folder), device="cpu", n_sink=2)
        text = load_as_one([str(make_text(folder.parent / "text.txt"))])
        lengths = Lengths.of(64, True, 24, 300, 1)
        super().__init__(config, find_model(str(folder)), resolve_machine(config), text, lengths, None)


@pytest.fixture
def setting(tmp_path) -> Setting:
    return Fixed(make_model_folder(tmp_path / "tiny"))


@pytest.fixture
def questions(tmp_path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, [ARC, HUB] * 4)))
    return path


def test_every_experiment_is_drawn_and_has_the_paper_s_figures():
    assert set(EXPERIMENTS) == set(REPORTED) == set(DRAW)
    for name, experiment in EXPERIMENTS.items():
        reported = REPORTED[name]
        assert all(len(row) == len(reported["head"]) for row in reported.get("rows", ()))
        assert name == "positions" or experiment.reference == reported["where"]


def test_a_stream_of_facts_asks_for_a_line_so_many_lines_back():
    tokenizer = make_tokenizer()
    stream = make_stream(tokenizer, [0], n_queries=3, distance=20, seed=7)
    text = tokenizer.decode(stream.ids)
    lines = {line.split()[4]: line.split()[6] for line in text.splitlines() if line.startswith("The REGISTER")}
    asked = [line for line in text.splitlines() if line.startswith("Query")]
    assert [line.split()[5] for line in asked] == ["0", "10", "20"]
    assert [line.split()[7] for line in asked] == [lines["0"], lines["10"], lines["20"]]
    for (first, end), line in zip(stream.answers, ("0", "10", "20"), strict=True):
        assert tokenizer.decode(stream.ids[first:end]) == f" {lines[line].removesuffix('>')}"
    assert stream.ids == make_stream(tokenizer, [0], 3, 20, 7).ids != make_stream(tokenizer, [0], 3, 20, 8).ids
    facts = [stream.ids.index(0)]
    assert len(facts) == 1
    place = text.encode().index(b"The REGISTER_CONTENT in line 10 ")
    assert stream.answers[1][1] - stream.distances[1] == place - len("<|endoftext|>") + 1  # a token is a byte


@pytest.mark.parametrize("method", ["dense", "window", "streaming"])
def test_an_answer_counts_where_the_model_would_have_generated_it(setting, method):
    """Against generate(): the stream's answers are what the model says, but for those that were changed."""
    from streaming_llm import StreamingLLMWrapper

    model, lengths = setting.loaded.model, (3, 1, 2, 4)
    sizes = method_sizes(setting, method, setting.lengths.cache, 200)
    ids, answers = setting.ids(40)[0].tolist(), []
    with StreamingLLMWrapper(model, config=sizes) as stream:
        for number, length in enumerate(lengths):
            out = stream.generate(torch.tensor([ids]), max_new_tokens=length, do_sample=False)[0].tolist()
            if number == 2:
                out[-1] = (out[-1] + 1) % 100
            answers.append((len(ids), len(out)))
            ids = out + setting.ids(80)[0, 40 + 5 * number : 50 + 5 * number].tolist()
    [right] = answered(setting, [Asked(ids, answers, [])], sizes)
    assert right.tolist() == [True, True, False, True]


def test_questions_in_both_of_arc_s_formats_make_one_conversation(questions):
    read = read_questions(str(questions))
    assert [question.answer for question in read[:2]] == ["B", "1"]
    assert read[0].text == "What is wet?\nA. fire\nB. water"
    tokenizer = make_tokenizer()
    for template in (None, "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"):
        tokenizer.chat_template = template
        stream = conversation(tokenizer, [0], read)
        assert [tokenizer.decode(stream.ids[a:b]) for a, b in stream.answers] == ["B", "1"] * 4
        assert tokenizer.decode(stream.ids).count("What is wet?") == 4


def test_made_questions_have_one_right_choice_each():
    made = read_questions("made")
    assert len(made) == 1000
    for question in made:
        texts = dict(question.choices)
        assert len(set(texts.values())) == 4
        if "plus" in question.stem:
            _, _, a, _, b = question.stem.strip("?").split()
            assert int(texts[question.answer]) == int(a) + int(b)
    assert 200 < sum(question.answer == "C" for question in made) < 300


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"question": "What?", "choices": []}', r"record 1 is not in ARC's format .*it has: question, choices"),
        (json.dumps(ARC) + '\n{"text": "nothing"}', "record 2 is not in ARC's format"),
        (json.dumps(ARC | {"answerKey": "E"}), "record 1: no choice has the label 'E'"),
        ("[1]", "record 1 is not in ARC's format"),
        ("{", "cannot be read"),
        ("", "there are none"),
    ],
)
def test_questions_of_another_form_are_one_line(tmp_path, content, says, capsys):
    path = tmp_path / "wrong.jsonl"
    path.write_text(content)
    with pytest.raises(SetupError, match=says):
        read_questions(str(path))
    assert error_line(lambda: main(["--questions", str(path), "--dry-run"]), capsys)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--only", "sinkz"], "did you mean 'sinks'?"),
        (["--cache-size", "4"], "leaves no room for a window"),
        (["--samples", "0"], "samples must be a whole number of at least 1"),
        (["--model", "no/such/place"], "no/such/place"),
        (["--model", "random:pythia-70m"], "has random weights"),
        (["--questions", "gone.jsonl"], "gone.jsonl: cannot be read"),
    ],
)
def test_bad_arguments_are_one_line_before_anything_is_computed(arguments, says, tmp_path, capsys):
    assert says in error_line(lambda: main([*arguments, "--output-dir", str(tmp_path / "out")]), capsys)
    assert not list((tmp_path / "out").rglob("*.json"))


def test_a_curve_s_stretches_hold_every_loss_once():
    nll = np.random.default_rng(0).random(103).astype(np.float32)
    found = curve(nll, 10)
    assert found["token"][-1] == 103
    weights = np.diff([0, *found["token"]])
    assert np.average(np.log(found["perplexity"]), weights=weights) == pytest.approx(nll.mean(), rel=1e-6)


def test_the_smallest_run_writes_results_figures_and_the_page_and_goes_on(tmp_path, questions, capsys):
    root = tmp_path / "out" / "paper"
    command = [
        "--model", str(make_model_folder(tmp_path / "tiny")), "--datasets", str(make_text(tmp_path / "text.txt")),
        "--output-dir", str(tmp_path / "out"), "--n-sink", "2", *SMALL, "--questions", str(questions),
        "--only", "methods", "line-breaks", "attention", "long", "stream-eval", "questions", "positions",
    ]  # fmt: skip
    assert main([*command, "--dry-run"]) == 0
    assert not (root / "tiny").exists()
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "FAILED" not in said
    results = {path.stem: json.loads(path.read_text()) for path in (root / "tiny").glob("*.json")}
    assert set(results) == set(command[command.index("--only") + 1 :])
    assert all((root / "tiny" / f"{name}.png").stat().st_size > 5000 for name in results)
    assert all(result["status"] == "ok" for result in results.values())
    rows = {row["method"]: row for row in results["methods"]["rows"]}
    assert rows["dense"]["tokens"] == 300
    caches = [(row["method"], row.get("cache_size"), row["tokens"]) for row in results["long"]["rows"]]
    assert caches == [("streaming", 32, 300), ("streaming", 24, 300), ("window", 32, 300), ("dense", None, 64)]
    assert results["positions"]["rows"][2]["drift"] < 1e-3 < results["positions"]["rows"][1]["drift"]
    page = (root / "index.html").read_text()
    assert page.count("<svg") == len(results)
    assert "5158.07" in page
    files = {path: path.stat().st_mtime_ns for path in (root / "tiny").glob("*.json")}
    assert main(command) == 0  # everything is there
    assert "[1/" not in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (root / "tiny").glob("*.json")} == files


def test_taking_attention_weights_leaves_the_fused_engine_possible(setting):
    from streaming_llm.fused.refusals import why_not

    assert why_not(setting.loaded.model) is None
    for piece in EXPERIMENTS["attention"].pieces(setting):
        piece.compute()
    assert why_not(setting.loaded.model) is None


def test_a_piece_that_fails_leaves_the_others(tmp_path, monkeypatch, capsys):
    from experiments.methods import METHODS

    def fail(self, ids):
        raise MemoryError("no more")

    monkeypatch.setattr(METHODS["dense"], "score", fail)
    command = [
        "--model", str(make_model_folder(tmp_path / "tiny")), "--datasets", str(make_text(tmp_path / "text.txt")),
        "--output-dir", str(tmp_path / "out"), *SMALL, "--only", "methods",
    ]  # fmt: skip
    assert main(command) == 1
    assert "methods: dense: FAILED: out of memory: no more" in capsys.readouterr().out
    result = json.loads((tmp_path / "out/paper/tiny/methods.json").read_text())
    assert result["status"] == "failed"
    assert [row["method"] for row in result["rows"]] == ["window", "baseline", "streaming"]
    assert "no more" in (tmp_path / "out/paper/index.html").read_text()
