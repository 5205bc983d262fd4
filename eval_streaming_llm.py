"""Baseline against StreamingLLM: one model, one data set, perplexity and speed side by side.

FLASH_SDPA=1 python eval_streaming_llm.py
"""

import sys
from pathlib import Path

from experiments.cli import MODEL, STREAM, TEXTS, OneLineParser, add_options, config_from, guarded
from experiments.config import ExperimentConfig, SetupError
from experiments.runner import ExperimentRunner
from experiments.storage import check_writable, write_json

_EXAMPLES = """examples:
  the bundled demo:
    python eval_streaming_llm.py
    FLASH_SDPA=1 python eval_streaming_llm.py
  the real thing, on a GPU:
    python eval_streaming_llm.py --model EleutherAI/pythia-2.8b --dataset wikitext --attn-backend flash
  a text of your own, with the result kept:
    python eval_streaming_llm.py --dataset book.txt --max-eval-tokens 2048 --output book.json

All methods, several data sets and backends, ablations: experiments/run_final_experiments.py"""


def build_parser() -> OneLineParser:
    """The command line of the comparison."""
    parser = OneLineParser("eval_streaming_llm.py", __doc__.splitlines()[0], _EXAMPLES)
    about = "demo_encyclopaedia (the default), or another that experiments/run_final_experiments.py takes"
    one, dataset = ("model", "datasets", "attn_backend_list"), {"flags": ("--dataset", "--datasets"), "help": about}
    add_options(parser, "what is measured", ("model", *TEXTS), one, datasets=dataset)
    add_options(parser, "sizes, in tokens", (*STREAM, "max_eval_tokens"))
    backend = {"flags": ("--attn-backend", "--attn-backend-list")}
    how = ("attn_backend_list", "engine", *MODEL[1:], "device_map")
    add_options(parser, "how it is computed", how, one, attn_backend_list=backend)
    group = add_options(parser, "output", ("repeats", "progress"))
    group.add_argument("--output", type=Path, metavar="FILE", help="also write the result as JSON")
    return parser


def compare(config: ExperimentConfig, output: Path | None) -> int:
    """Run and print the comparison, and write it as a main result file where `output` says so."""
    if output is not None:
        if output.exists():
            raise SetupError(f"--output {output}: there is such a file already; nothing is overwritten")
        check_writable(output.parent, 2**16)
    summary = ExperimentRunner(config).run()
    if output is not None:
        [[result]] = [outcome.main for outcome in summary.outcomes.values()]
        write_json(output, result)
        print(f"wrote: {output}")
    return summary.exit_code


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    namespace = build_parser().parse_args(argv)

    def command() -> int:
        fixed = {"methods": ("baseline", "streaming"), "only": "main", "output_dir": None}
        if namespace.datasets is None and not str(namespace.model).startswith("random:"):
            fixed["datasets"] = "demo_encyclopaedia"
        return compare(config_from(namespace, argv, "eval_streaming_llm.py", **fixed), namespace.output)

    return guarded(command)


if __name__ == "__main__":
    raise SystemExit(main())
