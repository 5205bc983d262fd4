"""Talk with a model for as long as you like, or let it write without end, in constant memory.

python scripts/stream_chat.py --endless
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from streaming_chat.command_line import CHAT, DEFAULT_LIMITS, ENDLESS, build_parser, check_options
from streaming_chat.status import StatusLine
from streaming_chat.talk import Talk, check_mode, read_messages
from streaming_chat.token_stream import Sampler, SamplingError, SamplingSettings, TokenStream, read_notes
from streaming_chat.turns import encode, find_turns

from experiments.cli import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_SETUP
from experiments.config import SetupError
from experiments.measuring import Machine, resolve_machine
from experiments.model_setup import config_of, make_decoder, weights_fingerprint
from experiments.models import LoadedModel, find_model
from experiments.plan import model_settings
from experiments.tokens import put_in_front
from streaming_llm import StreamingConfig, StreamingDecoder


@contextmanager
def prepared(options: argparse.Namespace) -> Iterator[Talk]:
    """Load what a command line names, ready to talk; afterwards the model is as it was.

    Raises:
        SetupError: something is wrong with an option, the model or the saved stream.
    """
    check_options(options)
    mode = ENDLESS if options.endless else CHAT
    config = config_of(options)
    machine, source = resolve_machine(config), find_model(options.model)
    notes = None if options.resume is None else read_notes(options.resume)
    if notes is not None:
        check_mode(options.resume, notes, mode)
    loaded = machine.load(source)
    settings = model_settings(config, source, loaded)
    sizes = {"n_sink": settings.n_sink, "window_size": settings.window_size}
    if notes is not None:
        sizes = _sizes_of(options, notes)
    with make_decoder(loaded, StreamingConfig(**sizes), options.engine) as decoder:
        talk = _talk(options, loaded, decoder, mode, sizes)
        if notes is not None:
            talk.resume(options.resume, notes)
        if sys.stderr.isatty():
            say_what(options, machine, talk)
        yield talk


def _sizes_of(options: argparse.Namespace, notes: dict) -> dict[str, int]:
    for name in ("n_sink", "window_size"):
        if getattr(options, name) not in (None, notes[name]):
            flag = f"--{name.replace('_', '-')}"
            raise SetupError(f"{flag} {getattr(options, name)}: the saved stream has {notes[name]}")
    return {name: notes[name] for name in ("n_sink", "window_size")}


def _talk(options: argparse.Namespace, loaded: LoadedModel, decoder: StreamingDecoder, mode: str, sizes: dict) -> Talk:
    tokenizer = loaded.tokenizer
    start = put_in_front(tokenizer) or ([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id])
    device = loaded.model.get_input_embeddings().weight.device
    sampling = SamplingSettings(options.temperature, options.top_k, options.top_p, options.seed)
    return Talk(
        stream=TokenStream(decoder, Sampler(sampling, device)),
        tokenizer=tokenizer,
        turns=None if options.endless else find_turns(tokenizer, start, options.plain),
        start=start,
        stop_ids=stop_ids(loaded),
        limit=DEFAULT_LIMITS[mode] if options.max_new_tokens is None else options.max_new_tokens,
        say=say,
        status=StatusLine(sys.stderr, sys.stdout),
        identity={"mode": mode, "weights": weights_fingerprint(loaded.model), **sizes},
    )


def stop_ids(loaded: LoadedModel) -> frozenset[int]:
    """Tokens with which the model ends a text, by its generation settings and its tokenizer."""
    ends = getattr(loaded.model.generation_config, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends]
    return frozenset(token for token in (*ends, loaded.tokenizer.eos_token_id) if token is not None)


def say_what(options: argparse.Namespace, machine: Machine, talk: Talk) -> None:
    """One line about what runs."""
    decoder = talk.stream.decoder
    config = decoder.streaming_config
    print(
        f"{options.model}, {machine.dtype_name} on {machine.device}, {machine.backends[0]}, {decoder.engine}, "
        f"{config.n_sink} sinks + {config.window_size}; Ctrl-C stops",
        file=sys.stderr,
    )


def say(text: str) -> None:
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()


def complain(line: str) -> None:
    print(f"error: {line}", file=sys.stderr, flush=True)


def run_talk(talk: Talk, options: argparse.Namespace) -> int:
    """Talk until it ends, one way or the other; returns the exit code."""
    try:
        if not options.endless:
            return talk.converse(read_messages(sys.stdin))
        begin = [] if talk.stream.pending else talk.start
        begin = begin + ([] if options.prompt is None else encode(talk.tokenizer, options.prompt))
        if not begin and not talk.stream.pending:
            raise SetupError("the tokenizer has no token that a text could begin with: give --prompt")
        say(options.prompt or "")
        return talk.endless(begin)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever read the text has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    finally:
        talk.status.close()


def run(argv: list[str]) -> int:
    options = build_parser(__doc__.splitlines()[0]).parse_args(argv)
    with prepared(options) as talk:
        code = run_talk(talk, options)
        with contextlib.suppress(BrokenPipeError):
            say("\n" if options.endless else "")
        if options.save is not None:
            if not talk.stream.at_rest:
                complain(f"{options.save} was not written: the interruption came in the middle of a token")
                return code
            try:
                talk.save(options.save)
            except OSError as error:
                complain(f"the stream was not saved: {error}")
                return EXIT_FAILED
        return code


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    for stream, errors in ((sys.stdin, "strict"), (sys.stdout, "replace")):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors=errors)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives `input` line editing
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except SetupError as error:
        complain(str(error))
        return EXIT_SETUP
    except (torch.OutOfMemoryError, SamplingError) as error:
        complain(str(error).splitlines()[0])
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    raise SystemExit(main())
