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

from packaging.requirements import Requirement
from packaging.version import Version

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
TIMEOUT_SEC = 1800
"""For the tests of one environment."""


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


def oldest_and_newest(versions: Iterable[str], minimum: str) -> list[str]:
    """The first and last release of each minor series from ``minimum`` on, in order; pre-releases are left out."""
    known = sorted(v for v in map(Version, versions) if not v.is_prerelease and v >= Version(minimum))
    first, last = ({v.release[:2]: v for v in some} for some in (known[::-1], known))
    return [str(version) for version in sorted({*first.values(), *last.values()})]


def claimed_minimum(package: str) -> str:
    """The lower bound of ``package`` in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    [requirement] = [r for r in map(Requirement, project["dependencies"]) if r.name == package]
    [bound] = [bound.version for bound in requirement.specifier if bound.operator == ">="]
    return bound


# Environments


def _run(command: Sequence[str | Path], what: str) -> str:
    """What a command prints; raises SetupError, which says what could not be done, where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SetupError(f"{what}: {_last_line(done)}")
    return done.stdout


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
    python, made = _python(environment), environment / "complete"
    if made.exists():
        return environment
    _run([sys.executable, "-m", "venv", "--clear", environment], "no environment")
    packages = [f"transformers=={transformers}"]
    if torch:
        packages += [f"torch=={torch}", *NEEDED]
    else:  # found after the environment's own packages, so that these win
        site = _run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], "no Python").strip()
        shared = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
        Path(site, "shared.pth").write_text("\n".join(shared) + "\n", encoding="utf-8")
    _run([python, "-m", "pip", "install", "--quiet", *pip_arguments, *packages], "not installed")
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
    told = _run([_python(environment), "-c", code + "platform.python_version())"], environment.name)
    return Row(*told.split()[-3:])


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


def run_tests(environment: Path, row: Row, tests: Sequence[str], log: Path) -> None:
    """Run test files in ``environment`` and write what they said into ``row``; the output goes to ``log``."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [_python(environment), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu"]
        command += [f"--junitxml={report}", *(Path("tests", name) for name in tests)]
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=variables, timeout=TIMEOUT_SEC, capture_output=True, text=True, check=False
            )
        except subprocess.TimeoutExpired:
            row.error = f"not finished after {TIMEOUT_SEC} s"
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
    add = parser.add_argument
    add("--transformers", nargs="+", metavar="VERSION", help="versions (default: what the index has, see above)")
    add("--torch", nargs="+", metavar="VERSION", help="versions to install (default: share the own one)")
    add("--environments", nargs="+", type=Path, metavar="FOLDER", help="existing ones to use as they are")
    add("--tests", nargs="+", default=CORE_TESTS, metavar="FILE", help="files of tests/ (default: core)")
    add("--json", type=Path, metavar="PATH", help="write the results there too")
    rest = "last: for `pip install`, as --index-url ..."
    add("--pip-arguments", nargs=argparse.REMAINDER, default=[], help=rest)
    args = parser.parse_args(arguments)
    if args.environments and (args.transformers or args.torch):
        parser.error("--environments are used as they are: give no --transformers and no --torch with them")
    missing = [name for name in args.tests if not (ROOT / "tests" / name).is_file()]
    if missing:
        parser.error(f"--tests: not in tests/: {', '.join(missing)}")
    return args


def planned(args: argparse.Namespace) -> list[tuple[str, str | None]]:
    """``(transformers, torch)`` to run; ``None`` stands for the PyTorch that is installed."""
    versions = args.transformers
    if not versions:  # every one that the package index has, as pip sees it
        what = "no versions of transformers found; name them with --transformers"
        command = [sys.executable, "-m", "pip", "index", "versions", "transformers", "--disable-pip-version-check"]
        known = _run(command, what).partition("Available versions: ")[2].splitlines()[0].split(", ")
        versions = oldest_and_newest(known, claimed_minimum("transformers"))
    if not args.torch:
        return [(version, None) for version in versions]
    chosen = args.transformers or [versions[0], versions[-1]]  # each PyTorch with the ends of the range
    return [(version, torch) for torch in args.torch for version in chosen]


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    try:
        wanted = args.environments or planned(args)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = []
    for what in wanted:
        row = Row(what.name, "") if isinstance(what, Path) else Row(what[0], what[1] or "")
        name = f"{row.transformers} {row.torch}".strip()
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            environment = what if isinstance(what, Path) else make_environment(*what, args.pip_arguments)
            row = describe(environment)
            run_tests(environment, row, args.tests, HOME / f"{name.replace(' ', '-')}.log")
        except SetupError as error:
            row.error = str(error)
        rows.append(row)
    print(markdown_table(rows, args.tests))
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    if not any(row.tests for row in rows):
        return 2
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
