"""The command line of `benchmark_decode.py`."""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.cli import OneLineParser, add_dtype_and_device
from experiments.config import SetupError, at_least, unknown_name

# Written out, so that a figure can be drawn where there is no torch; a test holds that they are those of the table.
CONTENDER_NAMES = (
    "recompute", "recompute-graph", "recompute-fused", "dynamic-cache", "kvpress", "attention-sinks",
    "eager", "graph", "graph+compile", "fused", "fused-triton",
)  # fmt: skip
PEER = "attention-sinks"

EPILOG = """examples:
  the bundled demo model, whatever runs on this machine:
    python scripts/benchmark_decode.py --output results/decode.json --figures figures/decode
  sizes and kernels on a GPU, in parts of nine minutes (the same command goes on where it stopped):
    python scripts/benchmark_decode.py --model random:pythia-70m random:pythia-2.8b random:pythia-6.9b \\
        --backends math flash cudnn --cache-sizes 2048 4096 --max-seconds 540 --output decode.json
  one figure from several files:
    python scripts/benchmark_decode.py --plot-only decode.json more.json --figures figures/decode

Every contender runs the same loop on the same seeded random tokens: a prompt of the cache's size, steps that warm up,
then the steps that are timed. Repeats are interleaved (but for graph+compile, which would compile anew); figures are
medians, and the raw runs are kept. The logits of the StreamingLLM contenders are compared with those of the eager
decoder with math before anything is timed.

exit codes: 0 all is well (what cannot run here is named and skipped); 1 a contender failed; 2 something is wrong that
was found before computing; 130 interrupted."""


def build_parser(description: str) -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="benchmark_decode.py",
        description=description,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_subject(parser)
    _add_sizes(parser)
    _add_measuring(parser)
    _add_output(parser)
    return parser


def _add_subject(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is compared")
    group.add_argument(
        "--model",
        nargs="+",
        default=["demo"],
        metavar="NAME",
        help="demo (the default), random:pythia-{70m,160m,410m,1b,1.4b,2.8b,6.9b,12b}, a hub name, a local folder",
    )
    group.add_argument(
        "--contenders",
        nargs="+",
        default=None,
        metavar="NAME",
        help=f"{', '.join(CONTENDER_NAMES)}; default: all, {PEER} only with --peer-python",
    )
    group.add_argument(
        "--backends",
        "--attn-backend-list",
        dest="backends",
        nargs="+",
        default=None,
        metavar="NAME",
        help="math, flash, cudnn; default: all that run here",
    )
    group.add_argument(
        "--peer-python",
        type=Path,
        default=None,
        metavar="PATH",
        help=f"the Python (3.11 or older) of an environment with attention_sinks, einops, torch and "
        f"transformers==4.34.1, for {PEER}",
    )
    add_dtype_and_device(group)


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sizes, in tokens")
    group.add_argument(
        "--cache-sizes",
        type=int,
        nargs="+",
        default=None,
        metavar="N",
        help="sinks and window together; default: 256 for the demo model alone, else 2048",
    )
    group.add_argument("--n-sink", type=int, default=4, metavar="S", help="sinks among them; default: 4")
    group.add_argument("--batch-sizes", type=int, nargs="+", default=[1], metavar="B", help="default: 1")
    group.add_argument(
        "--prefill-lengths",
        type=int,
        nargs="+",
        default=[],
        metavar="P",
        help="also time prompts of these lengths (with the first cache size)",
    )


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how it is measured")
    group.add_argument("--steps", type=int, default=100, metavar="N", help="steps of a run; default: 100")
    group.add_argument("--warmup-steps", type=int, default=8, metavar="N", help="before them; default: 8")
    group.add_argument("--repeats", type=int, default=3, metavar="N", help="interleaved runs; default: 3")
    group.add_argument(
        "--max-run-seconds",
        type=float,
        default=5.0,
        metavar="SEC",
        help="fewer steps in a run that would take longer; default: 5",
    )
    group.add_argument(
        "--max-seconds",
        type=float,
        default=None,
        metavar="SEC",
        help="start no run after so many seconds; the same command goes on from there",
    )
    group.add_argument(
        "--overhead-rounds",
        type=int,
        default=0,
        metavar="N",
        help="also measure what an eager step costs beside the model's forward, in N rounds of single steps",
    )
    group.add_argument("--seed", type=int, default=0, help="of random weights and tokens; default: 0")


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output", type=Path, default=None, metavar="FILE", help="the JSON file to write or go on with"
    )
    group.add_argument("--figures", type=Path, default=None, metavar="DIR", help="draw figures into this folder")
    group.add_argument("--format", nargs="+", choices=("png", "pdf", "svg"), default=["png"], help="default: png")
    group.add_argument(
        "--plot-only", type=Path, nargs="+", default=None, metavar="FILE", help="measure nothing, draw these files"
    )


def check(arguments: argparse.Namespace) -> None:
    """Raise SetupError for numbers and names that cannot be."""
    lows = {"n_sink": 0, "steps": 1, "warmup_steps": 4, "repeats": 1, "overhead_rounds": 0, "seed": 0}
    for name, low in lows.items():
        at_least(f"--{name.replace('_', '-')}", getattr(arguments, name), low)
    for name, low in {"cache_sizes": arguments.n_sink + 1, "batch_sizes": 1, "prefill_lengths": 2}.items():
        for value in getattr(arguments, name) or ():
            at_least(f"--{name.replace('_', '-')}", value, low)
    for name in arguments.contenders or ():
        if name not in CONTENDER_NAMES:
            raise unknown_name("contender", name, CONTENDER_NAMES)
    if PEER in (arguments.contenders or ()) and arguments.peer_python is None:
        raise SetupError(f"contender {PEER!r} runs in a Python of its own: name it with --peer-python")
    if arguments.plot_only and arguments.figures is None:
        raise SetupError("--plot-only needs --figures, the folder to draw into")
