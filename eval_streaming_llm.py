"""Baseline against StreamingLLM: one model, one data set, perplexity and speed side by side.

FLASH_SDPA=1 python eval_streaming_llm.py
"""

import argparse
import sys
from pathlib import Path

from experiments.cli import (
    OneLineParser,
    add_kernel_options,
    add_size_options,
    add_subject_options,
    config_from,
    guarded,
)
from experiments.comparison import run_comparison

_EXAMPLES = """examples:
  the bundled demo:
    python eval_streaming_llm.py
    FLASH_SDPA=1 python eval_streaming_llm.py
  the real thing, on a GPU:
    python eval_streaming_llm.py --model EleutherAI/pythia-2.8b --dataset wikitext --attn-backend flash
  a text of your own, with the result kept:
    python eval_streaming_llm.py --dataset book.txt --max-eval-tokens 2048 --output book.json

All methods, several data sets and backends, ablations: experiments/run_final_experiments.py"""


def build_parser() -> argparse.ArgumentParser:
    """The command line of the comparison."""
    parser = OneLineParser(
        prog="eval_streaming_llm.py",
        description=__doc__.splitlines()[0],
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_subject_options(parser, several=False)
    add_size_options(parser)
    add_kernel_options(parser, several=False)
    group = parser.add_argument_group("output")
    group.add_argument("--repeats", type=int, default=1, metavar="N", help="interleaved runs; default: 1")
    group.add_argument("--output", type=Path, default=None, metavar="FILE", help="also write the result as JSON")
    group.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bars")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    namespace = build_parser().parse_args(argv)
    return guarded(lambda: run_comparison(config_from(namespace, argv, "eval_streaming_llm.py"), namespace.output))


if __name__ == "__main__":
    raise SystemExit(main())
