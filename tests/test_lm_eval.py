"""lm-evaluation-harness: its own Hugging Face model where the window holds everything, exact streams beyond it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from experiments.config import SetupError
from experiments.lm_eval_model import StreamingLM
from experiments.models import DEMO_FOLDER
from streaming_llm import StreamingDecoder, StreamingLLMWrapper, score_stream

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "experiments/assets/texts/demo_narrative.txt").read_text()
DOCUMENTS = [TEXT[:1500], TEXT[3000:3400], "", TEXT[5000:6100], "One."]
SMALL = {"n_sink": 4, "window_size": 28}
"""A cache that everything here is longer than."""


def stream(n_sink=4, window_size=1020, **more) -> StreamingLM:
    """The demo model in float64: rounding then explains no difference."""
    arguments = {"attn_backend": "math", "device": "cpu", **more}
    return StreamingLM("demo", n_sink=n_sink, window_size=window_size, dtype="float64", **arguments)


@pytest.fixture(scope="module")
def plain() -> HFLM:
    return HFLM(str(DEMO_FOLDER), dtype="float64", device="cpu", batch_size=2)


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]


def rolling(lm, documents=DOCUMENTS) -> list[float]:
    return lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in documents]))


def pairs() -> list[Instance]:
    """Contexts of unequal length with several continuations each: long, of one token, equal ones, without context."""
    contexts = [TEXT[:600], TEXT[700:760], TEXT[:600], ""]
    continuations = [" the", " a", " The lamp was lit and the keeper", TEXT[600:700], " the"]
    return requests("loglikelihood", [(c, more) for c in contexts for more in continuations])


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_rolling_log_likelihood_is_that_of_one_exact_stream(batch_size):
    lm = stream(**SMALL, batch_size=batch_size)
    for text, found in zip(DOCUMENTS, rolling(lm), strict=True):
        ids = torch.tensor([[lm.prefix_token_id, *lm.tokenizer(text).input_ids]])
        wanted = -float(score_stream(lm.model, ids, **SMALL, block_size=7).double().sum())
        assert found == pytest.approx(wanted, rel=1e-6, abs=1e-6)


def test_a_document_without_a_token_to_predict_has_log_likelihood_0():
    lm = stream(**SMALL)
    [value, nothing] = lm._whole([[0, 5, 7], [0]])
    assert [value, nothing] == [*lm._whole([[0, 5, 7]]), 0.0]


def test_rolling_log_likelihood_is_lm_eval_s_own_where_the_window_holds_the_document(plain):
    documents = [text for text in DOCUMENTS if text]
    assert plain.max_length == 512 > len(plain.tokenizer(documents[0]).input_ids)
    assert rolling(stream(batch_size=2), documents) == pytest.approx(rolling(plain, documents), abs=1e-4)


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 3}, {"batch_size": "auto", "max_batch_size": 4},
                                     {"batch_size": 3, "logits_cache": "False"}])  # fmt: skip
def test_log_likelihoods_are_lm_eval_s_own_where_the_window_holds_the_context(plain, options):
    found, wanted = stream(**options).loglikelihood(pairs()), plain.loglikelihood(pairs())
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_context_of_a_continuation_is_streamed(batch_size):
    lm = stream(**SMALL, batch_size=batch_size)
    context, continuation = TEXT[:1200], TEXT[1200:1260]
    asked = requests("loglikelihood", [(context, continuation), (TEXT[:30], " the"), (context, " the")])
    (value, greedy), _, _ = lm.loglikelihood(asked)
    before, after = lm._encode_pair(context, continuation)
    with StreamingDecoder(lm.model, **SMALL) as decoder:
        decoder.prefill(torch.tensor([before[:1]]))
        for token in before[1:]:
            decoder.step(torch.tensor([token]))
        wanted = float(decoder.score(torch.tensor([after])).sum())
    assert value == pytest.approx(-wanted, abs=1e-6)
    assert not greedy


def test_a_greedy_continuation_is_named_so():
    lm = stream(**SMALL)
    context = TEXT[:1200]
    ids = torch.tensor([lm.tok_encode(context)])
    with StreamingLLMWrapper(lm.model, **SMALL) as model:
        tokens = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :].tolist()
    likely, other = (lm._loglikelihood_tokens([(None, ids[0].tolist(), t)])[0] for t in (tokens, [*tokens[:-1], 7]))
    assert likely[1]
    assert not other[1]


def generations(lm, max_gen_toks=24, until=("\n", ".")) -> list[str]:
    arguments = {"until": list(until), "max_gen_toks": max_gen_toks}
    prompts = [TEXT[:700], TEXT[900:1000], TEXT[2000:2350]]
    return lm.generate_until(requests("generate_until", [(prompt, arguments) for prompt in prompts]))


def test_generation_is_lm_eval_s_own_where_the_window_holds_it_and_ends_at_stop_strings(plain):
    found = generations(stream(batch_size=3))
    assert found == generations(plain)
    assert not any("." in text or "\n" in text for text in found)
    assert any(found)


def test_a_prompt_of_a_batch_gives_what_it_gives_alone():
    assert generations(stream(**SMALL, batch_size=3)) == generations(stream(**SMALL, batch_size=1))
    assert generations(stream(**SMALL, batch_size=3)) != generations(stream(0, 32, batch_size=3))


@pytest.fixture
def tasks(tmp_path) -> TaskManager:
    """Three tasks as files: a rolling one, multiple choice, and generation."""
    documents = [{"text": text} for text in DOCUMENTS if text]
    questions = [
        {"question": TEXT[at : at + 300], "choices": [TEXT[at + n : at + n + 9] for n in (300, 340, 380)], "answer": 0}
        for at in range(0, 4000, 400)
    ]
    common = {"test_split": "test", "dataset_path": "json"}
    written = {
        "local_rolling": {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "byte_perplexity"}], "rows": documents,
        },
        "local_choice": {
            "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer", "metric_list": [{"metric": "acc"}], "rows": questions,
        },
        "local_generation": {
            "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"until": ["."], "max_gen_toks": 8},
            "metric_list": [{"metric": "exact_match"}], "rows": questions[:3],
        },
    }  # fmt: skip
    for name, task in written.items():
        rows = tmp_path / f"{name}.jsonl"
        rows.write_text("\n".join(map(json.dumps, task.pop("rows"))))
        value = common | {"task": name, "dataset_kwargs": {"data_files": {"test": str(rows)}}} | task
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(value))
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


def evaluated(lm, tasks, names, **more) -> dict:
    return simple_evaluate(model=lm, tasks=names, task_manager=tasks, bootstrap_iters=0, **more)


def test_tasks_give_lm_eval_s_own_results(plain, tasks):
    names = ["local_rolling", "local_choice", "local_generation"]
    found, wanted = (evaluated(lm, tasks, names)["results"] for lm in (stream(batch_size=2), plain))
    assert found["local_choice"] == wanted["local_choice"]
    assert 0 < found["local_choice"]["acc,none"] < 1
    key = "byte_perplexity,none"
    assert found["local_rolling"][key] == pytest.approx(wanted["local_rolling"][key], rel=1e-6)
    assert found["local_generation"] == wanted["local_generation"]


def test_results_say_how_they_were_computed(tasks):
    config = evaluated(stream(**SMALL, attn_backend="flash"), tasks, ["local_choice"], limit=2)["config"]
    wanted = {"n_sink": 4, "window_size": 28, "engine": "eager", "attn_backend": "flash", "weights": "trained"}
    assert {key: config[key] for key in wanted} == wanted
    assert config["model_fingerprint"].startswith("files:")


def test_answers_come_from_the_request_cache(tasks, tmp_path, monkeypatch):
    names, cache = ["local_rolling", "local_choice", "local_generation"], str(tmp_path / "answers")
    first = evaluated(stream(**SMALL), tasks, names, use_cache=cache)["results"]

    def fail(*args, **kwargs):
        raise AssertionError("computed again")

    for name in ("_whole", "_predicting", "_model_generate"):
        monkeypatch.setattr(StreamingLM, name, fail)
    assert evaluated(stream(**SMALL), tasks, names, use_cache=cache)["results"] == first


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"n_sinks": 4}, r"unknown model argument 'n_sinks' \(did you mean 'n_sink'\?\)"),
        ({"window_size": 0}, "window_size must be a whole number of at least 1, got 0"),
        ({"attn_backend": "flsh"}, "flsh"),
        ({"engine": "fused"}, "engine 'fused' cannot run"),
        ({"dtype": "float8"}, "unknown dtype 'float8'"),
        ({"device": "cuda:9"}, "cuda:9"),
        ({"pretrained": "no/such/folder"}, "no/such/folder"),
        ({"pretrained": "random:pythia-70m"}, "random:pythia-70m' has no tokenizer"),
    ],
)
def test_bad_arguments_are_one_error(given, says):
    if given.get("device") and torch.cuda.device_count() > 9:
        pytest.skip("there is one")
    with pytest.raises(SetupError, match=says):
        StreamingLM(**{"pretrained": "demo", "device": "cpu", **given})


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    line = [sys.executable, str(ROOT / "scripts" / "lm_eval_streaming.py"), *arguments]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return subprocess.run(line, capture_output=True, text=True, env={**os.environ, **offline, **environment})


@pytest.mark.slow
def test_the_command_line_is_lm_eval_s_own(tasks, tmp_path):
    output = tmp_path / "out"
    done = command(
        "--model_args", "pretrained=demo,n_sink=4,window_size=28", "--tasks", "local_rolling,local_choice",
        "--include_path", str(tmp_path), "--batch_size", "2", "--output_path", str(output), "--log_samples",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "local_choice" in done.stdout
    [path] = output.rglob("results_*.json")
    saved = json.loads(path.read_text())
    assert saved["config"]["model"] == "streaming"
    assert saved["config"]["window_size"] == 28
    assert len(list(output.rglob("samples_*.jsonl"))) == 2


@pytest.mark.slow
def test_bad_command_lines_end_with_one_line_and_code_2(tmp_path):
    done = command("--model_args", "pretrained=demo,windows=3", "--tasks", "wikitext")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: unknown model argument 'windows'")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_missing_harness_is_one_line(tmp_path):
    (tmp_path / "lm_eval.py").write_text("raise ImportError('hidden')")
    done = command("--tasks", "wikitext", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: lm-evaluation-harness cannot be imported (hidden): pip install -e '.[lm-eval]' in the checkout"
    ]
