"""One page with everything: tables, figures and environments of all results at and below a folder.

    python experiments/make_report.py
    python experiments/make_report.py --results-dir results/h200 --output-dir figures/h200

Writes report.html: one file that needs no network; it sorts, filters, and follows the system's light or dark theme.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # as a script, on a machine where the project is not installed: drawing needs no torch
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import (
    plot_ablation_results,
    plot_comprehensive_results,
    plot_decode_loop_comparison,
    plot_fixed_eval_results,
    plot_stream_curves,
)
from experiments.plotting.reading import find_roots, read_results
from experiments.plotting.report_data import Run
from experiments.plotting.report_page import Picture, build_page
from experiments.plotting.report_svg import inline_svg
from experiments.plotting.script import Drawing, draw_styled, report_problems
from experiments.plotting.series import safe_name, sorted_datasets
from experiments.plotting.style import WIDTH_IN

# In the order in which a reader wants them.
SCRIPTS = (
    plot_stream_curves,
    plot_fixed_eval_results,
    plot_comprehensive_results,
    plot_decode_loop_comparison,
    plot_ablation_results,
)
FILE_NAME = "report.html"


def read_runs(top: Path) -> list[Run]:
    """All results at and below ``top``, named by their folder; files that could not be read are in there too."""
    roots = find_roots(top) or [top]
    return [Run(root.relative_to(top).as_posix() if root != top else top.name, read_results(root)) for root in roots]


def read_or_explain(top: Path) -> tuple[list[Run], int]:
    """-> the runs that hold results, and the exit code so far; no runs, and one clear line, where there are none."""
    if not top.is_dir():
        print(f"error: --results-dir {top}: no such folder", file=sys.stderr)
        return [], 2
    runs = read_runs(top)
    code = max(report_problems(run.results) for run in runs)
    runs = [run for run in runs if run.results.num_files]
    if not runs:
        print(f"error: --results-dir {top}: no result files there or below", file=sys.stderr)
        return [], 2
    return runs, code


@dataclass(frozen=True)
class Illustrated:
    """A run with its figures: drawn, and as the page takes them."""

    run: Run
    drawings: tuple[Drawing, ...]
    pictures: tuple[Picture, ...]

    @property
    def missing(self) -> list[str]:
        """What no figure could show."""
        return list(dict.fromkeys(line for drawing in self.drawings for line in drawing.missing))


def illustrate(run: Run) -> Illustrated:
    """Draw every figure of a run."""
    drawings = tuple(drawing for script in SCRIPTS for drawing in draw_styled(script.draw, run.results))
    datasets = {f"comprehensive_{safe_name(d)}": safe_name(d) for d in sorted_datasets(run.results.records)}
    pictures = []
    for drawing in drawings:
        if drawing.figure is not None:
            prefix = f"{safe_name(run.name)}-{drawing.name}-"
            svg = inline_svg(drawing.figure, prefix, drawing.name.replace("_", " "))
            wide = drawing.figure.get_size_inches()[0] > WIDTH_IN
            pictures.append(Picture(run.name, drawing.name, svg, datasets.get(drawing.name, ""), wide))
    return Illustrated(run, drawings, tuple(pictures))


def make_page(items: Sequence[Illustrated]) -> str:
    """The report on some runs."""
    missing = [(item.run.name, line) for item in items for line in item.missing]
    for item in items:
        missing += [(item.run.name, f"{problem.path.name}: {problem.text}") for problem in item.run.results.problems]
    return build_page([item.run for item in items], [p for item in items for p in item.pictures], missing)


def main(argv: Sequence[str] | None = None) -> int:
    """-> exit code: 0 all is well, 1 a file is broken or foreign, 2 there are no results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--results-dir", type=Path, default=Path("results"), help="results at and below it; default: %(default)s"
    )
    parser.add_argument("--output-dir", type=Path, default=Path("figures"), help="default: %(default)s")
    args = parser.parse_args(argv)
    runs, code = read_or_explain(args.results_dir)
    if not runs:
        return code
    path = write_page(make_page([illustrate(run) for run in runs]), args.output_dir)
    print(f"report: {path}")
    return code


def write_page(page: str, folder: Path) -> Path:
    """Write the report into a folder; -> its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE_NAME
    path.write_text(page, encoding="utf-8", newline="\n")
    return path


if __name__ == "__main__":
    sys.exit(main())
