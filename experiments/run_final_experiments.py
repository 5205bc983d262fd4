"""Perplexity and speed of StreamingLLM against other methods: method x attention backend x data set, and ablations.

python experiments/run_final_experiments.py --attn-backend-list math flash
"""

import functools
import sys
from pathlib import Path

if __name__ == "__main__":  # perhaps in a checkout that is not installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from experiments.cli import GOES_ON, MODEL, STREAM, TEXTS, OneLineParser, add_options, config_from, guarded
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


def build_parser() -> OneLineParser:
    """The command line of the full evaluation."""
    parser = OneLineParser("run_final_experiments.py", __doc__.splitlines()[0], _EXAMPLES)
    add_options(parser, "what is measured", ("model", *TEXTS, "methods"))
    add_options(parser, "sizes, in tokens", (*STREAM, "max_eval_tokens"))
    how = ("attn_backend_list", "engine", *MODEL[1:], "device_map")
    add_options(parser, "how it is computed", how)
    ablations = ("ablation_window_sizes", "ablation_n_sinks", "ablation_tokens")
    which = ("only", "repeats", "scoring", "decode_sample", "kvpress_press", *ablations)
    add_options(parser, "which experiments", which)
    add_options(parser, "output and how it is run", ("output_dir", "save_token_nll", "force", "dry_run", "progress"))
    ray = ("launcher", "ray_address", "gpus_per_cell", "cpus_per_cell", "gpu_type", "retries")
    add_options(parser, "where cells run (ray: pip install -e '.[cluster]')", ray)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    namespace = build_parser().parse_args(argv)

    def command() -> int:
        config = config_from(namespace, argv, "experiments/run_final_experiments.py")
        return ExperimentRunner(config, say=functools.partial(print, flush=True)).run().exit_code

    return guarded(command, later=GOES_ON)


if __name__ == "__main__":
    raise SystemExit(main())
