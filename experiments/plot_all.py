"""Every figure of every result, and the report: what `make results` and `make figures` run.

    python experiments/plot_all.py
    python experiments/plot_all.py --runs own
    python experiments/plot_all.py --results-dir results --output-dir figures --format png svg

A root of results (a folder with final/ or fixed_eval/) is drawn into the folder of the same name: results/h100 into
figures/h100, results/h100/pythia-2.8b into figures/h100/pythia-2.8b, and one's own results/final into figures/.
figures/report.html is about all of them, figures/<name>/report.html about those at and below results/<name>. What
reproduce_paper.py found for the project (results/<name>/paper) is drawn where it lies.
"""

import gc
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # as a script, on a machine where the project is not installed: drawing needs no torch
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.make_report import illustrate, roots_of, write_report
from experiments.plotting.captions import findings, missing_lines
from experiments.plotting.page import save
from experiments.plotting.paper_page import write_pages
from experiments.plotting.report import Run
from experiments.plotting.script import make_parser, read_or_explain


def main(argv: Sequence[str] | None = None) -> int:
    """-> exit code: 0 all is well, 1 a file is broken or foreign, 2 there are no results."""
    parser = make_parser(__doc__, "results at and below it")
    parser.add_argument(
        "--runs",
        choices=("all", "own", "project"),
        default="all",
        help="your own, those that the project shows (results/cpu, h100), or all; default: %(default)s",
    )
    args = parser.parse_args(argv)
    top, output = args.results_dir, args.output_dir
    found, code = read_or_explain(top, roots_of(top, args.runs))
    runs: dict[str, list[Run]] = {}  # by the folder right below ``top``
    for results in found:
        below = results.root.relative_to(top)
        folder = output / below
        run = illustrate(results, top, lambda drawing, to=folder: save(drawing.figure, drawing.name, to, args.format))
        runs.setdefault(below.parts[0] if below.parts else "", []).append(run)
        print(f"{results.root}: {len(run.pictures)} figures in {folder}")
        for line in missing_lines(results.cells):
            print(f"  missing: {line}")
    reports = [write_report(mine, output / name) for name, mine in runs.items() if name]
    if found and args.runs != "project":
        reports = [write_report([run for mine in runs.values() for run in mine], output)]
    papers = [folder for folder in sorted(top.glob("*/paper")) if args.runs != "own"]
    for folder in papers:
        print(f"{folder}: {len(list(write_pages(folder)))} files")
    if found:
        print(f"Open {' or '.join(map(str, reports))}: all figures and tables on one page that needs no network.")
        print(findings(found[0].cells))
    return code


if __name__ == "__main__":
    gc.set_threshold(100_000)  # a figure is many small objects that live to its end: looking for dead ones costs 5%
    sys.exit(main())
