"""The decode loop, one token at a time: rate, time per token, first step and perplexity, backends side by side.

    python experiments/plot_decode_loop_comparison.py
    python experiments/plot_decode_loop_comparison.py --results-dir results/h100 --format pdf

Writes decode_loop_comparison. Today's results all come from the decode loop; of the older ones, those whose name
says decode_loop are drawn, as series of their own.
"""

import sys
from pathlib import Path

if not __package__:  # as a script, on a machine where the project is not installed: drawing needs no torch
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.plotting.bars import bar_figure
from experiments.plotting.captions import missing_lines
from experiments.plotting.script import Drawing, main
from experiments.plotting.table import Results

KEYS = ["decode_toks_per_sec", "tpot_ms", "first_token_latency_sec", "perplexity"]
OLDER_KEYS = ["runtime_sec"]  # what older files have in place of a time per token


def draw(results: Results) -> list[Drawing]:
    """All figures of this script."""
    cells = results.cells
    cells = cells[(cells["mode"] == "decode_loop") | ((cells["mode"] == "") & cells["stated"])]
    older = (cells["tpot_ms"].isna() & (cells["status"] == "ok")).any()
    keys = [key for key in [*KEYS, *(OLDER_KEYS if older else [])] if cells[key].notna().any()]
    figure = bar_figure(cells, keys, "The decode loop, token by token")
    return [Drawing("decode_loop_comparison", figure, missing_lines(cells, keys))]


if __name__ == "__main__":
    sys.exit(main(draw, __doc__))
