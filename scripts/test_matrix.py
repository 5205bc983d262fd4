#!/usr/bin/env python
"""The core tests under every version of Transformers that the project claims, each in an environment of its own.

    python scripts/test_matrix.py                              # oldest and newest release of each minor series
    python scripts/test_matrix.py --transformers 4.56.0 5.2.0  # these alone
    python scripts/test_matrix.py --environments ~/envs/*      # environments that exist; nothing is installed
    python scripts/test_matrix.py --torch 2.11.0 2.13.0        # other versions of PyTorch (large downloads)

Environments are made under .venv-matrix/ and kept. Without --torch they share the PyTorch and everything else of the
environment that runs this, and hold but Transformers and what it needs. A failure does not stop the others.
Exit code: 0 all passed, 1 something failed, 2 nothing could be run as asked.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / ".venv-matrix"
CORE_TESTS = (
    "test_positions.py",
    "test_rope_utils.py",
    "test_kv_cache.py",
    "test_wrapper.py",
    "test_generate.py",
    "test_blockwise.py",
    "test_misuse_and_overlap.py",
    "test_saving.py",
    "test_adapter.py",
    "test_adapter_ecosystem.py",
    "test_families.py",
    "test_family_limits.py",
)
"""Files of ``tests/`` that concern the library and the adapters."""

NEEDED = ("pytest", "numpy", "safetensors")
"""What the tests need beside PyTorch and Transformers, in an environment that shares nothing."""

OUTCOMES = ("passed", "failed", "skipped")


class SetupError(Exception):
    """What was asked for cannot be run."""


@dataclass
class Row:
    """One environment and what the tests said in it.

    Args:
        transformers, torch, python: versions.
        tests: file stem -> number of tests for each of ``OUTCOMES``.
        error: why there is no result, or an incomplete one.
    """

    transformers: str
    torch: str
    python: str = ""
    tests: dict[str, dict[str, int]] = field(default_factory=dict)
    error: str = ""

    @property
    def ok(self) -> bool:
        return not self.error and not any(counts["failed"] for counts in self.tests.values())


# Versions


def version_key(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def oldest_and_newest(versions: Iterable[str], minimum: str) -> list[str]:
    """The first and last release of each minor series from ``minimum`` on, in order; pre-releases are left out."""
    series: dict[tuple[int, ...], list[str]] = {}
    for version in sorted((v for v in versions if re.fullmatch(r"\d+(\.\d+)*", v)), key=version_key):
        if version_key(version) >= version_key(minimum):
            series.setdefault(version_key(version)[:2], []).append(version)
    return [version for releases in series.values() for version in dict.fromkeys((releases[0], releases[-1]))]


def claimed_minimum(package: str) -> str:
    """The lower bound of ``package`` in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for requirement in project["dependencies"]:
        found = re.fullmatch(rf"{package}\s*>=\s*([\d.]+).*", requirement)
        if found:
            return found[1]
    raise SetupError(f"pyproject.toml names no lowest version of {package}")


def released(package: str) -> list[str]:
    """Every version that the package index has, as pip sees it."""
    done = _run([sys.executable, "-m", "pip", "index", "versions", package, "--disable-pip-version-check"])
    found = re.search(r"Available versions: (.*)", done.stdout)
    if not found:
        raise SetupError(f"pip found no versions of {package}; name them with --transformers. {_last_line(done)}")
    return found[1].split(", ")


# Environments


def _run(command: Sequence[str | Path], **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"


def _python(environment: Path) -> Path:
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make_environment(transformers: str, torch: str | None, pip_arguments: Sequence[str]) -> Path:
    """An environment with these versions; ``torch=None`` shares all packages of the running one.

    Raises:
        SetupError: it cannot be made.
    """
    environment = HOME / (f"transformers-{transformers}" + (f"-torch-{torch}" if torch else ""))
    python = _python(environment)
    made = environment / "complete"
    if made.exists():
        return environment
    done = _run([sys.executable, "-m", "venv", "--clear", environment])
    if done.returncode:
        raise SetupError(f"no environment: {_last_line(done)}")
    packages = [f"transformers=={transformers}"]
    if torch:
        packages += [f"torch=={torch}", *NEEDED]
    else:  # found after the environment's own packages, so that these win
        site = _run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).stdout.strip()
        shared = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
        Path(site, "shared.pth").write_text("\n".join(shared) + "\n", encoding="utf-8")
    done = _run([python, "-m", "pip", "install", "--quiet", *pip_arguments, *packages])
    if done.returncode:
        raise SetupError(f"not installed: {_last_line(done)}")
    made.touch()
    return environment


def describe(environment: Path) -> Row:
    """The versions in an environment.

    Raises:
        SetupError: it is none, or PyTorch or Transformers does not work in it.
    """
    if not _python(environment).exists():
        raise SetupError(f"{environment} holds no Python")
    code = "import platform, torch, transformers; print(transformers.__version__, torch.__version__, "
    done = _run([_python(environment), "-c", code + "platform.python_version())"])
    if done.returncode:
        raise SetupError(f"{environment.name}: {_last_line(done)}")
    return Row(*done.stdout.split()[-3:])


