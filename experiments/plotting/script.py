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
from .page import FORMATS, save
from .table import Results, find_roots, read_results


@dataclass(frozen=True)
class Drawing:
    """A figure under the name of its file, with what it could not show."""

    name: str
    figure: Figure | None  # None: there was nothing to show; ``missing`` says why
    missing: Sequence[str] = ()


Draw = Callable[[Results], list[Drawing]]


def draw_styled(draw: Draw, results: Results) -> list[Drawing]:
    """Call ``draw`` with the project's style in force."""
    with mpl.rc_context(style.RC):
        return draw(results)


def main(draw: Draw, about: str, argv: Sequence[str] | None = None) -> int:
    """Run a plot script, whose docstring is ``about``; -> its exit code."""
    parser = make_parser(about, "the folder that holds the result files, or the root above final/ and fixed_eval/")
    args = parser.parse_args(argv)
    found, code = read_or_explain(args.results_dir, [args.results_dir])
    for results in found:
        drawings = draw_styled(draw, results)
        for drawing in drawings:
            if drawing.figure is not None:
                for path in save(drawing.figure, drawing.name, args.output_dir, args.format):
                    print(path)
        for line in dict.fromkeys(line for drawing in drawings for line in drawing.missing):
            print(f"missing: {line}")
        if not any(drawing.figure for drawing in drawings):
            print(f"{args.results_dir}: {results.num_files} result files, none of which this script draws")
    return code


def read_or_explain(top: Path, roots: Sequence[Path]) -> tuple[list[Results], int]:
    """Read roots of results at or below ``top``, and name what is wrong with their files on the console.

    Returns:
        The roots' results, and the exit code: 1 where a file is broken or foreign. No results, 2 and one clear line
        where there are none.
    """
    results = [read_results(root) for root in roots if root.is_dir()]
    for notice in (notice for one in results for notice in one.notices):
        print(f"note: {notice}")
    problems = [problem for one in results for problem in one.problems]
    for path, text in problems:
        print(f"error: {path}: {text}; skipped", file=sys.stderr)
    found = [one for one in results if one.num_files]
    if found:
        return found, 1 if problems else 0
    elsewhere = ", ".join(str(root) for root in find_roots(top) if root not in roots)
    why = "no result files" + (f"; there are some in {elsewhere}" if elsewhere else "")
    print(f"error: --results-dir {top}: {why if top.is_dir() else 'no such folder'}", file=sys.stderr)
    return [], 2


def make_parser(about: str, results_help: str, formats: bool = True) -> argparse.ArgumentParser:
    """A parser that takes ``--results-dir``, ``--output-dir`` and, where figures are written, ``--format``.

    Args:
        about: The script's docstring: its first line stands above the options, the rest below them.
    """
    first, _, rest = about.partition("\n\n")
    look = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=first, epilog=rest.rstrip(), formatter_class=look)
    parser.add_argument("--results-dir", type=Path, default=Path("results"), help=f"{results_help}; default: results")
    parser.add_argument("--output-dir", type=Path, default=Path("figures"), help="default: %(default)s")
    if formats:
        parser.add_argument("--format", nargs="+", choices=FORMATS, default=["png"], help="one or more; default: png")
    return parser
