"""One page with everything: tables, figures and environments of all results at and below a folder.

    python experiments/make_report.py
    python experiments/make_report.py --results-dir results/h100 --output-dir figures/h100

Writes report.html: one file that needs no network; it sorts, filters, and follows the system's light or dark theme.
"""

import sys
from collections.abc import Callable, Sequence
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
from experiments.plotting.report import Run, build_page, picture
from experiments.plotting.script import Drawing, draw_styled, make_parser, read_or_explain
from experiments.plotting.table import Results, find_roots

# In the order in which a reader wants them.
SCRIPTS = (
    plot_stream_curves,
    plot_fixed_eval_results,
    plot_comprehensive_results,
    plot_decode_loop_comparison,
    plot_ablation_results,
)
# What the project itself shows; everything else under results/ is a user's own.
PROJECT = [Path(__file__).resolve().parents[1] / "results" / machine for machine in ("cpu", "h100")]


def roots_of(top: Path, runs: str = "all") -> list[Path]:
    """The roots of results at and below ``top``: the user's own first, then the project's; or only one of these."""
    roots = find_roots(top) or [top]
    project = [root for root in roots if any(root.resolve().is_relative_to(folder) for folder in PROJECT)]
    own = [root for root in roots if root not in project]
    return {"own": own, "project": project, "all": own + project}[runs]


def illustrate(results: Results, top: Path, save: Callable[[Drawing], None] = lambda drawing: None) -> Run:
    """Draw every figure of a root below ``top``, and ``save`` each."""
    name = results.root.relative_to(top).as_posix() if results.root != top else top.name
    pictures, missing = [], {}
    datasets = results.cells["dataset"].unique()
    for script in SCRIPTS:
        for drawing in draw_styled(script.draw, results):
            if drawing.figure is not None:  # what was not asked for (losses, another backend) is not missing
                missing |= dict.fromkeys(drawing.missing)
                save(drawing)
                pictures.append(picture(drawing, name, datasets))
    return Run(name, results, pictures, [*missing, *(f"{path.name}: {text}" for path, text in results.problems)])


def write_report(runs: Sequence[Run], folder: Path) -> Path:
    """Write the report on some runs into a folder; -> its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.html"
    path.write_text(build_page(runs), encoding="utf-8", newline="\n")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """-> exit code: 0 all is well, 1 a file is broken or foreign, 2 there are no results."""
    args = make_parser(__doc__, "results at and below it", formats=False).parse_args(argv)
    found, code = read_or_explain(args.results_dir, roots_of(args.results_dir))
    if found:
        runs = [illustrate(results, args.results_dir) for results in found]
        print(f"report: {write_report(runs, args.output_dir)}")
    return code


if __name__ == "__main__":
    sys.exit(main())
