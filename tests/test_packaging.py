"""What `pip install .` installs: every package of the project, whether or not a checkout is on the path."""

import tomllib
from pathlib import Path

import pytest

from streaming_llm.__main__ import main

ROOT = Path(__file__).resolve().parents[1]


def test_every_package_is_installed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    tops = {name.partition(".")[0] for name in listed}
    found = {
        ".".join(init.parent.relative_to(ROOT).parts) for top in tops for init in (ROOT / top).rglob("__init__.py")
    }
    assert set(listed) == found


def test_what_runs_here_fits_on_a_screen(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["streaming_llm"])
    assert main() == 0
    said = capsys.readouterr().out
    assert len(said.splitlines()) < 30
    assert max(map(len, said.splitlines())) < 120


def test_whether_a_model_streams_is_one_line(capsys, monkeypatch):
    demo = str(ROOT / "experiments" / "assets" / "demo_model")
    monkeypatch.setattr("sys.argv", ["streaming_llm", demo, "--window-size", "252"])
    assert main() == 0
    assert capsys.readouterr().out == (
        f"{demo} (gpt_neox) streams: 6 layers keep 4 sinks + 252 tokens; rotated dimensions: 8\n"
    )
    monkeypatch.setattr("sys.argv", ["streaming_llm", str(ROOT / "nowhere")])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err == f"error: {ROOT / 'nowhere'}: there is no such file or folder\n"
