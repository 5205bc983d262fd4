"""The command line of `score_long.py`."""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.cli import OneLineParser, add_cache_sizes, add_dtype_and_device

EPILOG = """examples:
  a book with the bundled demo model:
    python scripts/score_long.py --datasets book.txt --output book.json
  a shelf of books on a GPU, with a check that the curve is flat:
    python scripts/score_long.py --datasets books.txt.xz --max-tokens 4000000 --attn-backend flash \\
        --fresh-tail 0.1 --output books.json
  the real thing:
    python scripts/score_long.py --model EleutherAI/pythia-2.8b --datasets pg19 --output pg19.json
  speed alone:
    python scripts/score_long.py --model random:pythia-2.8b --max-tokens 1000000 --output speed.json

Documents (files, the records of a .json or .jsonl file, what the character U+001C separates in a .txt file) are
tokenised one by one and joined in order as they come, with nothing in between: one stream. What the tokenizer puts
in front of a text stands at the very start of the stream only, unless --bos-per-document.

exit codes: 0 all is well; 1 it failed while running; 2 something is wrong that was found before computing; 130
interrupted. Interrupted or killed, the same command goes on from the last checkpoint (in OUTPUT.resume), and gives
the same result."""


def build_parser(description: str) -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="score_long.py",
        description=description,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_subject(parser)
    _add_computation(parser)
    _add_output(parser)
    return parser


def _add_subject(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is scored")
    group.add_argument(
        "--model",
        default="demo",
        metavar="NAME",
        help="demo (bundled; the default), a hub name, a local folder, or random:<size> such as random:pythia-2.8b "
        "(random weights: speed only)",
    )
    group.add_argument(
        "--datasets",
        "--dataset",
        dest="datasets",
        nargs="+",
        default=None,
        metavar="NAME",
        help="demo_encyclopaedia, demo_narrative (bundled), wikitext (WikiText-103 test), pg19 (PG19 test), a .txt, "
        ".json or .jsonl file (key 'text'), one of these compressed as .xz, or a folder of them; several make one "
        "stream; default: demo_encyclopaedia; random_tokens for random weights",
    )
    group.add_argument("--max-tokens", type=int, default=None, metavar="N", help="default: the whole text")
    group.add_argument(
        "--bos-per-document",
        action="store_true",
        help="put the beginning-of-sequence token before each document (default: at the very start alone)",
    )
    group.add_argument(
        "--fresh-tail",
        type=float,
        default=None,
        metavar="FRACTION",
        help="also score the last FRACTION of the stream as a fresh stream, to tell drift from difficult text",
    )


def _add_computation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how it is computed")
    add_cache_sizes(group)
    group.add_argument(
        "--block-size", type=int, default=None, metavar="N", help="tokens at a time; default: suits device and window"
    )
    group.add_argument(
        "--attn-backend",
        default=None,
        metavar="NAME",
        help="math, flash, or auto (flash where it runs, else math); default: what FLASH_SDPA says (1 flash, 0 math), "
        "else math",
    )
    add_dtype_and_device(group)
    group.add_argument("--seed", type=int, default=0, help="for random weights and tokens; default: 0")


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--output", type=Path, required=True, metavar="FILE.json", help="the result")
    group.add_argument(
        "--save-token-nll",
        action="store_true",
        help="keep each token's loss: <stem>.streaming.nll.npz (nll, position) beside the result",
    )
    group.add_argument(
        "--checkpoint-every",
        type=float,
        default=120.0,
        metavar="SEC",
        help="seconds between checkpoints; 0: after each block; default: 120",
    )
    group.add_argument("--force", action="store_true", help="start anew, whatever checkpoint or result there is")
    group.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bar")
