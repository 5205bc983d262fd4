"""The options that the command lines share, and how a command line ends: messages and exit codes."""

import argparse
import shlex
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from experiments.config import DTYPES, EXPERIMENTS, SCORINGS, ExperimentConfig, SetupError
from experiments.storage import SaveError

EXIT_FAILED, EXIT_SETUP, EXIT_INTERRUPTED = 1, 2, 130


class OneLineParser(argparse.ArgumentParser):
    """A parser that answers a wrong command line with one line, as everything else is answered here."""

    def error(self, message: str):
        print(f"error: {message} (--help lists the options)", file=sys.stderr)
        raise SystemExit(EXIT_SETUP)


def add_subject_options(parser: argparse.ArgumentParser, several: bool) -> None:
    """--model, data sets and methods: what is measured. `several`: lists of them, else one of each."""
    group = parser.add_argument_group("what is measured")
    many = {"nargs": "+"} if several else {}
    group.add_argument(
        "--model",
        default="demo",
        metavar="NAME",
        **many,
        help="demo (bundled; the default), a hub name such as EleutherAI/pythia-2.8b, a local folder, a .gguf file, "
        "or random:<size> such as random:pythia-2.8b (random weights: speed only)",
    )
    group.add_argument(
        *(["--datasets"] if several else ["--dataset", "--datasets"]),
        dest="datasets",
        default=None,
        metavar="NAME",
        **many,
        help="demo_encyclopaedia, demo_narrative (bundled), wikitext (WikiText-103 test), pg19 (PG19 "
        "test), or the path of a .txt, .json or .jsonl file (key 'text'); default: "
        + ("both bundled texts; " if several else "demo_encyclopaedia; ")
        + "random_tokens for random weights",
    )
    if several:
        group.add_argument(
            "--methods",
            nargs="+",
            default=None,
            metavar="NAME",
            help="baseline, streaming, kvpress, window, dense; default: baseline streaming kvpress, "
            "the last skipped where it is not installed",
        )


def add_dtype_and_device(group: argparse._ArgumentGroup) -> None:
    """Where a model runs and in what."""
    group.add_argument(
        "--dtype",
        default=None,
        metavar="NAME",
        help=f"{', '.join(DTYPES)}; default: bfloat16 on a GPU that has it, float32 on a CPU",
    )
    group.add_argument("--device", default=None, help="cpu, cuda, cuda:1, ...; default: cuda where there is one")


def add_cache_sizes(group: argparse._ArgumentGroup) -> None:
    """What a stream keeps."""
    group.add_argument("--n-sink", type=int, default=None, metavar="S", help="sinks kept; default: 4")
    group.add_argument(
        "--window-size",
        type=int,
        default=None,
        metavar="W",
        help="recent tokens kept, sinks excluded; default: 252 for the demo model, else what fills the "
        "model's context with the sinks, up to 2048 together",
    )


def add_kernel_options(parser: argparse.ArgumentParser, several: bool) -> None:
    """Attention backends, dtype and device."""
    group = parser.add_argument_group("how it is computed")
    many = {"nargs": "+"} if several else {}
    group.add_argument(
        *(["--attn-backend-list"] if several else ["--attn-backend", "--attn-backend-list"]),
        dest="attn_backend_list",
        default=None,
        metavar="NAME",
        **many,
        help="math, flash, cudnn (CUDA only), or auto (flash where it runs, else math); default: what "
        "FLASH_SDPA says (1 flash, 0 math), else math",
    )
    add_dtype_and_device(group)
    group.add_argument(
        "--decode-engine",
        default="eager",
        metavar="NAME",
        help="how a decode step runs, with every method that can: eager (the plain model call; default), graph (one "
        "CUDA graph), fused (a CUDA graph of fused kernels), auto (the best that runs here)",
    )
    group.add_argument("--seed", type=int, default=0, help="for random weights and tokens; default: 0")


def add_size_options(parser: argparse.ArgumentParser) -> None:
    """Cache sizes and text length."""
    group = parser.add_argument_group("sizes, in tokens")
    add_cache_sizes(group)
    group.add_argument(
        "--max-eval-tokens",
        type=int,
        default=None,
        metavar="N",
        help="tokens of each text; default: 768 for the demo model, else 4096",
    )


def add_evaluation_options(parser: argparse.ArgumentParser) -> None:
    """Scoring, repeats, ablations: what only the full evaluation has."""
    group = parser.add_argument_group("which experiments")
    group.add_argument(
        "--only", nargs="+", default=list(EXPERIMENTS), metavar="NAME", help=f"{', '.join(EXPERIMENTS)}; default: all"
    )
    group.add_argument(
        "--repeats",
        type=int,
        default=1,
        metavar="N",
        help="runs of each cell, interleaved; figures are medians; default: 1",
    )
    group.add_argument(
        "--scoring",
        default="decode",
        metavar="NAME",
        help=f"{', '.join(SCORINGS)}: perplexity from the token loop (default), or block-parallel over "
        "the whole text, with the speed from a decode sample; ablations always use parallel",
    )
    group.add_argument(
        "--decode-sample",
        type=int,
        default=128,
        metavar="N",
        help="decode steps timed under parallel scoring; default: 128",
    )
    group.add_argument(
        "--kvpress-press",
        default="streaming_llm",
        metavar="NAME",
        help="the press of kvpress: streaming_llm (default), knorm, keydiff, random, lagkv, cur; tova, "
        "expected_attention, cap on Llama-like models",
    )
    group.add_argument(
        "--ablation-window-sizes",
        type=int,
        nargs="+",
        default=None,
        metavar="W",
        help="default: the five largest powers of two up to the model's context",
    )
    group.add_argument(
        "--ablation-n-sinks",
        type=int,
        nargs="+",
        default=None,
        metavar="S",
        help="default: 0 1 2 4 8 16; the cache size stays the same",
    )
    group.add_argument(
        "--ablation-tokens",
        type=int,
        default=None,
        metavar="N",
        help="tokens of the text (the first data set) that ablations score; default: 4096 or more",
    )


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Where results go and what is run again."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output-dir",
        type=Path,
        default=Path("results"),
        metavar="DIR",
        help="default: results; a model other than the demo has a folder of its own in it",
    )
    group.add_argument(
        "--save-token-nll",
        action="store_true",
        help="keep each token's loss: <stem>.<method>.nll.npz beside the main files",
    )
    group.add_argument("--force", action="store_true", help="run cells again that are finished already")
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="print the plan, what is already there and an estimate of the time; compute nothing",
    )
    group.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bars")


def config_from(namespace: argparse.Namespace, argv: list[str], program: str) -> ExperimentConfig:
    """The configuration that a parsed command line asks for."""
    known = {item.name for item in fields(ExperimentConfig)}
    given = {name: value for name, value in vars(namespace).items() if name in known}
    return ExperimentConfig(**given, command=shlex.join(["python", program, *argv]))


def guarded(command: Callable[[], int]) -> int:
    """Run a command and turn what can go wrong into one line on stderr and an exit code."""
    try:
        return command()
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_SETUP
    except SaveError as error:
        print(f"error: {error}; finished cells are kept, the same command goes on from there", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
