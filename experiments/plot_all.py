"""Every figure of every result, and the report: what `make figures` runs.

    python experiments/plot_all.py
    python experiments/plot_all.py --results-dir results --output-dir figures --format png svg

A root of results (a folder with final/ or fixed_eval/) is drawn into the folder of the same name: results/h200 into
figures/h200, results/h200/pythia-2.8b into figures/h200/pythia-2.8b, and one's own results/final into figures/.
figures/report.html is about all of them, figures/<name>/report.html about those at and below results/<name>.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # as a script, on a machine where the project is not installed: drawing needs no torch
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.make_report import Illustrated, illustrate, make_page, read_or_explain, write_page
from experiments.plotting.output import save
from experiments.plotting.report_data import Run
from experiments.plotting.script import add_output_arguments


def save_all(item: Illustrated, top: Path, output: Path, formats: tuple[str, ...]) -> None:
    """Write a run's figures into the folder that corresponds to its own."""
    root = item.run.results.root
    folder = output / root.relative_to(top)
    drawn = [drawing for drawing in item.drawings if drawing.figure is not None]
    for drawing in drawn:
        save(drawing.figure, drawing.name, folder, formats)
    print(f"{root}: {len(drawn)} figures in {folder}")
    for line in item.missing:
        print(f"  missing: {line}")


def write_reports(items: Sequence[Illustrated], top: Path, output: Path) -> Path:
    """The report on everything, and one for each folder right below ``top``; -> the path of the first."""
    names = [_first_part(item.run, top) for item in items]
    for name in dict.fromkeys(filter(None, names)):
        mine = [item for item, first in zip(items, names, strict=True) if first == name]
        write_page(make_page(mine), output / name)
    return write_page(make_page(items), output)


def _first_part(run: Run, top: Path) -> str:
    parts = run.results.root.relative_to(top).parts
    return parts[0] if parts else ""


def main(argv: Sequence[str] | None = None) -> int:
    """-> exit code: 0 all is well, 1 a file is broken or foreign, 2 there are no results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--results-dir", type=Path, default=Path("results"), help="results at and below it; default: %(default)s"
    )
    add_output_arguments(parser)
    args = parser.parse_args(argv)
    runs, code = read_or_explain(args.results_dir)
    if not runs:
        return code
    items = [illustrate(run) for run in runs]
    for item in items:
        save_all(item, args.results_dir, args.output_dir, tuple(args.format))
    path = write_reports(items, args.results_dir, args.output_dir)
    print(f"report: {path}")
    return code


if __name__ == "__main__":
    sys.exit(main())
