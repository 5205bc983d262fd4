"""The command line that all plot scripts share.

A script supplies ``draw(results) -> list[Drawing]``; this reads the results, saves what was drawn, names what is
missing, and turns all that into an exit code: 0 all is well, 1 a file is broken or foreign, 2 there is nothing to
draw from or an argument is wrong.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from . import style
from .output import FORMATS, save
from .reading import find_roots, read_results
from .records import ResultSet


@dataclass(frozen=True)
class Drawing:
    """A figure under the name of its file, with what it could not show."""

    name: str
    figure: Figure | None  # None: there was nothing to show; ``missing`` says why
    missing: tuple[str, ...] = ()


Draw = Callable[[ResultSet], list[Drawing]]


def draw_styled(draw: Draw, results: ResultSet) -> list[Drawing]:
    """Call ``draw`` with the project's style in force."""
    with mpl.rc_context(style.RC):
        return draw(results)


def main(draw: Draw, description: str, argv: Sequence[str] | None = None) -> int:
    """Run a plot script; -> its exit code."""
    args = _parser(description).parse_args(argv)
    results = load_or_explain(args.results_dir)
    if results is None:
        return 2
    drawings = draw_styled(draw, results)
    for drawing in drawings:
        if drawing.figure is not None:
            for path in save(drawing.figure, drawing.name, args.output_dir, tuple(args.format)):
                print(path)
    for line in dict.fromkeys(line for drawing in drawings for line in drawing.missing):
        print(f"missing: {line}")
    if not any(drawing.figure for drawing in drawings):
        print(f"{args.results_dir}: {results.num_files} result files, none of which this script draws")
    return report_problems(results)


def load_or_explain(folder: Path) -> ResultSet | None:
    """Read a results folder; None, and one clear line on stderr, where there is nothing to draw from."""
    if not folder.is_dir():
        print(f"error: --results-dir {folder}: no such folder", file=sys.stderr)
        return None
    results = read_results(folder)
    if results.num_files:
        return results
    report_problems(results)
    elsewhere = [str(root) for root in find_roots(folder) if root != folder]
    hint = f"; there are some in {', '.join(elsewhere)}" if elsewhere else ""
    print(f"error: --results-dir {folder}: no result files{hint}", file=sys.stderr)
    return None


def report_problems(results: ResultSet) -> int:
    """Name notices and problems on the console; -> 1 where there are problems, else 0."""
    for notice in results.notices:
        print(f"note: {notice}")
    for problem in results.problems:
        print(f"error: {problem.path}: {problem.text}; skipped", file=sys.stderr)
    return 1 if results.problems else 0


def add_output_arguments(parser: argparse.ArgumentParser, default_format: str = "png") -> None:
    """``--output-dir`` and ``--format``."""
    parser.add_argument("--output-dir", type=Path, default=Path("figures"), help="default: %(default)s")
    parser.add_argument(
        "--format", nargs="+", choices=FORMATS, default=[default_format], help="one or more; default: png"
    )


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--results-dir",
        type=Path,
        default=Path("results"),
        help="the folder that holds the result files, or the root above final/ and fixed_eval/; default: %(default)s",
    )
    add_output_arguments(parser)
    return parser