# Tests


def count_outcomes(report: Path) -> dict[str, dict[str, int]]:
    """Outcomes by test file of a report in JUnit's format."""
    counts: dict[str, Counter[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        stem = (case.get("classname") or case.get("name") or "").removeprefix("tests.").split(".")[0]
        children = {child.tag for child in case}
        outcome = "failed" if children & {"failure", "error"} else "skipped" if "skipped" in children else "passed"
        counts.setdefault(stem, Counter())[outcome] += 1
    return {stem: {outcome: counter[outcome] for outcome in OUTCOMES} for stem, counter in counts.items()}


def run_tests(environment: Path, row: Row, tests: Sequence[str], timeout_sec: float, log: Path) -> None:
    """Run test files in ``environment`` and write what they said into ``row``; the output goes to ``log``."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [_python(environment), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu"]
        command += [f"--junitxml={report}", *(Path("tests", name) for name in tests)]
        try:
            done = _run(command, cwd=ROOT, env=variables, timeout=timeout_sec)
        except subprocess.TimeoutExpired:
            row.error = f"not finished after {timeout_sec:g} s"
            return
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(done.stdout + done.stderr, encoding="utf-8")
        if report.exists():
            row.tests = count_outcomes(report)
        if done.returncode not in (0, 1) or not report.exists():
            row.error = _last_line(done)


def markdown_table(rows: Sequence[Row], tests: Sequence[str]) -> str:
    """Versions x test files: tests that passed, of those that ran where some failed, and those skipped."""
    stems = [Path(name).stem for name in tests]
    heads = ["transformers", "torch", "python", *(stem.removeprefix("test_") for stem in stems)]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row in rows:
        cells = [row.transformers, row.torch, row.python, *(_cell(row.tests.get(stem)) for stem in stems)]
        lines.append("| " + " | ".join(cells) + " |" + (f" {row.error}" if row.error else ""))
    return "\n".join(lines)


def _cell(counts: dict[str, int] | None) -> str:
    if counts is None:
        return "-"
    text = str(counts["passed"])
    if counts["failed"]:
        text += f" of {counts['passed'] + counts['failed']}: **{counts['failed']} failed**"
    return text + (f" ({counts['skipped']} skipped)" if counts["skipped"] else "")


# Command line


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to run")
    what.add_argument(
        "--transformers", nargs="+", metavar="VERSION", help="versions (default: what the index has, see above)"
    )
    what.add_argument("--torch", nargs="+", metavar="VERSION", help="versions to install (default: share the own one)")
    what.add_argument(
        "--environments", nargs="+", type=Path, metavar="FOLDER", help="existing ones to use as they are"
    )
    what.add_argument("--tests", nargs="+", default=CORE_TESTS, metavar="FILE", help="files of tests/ (default: core)")
    how = parser.add_argument_group("how")
    how.add_argument("--list", action="store_true", help="say what would run, and stop")
    how.add_argument("--json", type=Path, metavar="PATH", help="write the results there too")
    how.add_argument("--timeout", type=float, default=1800, metavar="SEC", help="for the tests of one environment")
    how.add_argument(
        "--pip-arguments",
        nargs=argparse.REMAINDER,
        default=[],
        help="last: for `pip install`, as --index-url ...",
    )
    args = parser.parse_args(arguments)
    if args.environments and (args.transformers or args.torch):
        parser.error("--environments are used as they are: give no --transformers and no --torch with them")
    missing = [name for name in args.tests if not (ROOT / "tests" / name).is_file()]
    if missing:
        parser.error(f"--tests: not in tests/: {', '.join(missing)}")
    return args


def planned(args: argparse.Namespace) -> list[tuple[str, str | None]]:
    """``(transformers, torch)`` to run; ``None`` stands for the PyTorch that is installed."""
    versions = args.transformers or oldest_and_newest(released("transformers"), claimed_minimum("transformers"))
    if not args.torch:
        return [(version, None) for version in versions]
    chosen = args.transformers or [versions[0], versions[-1]]  # each PyTorch with the ends of the range
    return [(version, torch) for torch in args.torch for version in chosen]


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    rows: list[Row] = []
    try:
        cells = [(folder.name, folder) for folder in args.environments or ()]
        if not cells:
            cells = [(f"transformers {t}" + (f", torch {p}" if p else ""), (t, p)) for t, p in planned(args)]
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, what in cells:
        if args.list:
            print(name)
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        row = Row(name, "") if isinstance(what, Path) else Row(what[0], what[1] or "")
        try:
            environment = what if isinstance(what, Path) else make_environment(*what, args.pip_arguments)
            row = describe(environment)
            run_tests(environment, row, args.tests, args.timeout, HOME / f"{name.replace(' ', '-')}.log")
        except SetupError as error:
            row.error = str(error)
        rows.append(row)
    if args.list:
        return 0
    print(markdown_table(rows, args.tests))
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    if not any(row.tests for row in rows):
        return 2
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
