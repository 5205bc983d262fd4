"""The plot scripts as a person runs them: exit codes, what they say, no torch, no installed project."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from plot_fixtures.synthetic import write_json, write_older, write_set

from experiments import make_report, plot_ablation_results, plot_all, plot_fixed_eval_results
from experiments.plotting.paper_page import write_pages
from experiments.plotting.script import main

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = Path(plot_all.__file__).parent
SCRIPTS = {script.__name__.split(".")[-1]: script.draw for script in make_report.SCRIPTS}


def run_script(draw, *arguments):
    return main(draw, "a test", [str(a) for a in arguments])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("results"), ["pg19"], ["baseline", "streaming"], ["math", "flash"])


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_script_writes_its_figures(name, results, tmp_path, capsys):
    assert run_script(SCRIPTS[name], "--results-dir", results, "--output-dir", tmp_path, "--format", "png", "svg") == 0
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written
    assert len(written) % 2 == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in written)


def test_no_results_is_one_line_and_exit_code_2(tmp_path, capsys):
    assert run_script(plot_fixed_eval_results.draw, "--results-dir", tmp_path / "absent") == 2
    assert run_script(plot_fixed_eval_results.draw, "--results-dir", tmp_path) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all(line.startswith("error: --results-dir") for line in errors)


def test_results_elsewhere_below_are_pointed_out(tmp_path, capsys):
    write_set(tmp_path / "h200", ["pg19"], ["baseline"], ["math"])
    assert run_script(plot_fixed_eval_results.draw, "--results-dir", tmp_path) == 2
    assert str(tmp_path / "h200") in capsys.readouterr().err


def test_recognised_files_that_a_script_does_not_draw_are_no_error(tmp_path, capsys):
    write_json(tmp_path / "pg19_ours.json", {"perplexity": 9.0, "total_time": 2.0})
    assert run_script(plot_ablation_results.draw, "--results-dir", tmp_path, "--output-dir", tmp_path / "f") == 0
    assert "none of which this script draws" in capsys.readouterr().out
    assert not (tmp_path / "f").exists()


def test_broken_and_foreign_files_are_named_skipped_and_exit_code_1(tmp_path, capsys):
    write_older(tmp_path)
    (tmp_path / "pg19_streaming.json").write_text("{")
    write_json(tmp_path / "shopping.json", {"milk": 2})
    out = tmp_path / "figures"
    assert run_script(plot_fixed_eval_results.draw, "--results-dir", tmp_path, "--output-dir", out) == 1
    errors = capsys.readouterr().err
    assert "pg19_streaming.json: broken" in errors
    assert "shopping.json: foreign" in errors
    assert (out / "fixed_eval_perplexity.png").exists()


def test_missing_cells_are_named_on_the_console_once(tmp_path, capsys):
    write_set(tmp_path, ["pg19"], ["baseline", "kvpress"], ["math"], skip=[("pg19", "kvpress", "math")])
    run_script(plot_fixed_eval_results.draw, "--results-dir", tmp_path, "--output-dir", tmp_path / "f")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("missing:")]
    assert lines == ["missing: KVPress (math) on PG19: skipped: kvpress is not installed"]


def test_an_unknown_format_is_refused(results, capsys):
    with pytest.raises(SystemExit) as caught:
        run_script(plot_fixed_eval_results.draw, "--results-dir", results, "--format", "gif")
    assert caught.value.code == 2
    assert "'png', 'pdf', 'svg'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["plot_all", "make_report", "plot_ablation_results"])
def test_help_has_the_examples_and_what_is_written(name):
    command = [sys.executable, EXPERIMENTS / f"{name}.py", "--help"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"    python experiments/{name}.py\n" in said
    assert "report.html" in said or "Writes" in said


def test_drawing_everything_fills_a_folder_per_root_and_is_reproducible(tmp_path, capsys):
    top = tmp_path / "results"
    write_set(top, ["demo_narrative"], ["baseline", "streaming"], ["math"], repeats=1)
    write_set(top / "h200" / "pythia-70m", ["pg19"], ["baseline", "streaming"], ["flash"], repeats=1, weights="random")
    contents = []
    for name in ("once", "again"):
        assert plot_all.main(["--results-dir", str(top), "--output-dir", str(tmp_path / name)]) == 0
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        contents.append({path.relative_to(tmp_path / name).as_posix(): path.read_bytes() for path in files})
    assert contents[0] == contents[1]
    names = set(contents[0])
    assert {"report.html", "h200/report.html", "fixed_eval_speedup.png", "stream_curves.png"} <= names
    assert "h200/pythia-70m/fixed_eval_speedup.png" in names
    assert "h200/pythia-70m/fixed_eval_perplexity.png" not in names
    where, found = capsys.readouterr().out.splitlines()[-2:]
    page = tmp_path / "again" / "report.html"
    assert where == f"Open {page}: all figures and tables on one page that needs no network."
    assert found.startswith("On Demo narrative, StreamingLLM was 7.33 times as fast as re-computing the window")


def test_what_the_project_shows_is_what_it_keeps_under_results():
    kept = re.findall(r"^!/results/(\w+)/$", (ROOT / ".gitignore").read_text(), flags=re.MULTILINE)
    assert kept == [folder.name for folder in make_report.PROJECT]
    assert not make_report.roots_of(ROOT / "results" / "h100", "own")


def test_a_newcomer_sees_the_own_run_only_and_the_project_s_by_themselves(tmp_path, capsys, monkeypatch):
    top, out = tmp_path / "results", tmp_path / "figures"
    monkeypatch.setattr(make_report, "PROJECT", [top / "cpu"])
    skip = [("pg19", "kvpress", "math")]
    write_set(top / "cpu", ["pg19"], ["baseline", "streaming"], ["flash"], repeats=1, weights="random", losses=False)
    write_set(top, ["pg19"], ["baseline", "streaming", "kvpress"], ["math"], repeats=1, losses=False, skip=skip)
    arguments = ["--results-dir", str(top), "--output-dir", str(out)]

    assert plot_all.main([*arguments, "--runs", "own"]) == 0
    first, missing, where, found = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{top}: ")
    assert missing == "  missing: KVPress (math) on PG19: skipped: kvpress is not installed"
    assert where.startswith(f"Open {out / 'report.html'}")
    assert "7.33 times as fast" in found
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("skipped: kvpress is not installed") > 1  # in the table, and as not measured
    assert not any(word in page for word in ("random", "no losses", "all results have the backend"))
    assert not (out / "cpu").exists()

    own = (out / "report.html").read_bytes()
    assert plot_all.main([*arguments, "--runs", "project"]) == 0
    assert (out / "cpu" / "report.html").exists()
    assert (out / "report.html").read_bytes() == own
    assert make_report.roots_of(top) == [top, top / "cpu"]


def test_drawing_everything_without_results(tmp_path, capsys):
    assert plot_all.main(["--results-dir", str(tmp_path)]) == 2
    assert make_report.main(["--results-dir", str(tmp_path / "absent")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_root_with_nothing_but_a_broken_file_is_not_passed_over(tmp_path, capsys):
    top = tmp_path / "results"
    write_json(top / "cpu" / "final" / "pg19_ours.json", {"perplexity": 9.0, "total_time": 2.0})
    (top / "h200" / "final").mkdir(parents=True)
    (top / "h200" / "final" / "pg19_main_backend-math.json").write_text("{")
    assert plot_all.main(["--results-dir", str(top), "--output-dir", str(tmp_path / "f")]) == 1
    assert "pg19_main_backend-math.json: broken" in capsys.readouterr().err
    assert plot_all.main(["--results-dir", str(top / "h200"), "--output-dir", str(tmp_path / "f")]) == 2


def test_a_script_runs_where_the_project_is_not_installed(results, tmp_path):
    # -S leaves out site, and with it the installed project; numpy and matplotlib come by PYTHONPATH.
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib"), "MPLBACKEND": "agg"}
    command = [sys.executable, "-S", EXPERIMENTS / "plot_ablation_results.py", "--results-dir", results]
    subprocess.run([*command, "--output-dir", tmp_path], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "ablation_n_sink.png").exists()


def test_figures_of_several_models_share_no_id_on_the_paper_s_page(tmp_path):
    (results,) = (path for path in (ROOT / "results" / "h100" / "paper").iterdir() if path.is_dir())
    for model in ("one", "two"):
        shutil.copytree(results, tmp_path / model, ignore=shutil.ignore_patterns("*.png"))
    assert {"long.png", "index.html"} <= {path.name for path in write_pages(tmp_path)}
    ids = re.findall(r'\bid="([^"]+)"', (tmp_path / "index.html").read_text(encoding="utf-8"))
    assert len(ids) > 100
    assert len(ids) == len(set(ids))
