"""The command line of `stream_chat.py`."""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.cli import MODEL, STREAM, OneLineParser, add_options
from experiments.config import SetupError, at_least
from experiments.models import RANDOM_PREFIX
from experiments.storage import check_writable

CHAT, ENDLESS = "chat", "endless"
DEFAULT_LIMITS = {CHAT: 256, ENDLESS: None}

EPILOG = """examples:
  endless text from the bundled demo model, until Ctrl-C:
    python scripts/stream_chat.py --endless --prompt "It was a dark night"
  a conversation, on a GPU:
    python scripts/stream_chat.py --model Qwen/Qwen2.5-1.5B-Instruct --attn-backend flash --decode-engine auto
  paused, and gone on with, elsewhere too:
    python scripts/stream_chat.py --endless --save story.safetensors
    python scripts/stream_chat.py --endless --resume story.safetensors --save story.safetensors

A line is a message, typed or piped in. Ctrl-C stops an answer, a second one (or Ctrl-D) the program. The model
sees the sinks and the window: what lies before is forgotten, and memory stays constant.

exit codes: 0 the conversation or the text came to its end; 1 it failed while running; 2 something is wrong that was
found before; 130 interrupted (the stream is saved where --save was given)."""


def build_parser(description: str) -> argparse.ArgumentParser:
    parser = OneLineParser("stream_chat.py", description, EPILOG)
    _add_subject(parser)
    _add_sampling(parser)
    _add_computation(parser)
    return parser


def _add_subject(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is said")
    group.add_argument(
        "--model", default="demo", metavar="NAME", help="demo (bundled; the default), a hub name, or a local folder"
    )
    group.add_argument("--endless", action="store_true", help="text without end in place of a conversation")
    group.add_argument("--prompt", default=None, metavar="TEXT", help="with --endless: how the text begins")
    group.add_argument(
        "--plain",
        action="store_true",
        help="turns as 'User: ...' and 'Assistant: ...' though the tokenizer has a chat template",
    )
    group.add_argument(
        "--max-new-tokens",
        type=int,
        default=None,
        metavar="N",
        help=f"tokens of an answer, or of the endless text; default: {DEFAULT_LIMITS[CHAT]}, or no end",
    )
    group.add_argument("--save", type=Path, default=None, metavar="FILE", help="save the stream there at the end")
    group.add_argument("--resume", type=Path, default=None, metavar="FILE", help="go on with a saved stream")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how a token is drawn")
    group.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0: the likeliest; default: 0.8")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="of the K likeliest; default: 0 (of all)")
    group.add_argument(
        "--top-p", type=float, default=0.95, metavar="P", help="of the likeliest that reach P together; default: 0.95"
    )
    group.add_argument("--seed", type=int, default=0, help="default: 0; a resumed stream goes on with its own numbers")


def _add_computation(parser: argparse.ArgumentParser) -> None:
    names, backend = ("attn_backend_list", "engine", *MODEL[1:3]), {"flags": ("--attn-backend",)}
    add_options(parser, "how it is computed", (*STREAM, *names), one=names, attn_backend_list=backend)


def check_options(options: argparse.Namespace) -> None:
    """Find what is wrong by itself; the rest is found with the model.

    Raises:
        SetupError: naming the option, its value and what is allowed.
    """
    if options.model.startswith(RANDOM_PREFIX):
        raise SetupError(f"--model {options.model}: random weights have no tokenizer, and nothing to say")
    if options.prompt is not None and not options.endless:
        raise SetupError("--prompt begins an endless text: give --endless too, or type the message")
    for name, low in {"max_new_tokens": 1, "top_k": 0, "seed": 0}.items():
        at_least(f"--{name.replace('_', '-')}", getattr(options, name), low)
    if not 0 <= options.temperature < float("inf"):
        raise SetupError(f"--temperature must be 0 or more, got {options.temperature}")
    if not 0 < options.top_p <= 1:
        raise SetupError(f"--top-p must be above 0 and at most 1, got {options.top_p}")
    if options.save is not None:
        if options.save.is_dir():
            raise SetupError(f"--save {options.save}: is a folder; name a file")
        check_writable(options.save.parent, 1 << 16)
