"""Talk with a model for as long as you like, or let it write without end, in constant memory.

python scripts/stream_chat.py --endless
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # perhaps in a checkout that is not installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from experiments.chat.talk import Talk, note, say
from experiments.chat.tokens import Turns
from experiments.cli import EXIT_INTERRUPTED, MODEL, STREAM, OneLineParser, add_options, config_from, guarded
from experiments.config import SetupError, at_least
from experiments.model_setup import Subject, make_decoder, set_up, weights_fingerprint
from experiments.storage import check_writable
from streaming_llm import StreamingDecoder, read_metadata
from streaming_llm.sampling import Sampling

KEY = "stream_chat"

EPILOG = """examples:
  a conversation with a model of the hub, on a GPU:
    python scripts/stream_chat.py --model Qwen/Qwen2.5-1.5B-Instruct --attn-backend flash
  the same with instructions, which are kept for good where they are among the sinks:
    python scripts/stream_chat.py --model Qwen/Qwen2.5-1.5B-Instruct --system "Answer in one sentence." --n-sink 32
  endless text from the bundled demo model, until Ctrl-C; paused, and gone on with, elsewhere too:
    python scripts/stream_chat.py --endless --prompt "It was a dark night" --save story.safetensors
    python scripts/stream_chat.py --endless --resume story.safetensors --save story.safetensors

A line is a message, typed or piped in. Ctrl-C stops an answer, a second one (or Ctrl-D) the program. The model
sees the sinks and the window: what lies before is forgotten, and memory stays constant.

exit codes: 0 the conversation or the text came to its end; 1 it failed while running; 2 something is wrong that was
found before; 130 interrupted (the stream is saved where --save was given)."""


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser("stream_chat.py", __doc__.splitlines()[0], EPILOG)
    add = parser.add_argument_group("what is said").add_argument
    add("--endless", action="store_true", help="text without end in place of a conversation")
    add("--prompt", metavar="TEXT", help="with --endless: how the text begins")
    add("--system", metavar="TEXT", help="instructions before the first message; default: the chat template's own")
    add("--plain", action="store_true", help="turns as 'User: ...' and 'Assistant: ...', without the chat template")
    add("--max-new-tokens", type=int, metavar="N", help="of an answer (default: 256), or of the endless text (no end)")
    add("--save", type=Path, metavar="FILE", help="save the stream there at the end")
    add("--resume", type=Path, metavar="FILE", help="go on with a saved stream")
    add = parser.add_argument_group("how a token is drawn").add_argument
    add("--temperature", type=float, default=0.8, metavar="T", help="0: the likeliest; default: 0.8")
    add("--top-k", type=int, default=0, metavar="K", help="of the K likeliest; default: 0 (of all)")
    add("--top-p", type=float, default=0.95, metavar="P", help="of the likeliest with P together; default: 0.95")
    names, backend = (*MODEL, *STREAM, "attn_backend_list", "engine"), {"flags": ("--attn-backend",)}
    seed = {"help": "default: 0; a resumed stream goes on with its own random numbers"}
    add_options(parser, "how it is computed", names, one=names, attn_backend_list=backend, seed=seed)
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Find what is wrong by itself, before the model is loaded; raises SetupError."""
    if options.prompt is not None and not options.endless:
        raise SetupError("--prompt begins an endless text: give --endless too, or type the message")
    if options.system is not None and (options.endless or options.resume):
        raise SetupError("--system begins a conversation: it goes with neither --endless nor --resume")
    at_least("--max-new-tokens", options.max_new_tokens, 1)
    try:
        Sampling(**controls(options))
    except ValueError as error:
        raise SetupError(f"--{str(error).replace('_', '-')}") from None
    if options.save is not None:
        if options.save.is_dir():
            raise SetupError(f"--save {options.save}: is a folder; name a file")
        check_writable(options.save.parent, 1 << 16)


def controls(options: argparse.Namespace) -> dict[str, Any]:
    """How a token is drawn, as the library calls it."""
    top_p = options.top_p if options.top_p != 1 else None
    return {"temperature": options.temperature, "top_k": options.top_k or None, "top_p": top_p}


