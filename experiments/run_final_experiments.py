"""Perplexity and speed of StreamingLLM against other methods: method x attention backend x data set, and ablations.

python experiments/run_final_experiments.py --attn-backend-list math flash
"""

import argparse
import functools
import sys

from experiments.cli import (
    OneLineParser,
    add_evaluation_options,
    add_kernel_options,
    add_output_options,
    add_size_options,
    add_subject_options,
    config_from,
    guarded,
)
from experiments.config import ExperimentConfig
from experiments.runner import ExperimentRunner, RunSummary

__all__ = ["ExperimentConfig", "ExperimentRunner", "RunSummary", "main"]

_EXAMPLES = """examples:
  the bundled demo, both attention kernels (minutes on a CPU):
    python experiments/run_final_experiments.py --attn-backend-list math flash
  the real thing, on a GPU:
    python experiments/run_final_experiments.py --model EleutherAI/pythia-2.8b --datasets wikitext pg19 \\
        --attn-backend-list math flash --repeats 3
  a text of your own, every method, with each token's loss kept:
    python experiments/run_final_experiments.py --datasets book.txt --max-eval-tokens 4096 \\
        --methods baseline streaming kvpress window dense --only main --save-token-nll
  speed alone, with random weights of a known size:
    python experiments/run_final_experiments.py --model random:pythia-2.8b --attn-backend-list math flash --only main

exit codes: 0 all is well; 1 a cell failed (its reason is in the result file); 2 something is wrong that was found
before computing; 130 interrupted. Interrupted or killed, the same command goes on where it stopped."""


def build_parser() -> argparse.ArgumentParser:
    """The command line of the full evaluation."""
    parser = OneLineParser(
        prog="run_final_experiments.py",
        description=__doc__.splitlines()[0],
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_subject_options(parser, several=True)
    add_size_options(parser)
    add_kernel_options(parser, several=True)
    add_evaluation_options(parser)
    add_output_options(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    namespace = build_parser().parse_args(argv)

    def command() -> int:
        config = config_from(namespace, argv, "experiments/run_final_experiments.py")
        return ExperimentRunner(config, say=functools.partial(print, flush=True)).run().exit_code

    return guarded(command)


if __name__ == "__main__":
    raise SystemExit(main())
