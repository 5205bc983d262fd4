"""The documents hold: links and anchors lead somewhere, options exist, and commands run as they stand there."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FIRST, RESULTS = ROOT / "README.md", ROOT / "results" / "README.md"
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("results/*.md")),
    ROOT / "streaming_llm" / "README.md",
    ROOT / "experiments" / "assets" / "README.md",
]
ELSEWHERE = re.compile(
    r"random:|\$M\b|EleutherAI/|Qwen/|\.gguf|\bfused|ray\b|books|--streams 16|lm_eval|\bMODEL\b|\.\.\."
)
"""What only a GPU, the network, a cluster or an extra can run: their options alone are checked."""
SMALL = {
    "experiments/run_final_experiments.py": "--max-eval-tokens 300 --only main --repeats 1 --output-dir {out}",
    "eval_streaming_llm.py": "--max-eval-tokens 300 --output {out}/one.json",
    "experiments/plot_all.py": "--output-dir {out}/figures",
    "scripts/benchmark_decode.py": "--figures {out}/figures",
    "scripts/measure_endless.py": "--tokens 2000 --output {out}/endless.json",
}
"""Arguments that go behind a command's own: few tokens, and nothing is written into the checkout."""


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@cache
def anchors(document: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {slug(heading) for heading in headings} | set(re.findall(r'<a id="([^"]+)">', text))


def commands(document: Path) -> list[str]:
    """Python command lines of a document, in its blocks and in its text, without comments."""
    text = document.read_text().replace("\\\n", " ")
    blocks = re.findall(r"^```\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    found = [line.split("  #")[0] for line in lines]
    return [line for line in dict.fromkeys(found) if re.match(r"([A-Z_]+=\S+ )?(\.venv/bin/)?python ", line)]


def words_of(command: str) -> tuple[dict[str, str], list[str]]:
    """Environment variables and arguments behind ``python``."""
    words = shlex.split(command)
    n = next(i for i, word in enumerate(words) if word.endswith("python"))
    return dict(word.split("=", 1) for word in words[:n]), words[n + 1 :]


ALL = list(dict.fromkeys(command for document in DOCUMENTS for command in commands(document)))
HERE = [command for path in (FIRST, RESULTS) for command in commands(path) if not ELSEWHERE.search(command)]
HERE = [command for command in dict.fromkeys(HERE) if not command.endswith("--help")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_and_anchors_hold(document):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        to = (document.parent / path).resolve() if path else document
        if not to.exists() or (anchor and anchor not in anchors(to)):
            broken.append(target)
    assert not broken


def test_numbers_of_the_front_page_are_those_of_the_results():
    linked = re.findall(r"\[([\d.,]+)[^\]]*\]\(results/README\.md#[^)]+\)", FIRST.read_text())
    assert len(linked) > 10
    text = RESULTS.read_text()
    assert not [number for number in linked if number not in text]


SCRIPTS = sorted({script for command in ALL if re.match(r"(?!tests/).+\.py$", script := words_of(command)[1][0])})


@pytest.mark.parametrize("script", SCRIPTS)
def test_options_of_commands_exist(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    known = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    assert end.value.code == 0
    for command in ALL:
        if script in command and ("lm_eval" not in script or find_spec("lm_eval")):  # whose help is that package's
            assert {word for word in words_of(command)[1] if word.startswith("--")} <= known, command


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """Where the commands write; the first of them makes results that others draw."""
    return tmp_path_factory.mktemp("documents")


@pytest.mark.slow
@pytest.mark.parametrize("command", HERE)
def test_commands_run(command, out):
    variables, words = words_of(command)
    words += SMALL.get(words[0], "").format(out=out).split()
    if "own" in words:
        words += ["--results-dir", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    run = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]


def examples(document: Path) -> list[str]:
    """Python programs of a document, with the demo model and few tokens."""
    text = document.read_text().replace("Qwen/Qwen2.5-0.5B-Instruct", str(ROOT / "experiments/assets/demo_model"))
    text = re.sub(r"1020|[\d_]+000(?=\b)", "12", text)
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def test_the_examples_run_one_after_the_other(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a stream is saved
    names: dict = {}
    for document in (FIRST, ROOT / "streaming_llm" / "README.md"):
        for example in examples(document):
            assert not re.search(r"(max_new_tokens|window_size)=\d{3}", example)
            exec(compile(example, document.name, "exec"), names)
    assert "Once upon a time" in capsys.readouterr().out
    assert names["nll"].shape == (1, names["ids"].shape[1] - 1)
