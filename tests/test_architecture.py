"""Imports go one way, and no module hides an installed package."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"streaming_llm", "personal_adapters", "experiments", "scripts"}
NO_TORCH = [*ROOT.glob("experiments/plot_*.py"), *ROOT.glob("experiments/plotting/*.py")]
NO_TORCH += [ROOT / "experiments" / "make_report.py"]
DRAWING = ("experiments.plotting", "experiments.plot_", "experiments.make_report")


def imported(path: Path) -> set[str]:
    """Dotted names of every module that the file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(path.relative_to(ROOT).parts[: -node.level]) if node.level else ""
            module = ".".join(filter(None, (package, node.module)))
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def modules_below(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", ["streaming_llm", "personal_adapters"])
def test_the_two_libraries_import_nothing_else_of_the_project(package):
    paths = modules_below(package)
    assert paths
    for path in paths:
        foreign = {name.split(".")[0] for name in imported(path)} & (PACKAGES - {package})
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


def files_imported(path: Path) -> set[Path]:
    """The project's own files that a file imports, wherever in it."""
    found = set()
    for name in imported(path):
        at = ROOT.joinpath(*name.split("."))
        found |= {candidate for candidate in (at.with_suffix(".py"), at / "__init__.py") if candidate.is_file()}
    return found - {path} - {parent / "__init__.py" for parent in path.parents}  # nor its own packages


@pytest.mark.parametrize("package", ["streaming_llm", "personal_adapters", "experiments"])
def test_no_files_import_each_other(package):
    """Nor in a circle of several; imports inside functions count."""
    open_files = {path: files_imported(path) for path in modules_below(package)}
    while leaves := [path for path, needs in open_files.items() if not needs & open_files.keys()]:
        for path in leaves:
            del open_files[path]
    assert not open_files, {str(p.relative_to(ROOT)) for p in open_files}


def test_a_file_of_the_library_is_read_at_one_sitting():
    long = {
        str(path.relative_to(ROOT)): lines
        for path in modules_below("streaming_llm")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 300
    }
    assert not long


def calls_and_subscripts(path: Path) -> Iterator[tuple[int, str]]:
    """Line and source of what is called, for each call in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func)


def test_kernels_and_graphs_are_launched_in_one_place():
    """Which makes the tensors' device current: elsewhere they would run on another device, without an error."""
    for path in modules_below("streaming_llm"):
        for line, function in calls_and_subscripts(path):
            where = f"{path.relative_to(ROOT)}:{line}"
            if path.name != "launch.py":
                assert not re.fullmatch(r"\w+\[.*\]", function) or function[0] != "_", f"a kernel launched at {where}"
            if path.name != "recorder.py":
                assert not re.search(r"cuda\.graph$|CUDAGraph|graph\.replay$", function), where


def test_experiments_do_not_import_scripts():
    for path in modules_below("experiments"):
        assert "scripts" not in {name.split(".")[0] for name in imported(path)}, path


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.stem)
def test_no_script_imports_another_nor_anything_by_where_it_lies(script):
    beside = {path.stem for path in (ROOT / "scripts").iterdir()} - {script.stem}
    assert not {name.split(".")[0] for name in imported(script)} & beside


def test_plots_import_no_torch():
    heavy = {"torch", "transformers", "datasets", "kvpress", "streaming_llm", "personal_adapters"}
    assert len(NO_TORCH) > 3
    for path in NO_TORCH:
        names = imported(path)
        assert not {name.split(".")[0] for name in names} & heavy, path
        ours = {name for name in names if name.startswith("experiments.")}
        assert all(name.startswith(DRAWING) for name in ours), (path, ours)


def test_importing_a_plot_script_does_not_import_torch():
    names = [f"experiments.{path.stem}" for path in NO_TORCH if path.parent.name == "experiments"]
    code = f"""import importlib, sys; sys.path.insert(0, {str(ROOT)!r})
for name in {names}:
    importlib.import_module(name)
    assert "torch" not in sys.modules, name"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert names
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", ["experiments", "scripts"])
def test_no_module_hides_an_installed_package(folder):
    installed = set(importlib.metadata.packages_distributions()) - PACKAGES | set(sys.stdlib_module_names)
    names = {path.stem for path in (ROOT / folder).glob("*.py")} | {
        path.parent.name for path in (ROOT / folder).glob("*/__init__.py")
    }
    assert not (names - {"__init__"}) & installed