def make_talk(options: argparse.Namespace, subject: Subject, decoder: StreamingDecoder, notes: dict) -> Talk:
    """A talk at its beginning, or where ``notes`` say."""
    model, tokenizer = subject.loaded.model, subject.loaded.tokenizer
    start = list(subject.beginning.start)
    turns = None if options.endless else Turns(tokenizer, start, options.plain, options.system)
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id, turns and turns.end_id]
    limit = options.max_new_tokens or (None if options.endless else 256)
    # A file's random numbers cannot be gone on with on another kind of device.
    seed = None if notes.get("device") == model.device.type else options.seed
    ends = [token for token in dict.fromkeys(ends) if token is not None]
    talk = Talk(decoder, tokenizer, turns, start, ends, limit, controls(options) | {"seed": seed})
    if notes:
        talk.place, talk.partial = notes["place"], notes["partial"]
    return talk


# Saved talk


def mode_of(options: argparse.Namespace) -> str:
    """What a stream is gone on with as it was begun."""
    return "with --endless" if options.endless else "with --plain" if options.plain else "without --endless or --plain"


def save(talk: Talk, options: argparse.Namespace) -> None:
    """Write the stream, and what the next turn depends on beside it; raises OSError."""
    model = talk.decoder.model
    notes = {"mode": mode_of(options), "place": talk.place, "partial": talk.partial}
    notes |= {"weights": weights_fingerprint(model), "device": model.device.type}
    talk.decoder.save(options.save, {KEY: json.dumps(notes)})


def read_notes(options: argparse.Namespace) -> dict[str, Any]:
    """What :func:`save` wrote beside the stream; raises SetupError for another file."""
    path = options.resume
    try:
        notes = json.loads(read_metadata(path).get(KEY, "{}"))
    except (ValueError, OSError) as error:
        raise SetupError(f"--resume: {error}") from None
    if "mode" not in notes or "place" not in notes:
        raise SetupError(f"--resume {path}: a saved stream, but none of this program, or of another version")
    if notes["mode"] != mode_of(options):
        raise SetupError(f"--resume {path}: saved {notes['mode']}, and goes on so")
    return notes


def resumed(options: argparse.Namespace, subject: Subject, notes: dict[str, Any]) -> StreamingDecoder:
    """A decoder that goes on with the saved stream; raises SetupError where it does not fit."""
    try:
        decoder = StreamingDecoder.load(options.resume, subject.loaded.model, options.engine)
    except (ValueError, OSError) as error:
        raise SetupError(f"--resume: {error}") from None
    if notes["weights"] != weights_fingerprint(subject.loaded.model):
        raise SetupError(f"--resume {options.resume}: the model's weights are not those that it was saved with")
    for name in ("n_sink", "window_size"):
        given, saved = getattr(options, name), getattr(decoder.streaming_config, name)
        if given not in (None, saved):
            raise SetupError(f"--{name.replace('_', '-')} {given}: the saved stream has {saved}")
    return decoder


# Running


def read_messages() -> Iterator[str]:
    """Messages from the terminal or a pipe, one a line; raises SetupError for bytes that are no UTF-8."""
    prompt = "> " if sys.stdin.isatty() else ""
    try:
        while True:
            yield input(prompt)
    except EOFError:
        say("\n" if prompt else "")
    except UnicodeDecodeError as error:
        raise SetupError(f"the input is not UTF-8 text ({error.reason})") from None


def run(argv: list[str]) -> int:
    options = build_parser().parse_args(argv)
    check_options(options)
    notes = read_notes(options) if options.resume else {}
    subject = set_up(config_from(options))
    with (
        resumed(options, subject, notes) if notes else make_decoder(subject.loaded, subject.streaming, options.engine)
    ) as decoder:
        talk, config, machine = make_talk(options, subject, decoder, notes), decoder.streaming_config, subject.machine
        note(
            f"{subject.source.name}, {machine.dtype_name} on {machine.device}, {machine.backends[0]}, "
            f"{decoder.engine}, {config.n_sink} sinks + {config.window_size}; Ctrl-C stops"
        )
        try:
            code = talk.endless(options.prompt or "") if options.endless else talk.converse(read_messages())
        except KeyboardInterrupt:
            code = EXIT_INTERRUPTED
        if options.save is not None and talk.at_rest:
            save(talk, options)
        elif options.save is not None:
            why = "the interruption came in the middle of a token"
            print(f"error: {options.save} was not written: {why}", file=sys.stderr, flush=True)
        return code


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    for stream, errors in ((sys.stdin, "strict"), (sys.stdout, "replace")):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors=errors)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives `input` line editing
    failures = (torch.OutOfMemoryError, FloatingPointError, OSError)
    return guarded(lambda: run(sys.argv[1:] if argv is None else argv), *failures)


if __name__ == "__main__":
    raise SystemExit(main())
