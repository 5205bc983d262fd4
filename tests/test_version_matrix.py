"""The version matrix: which versions it takes, what it makes of a report, how it ends."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[1] / "scripts" / "test_matrix.py"
spec = importlib.util.spec_from_file_location("version_matrix", PATH)
matrix = importlib.util.module_from_spec(spec)
sys.modules["version_matrix"] = matrix
spec.loader.exec_module(matrix)

REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="one"/>
<testcase classname="tests.test_a" name="two"><failure/></testcase>
<testcase classname="tests.test_b.TestClass" name="three"><skipped/></testcase>
<testcase classname="" name="tests.test_c"><error/></testcase>
</testsuite></testsuites>"""


def test_the_oldest_and_newest_of_each_series():
    versions = ["5.10.0", "5.2.0", "4.57.1", "4.56.2", "4.56.0", "4.57.0rc1", "4.56.1", "4.55.4", "5.2.1", "5.10.3"]
    assert matrix.oldest_and_newest(versions, "4.56") == [
        "4.56.0", "4.56.2", "4.57.1", "5.2.0", "5.2.1", "5.10.0", "5.10.3",
    ]  # fmt: skip
    assert matrix.claimed_minimum("transformers") == "4.56"


def test_outcomes_are_counted_by_file(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(REPORT, encoding="utf-8")
    counts = matrix.count_outcomes(report)
    assert counts["test_a"] == {"passed": 1, "failed": 1, "skipped": 0}
    assert counts["test_b"]["skipped"] == counts["test_c"]["failed"] == 1
    row = matrix.Row("5.2.0", "2.13.0", "3.11", counts)
    assert not row.ok
    table = matrix.markdown_table([row, matrix.Row("5.3.0", "", error="not installed")], ["test_a.py", "test_d.py"])
    assert "1 of 2: **1 failed** | - |" in table
    assert table.splitlines()[3].endswith("not installed")


def environment_of_this_python(folder: Path) -> Path:
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    return folder


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a shell script")
def test_existing_environments_are_run_and_a_broken_one_stops_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(matrix, "HOME", tmp_path / "home")
    good = environment_of_this_python(tmp_path / "good")
    results = tmp_path / "results.json"
    arguments = ["--tests", "test_positions.py", "--json", str(results), "--environments"]
    assert matrix.main([*arguments, str(tmp_path / "missing"), str(good)]) == 1
    broken, run = json.loads(results.read_text(encoding="utf-8"))
    assert broken["transformers"] == "missing"
    assert broken["error"]
    assert run["tests"]["test_positions"]["passed"] > 3
    assert "| positions |" in capsys.readouterr().out
    # The same outcomes again, without starting the processes again.
    monkeypatch.setattr(matrix, "describe", lambda environment: matrix.Row(run["transformers"], run["torch"]))
    monkeypatch.setattr(matrix, "run_tests", lambda environment, row, *_: row.tests.update(run["tests"]))
    assert matrix.main([*arguments, str(good)]) == 0


def test_what_cannot_be_asked_for():
    for arguments in (["--tests", "test_nothing.py"], ["--environments", "x", "--torch", "2.6.0"]):
        with pytest.raises(SystemExit) as exit_info:
            matrix.main(arguments)
        assert exit_info.value.code == 2
