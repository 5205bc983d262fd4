#!/usr/bin/env python
"""Perplexity of a text of any length with streaming attention: exact, block-parallel, resumable.

python scripts/score_long.py --datasets book.txt --output book.json
"""

import argparse
import math
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # perhaps in a checkout that is not installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from experiments import loss_figures
from experiments.cli import EXIT_SIGNAL, MODEL, STREAM, TEXTS, OneLineParser, add_options, config_from, guarded
from experiments.config import SetupError, at_least
from experiments.environment import environment, what_matters
from experiments.long_scoring import LongScoring, ScoringError, StoppedError
from experiments.model_setup import Subject, set_up
from experiments.progress import StopRequest, token_bar
from experiments.results import SCHEMA_VERSION, read_result, save_result
from experiments.storage import check_writable, folder_lock, hash_of, now, remove_leftovers, set_aside, write_npz
from experiments.texts import Text, load_as_one
from experiments.tokens import DocumentStream
from streaming_llm import StreamingLLMWrapper
from streaming_llm.engines.blocks import default_block_size

_CHECKPOINT_ROOM = 1 << 20

EPILOG = """examples:
  a book with the bundled demo model:
    python scripts/score_long.py --datasets book.txt --output book.json
  a shelf of books on a GPU, with a check that the curve is flat:
    python scripts/score_long.py --datasets books.txt.xz --max-tokens 4000000 --attn-backend flash \\
        --fresh-tail 0.1 --output books.json
  the real thing:
    python scripts/score_long.py --model EleutherAI/pythia-2.8b --datasets pg19 --output pg19.json
  speed alone, with random weights: scripts/benchmark_scoring.py

Documents (files, the records of a file, what the character U+001C separates in a .txt file) are tokenised one by one
and joined in order as they come, with nothing in between: one stream. What --bos puts in front of a text stands at
the very start of the stream only, unless --bos-per-document.

exit codes: 0 all is well; 1 it failed while running; 2 something is wrong that was found before computing; 130
interrupted. Interrupted or killed, the same command goes on from the last checkpoint (in OUTPUT.resume), and gives
the same result."""


def build_parser() -> OneLineParser:
    """The command line."""
    parser = OneLineParser("score_long.py", __doc__.splitlines()[0], EPILOG)
    texts = {"flags": ("--datasets", "--dataset"), "help": "as of run_final_experiments.py; several make one stream; "
             "default: demo_encyclopaedia"}  # fmt: skip
    add = add_options(parser, "what is scored", ("model", *TEXTS), ("model",), datasets=texts).add_argument
    add("--max-tokens", type=int, metavar="N", help="default: the whole text")
    each = "put the beginning-of-sequence token before each document (default: at the very start alone)"
    add("--bos-per-document", action="store_true", help=each)
    fresh = "also score the last FRACTION of the stream as a fresh stream, to tell drift from difficult text"
    add("--fresh-tail", type=float, metavar="FRACTION", help=fresh)
    how, backend = (*STREAM, "attn_backend_list", *MODEL[1:]), {"flags": ("--attn-backend",)}
    add = add_options(parser, "how it is computed", how, how, attn_backend_list=backend).add_argument
    add("--block-size", type=int, metavar="N", help="tokens at a time; default: suits device and window")
    nll = {"help": "keep each token's loss: <stem>.streaming.nll.npz (nll, position) beside the result"}
    force = {"help": "start anew, whatever checkpoint or result there is"}
    names = ("save_token_nll", "force", "progress")
    add = add_options(parser, "output", names, save_token_nll=nll, force=force).add_argument
    add("--output", type=Path, required=True, metavar="FILE.json", help="the result")
    every = "seconds between checkpoints; 0: after each block; default: 120"
    add("--checkpoint-every", type=float, default=120.0, metavar="SEC", help=every)
    return parser


# A command line, checked


@dataclass(frozen=True)
class Job:
    """What is to be done, and everything that it is done with."""

    options: argparse.Namespace
    subject: Subject
    block_size: int
    text: Text
    stream: DocumentStream

    @property
    def work(self) -> Path:
        """Holds checkpoint and losses until there is a result."""
        return self.options.output.with_name(f"{self.options.output.name}.resume")

    @property
    def token_nll_path(self) -> Path:
        return self.options.output.with_name(f"{self.options.output.stem}.streaming.nll.npz")

    def identity(self) -> dict:
        """Everything that could change a figure; a checkpoint and a result with another identity are not used."""
        options, machine, streaming = self.options, self.subject.machine, self.subject.streaming
        return {
            "model": self.subject.source.fingerprint,
            "data_sha256": self.text.sha256,
            "documents": self.text.num_documents,
            "bos": list(self.subject.beginning.ids),
            **{name: getattr(options, name) for name in ("max_tokens", "bos_per_document", "fresh_tail", "seed")},
            "n_sink": streaming.n_sink,
            "window_size": streaming.window_size,
            "block_size": self.block_size,
            "backend": machine.backends[0],
            "dtype": machine.dtype_name,
            **what_matters(machine.device),
            "script": hash_of({"source": Path(__file__).read_text(encoding="utf-8")}),
        }


def prepare(options: argparse.Namespace) -> Job:
    """Check a command line and load what it names; raises SetupError."""
    at_least("--max-tokens", options.max_tokens, 2)
    at_least("--block-size", options.block_size, 1)
    wrong = ""
    if options.fresh_tail is not None and not 0 < options.fresh_tail < 1:
        wrong = f"--fresh-tail must be above 0 and below 1, got {options.fresh_tail}"
    elif not 0 <= options.checkpoint_every < math.inf:
        wrong = f"--checkpoint-every must be 0 or more seconds, got {options.checkpoint_every}"
    elif options.bos_per_document and options.bos == "never":
        wrong = "--bos-per-document and --bos never exclude each other"
    elif options.output.suffix != ".json" or options.output.is_dir():
        wrong = f"--output {options.output}: name a file that ends in .json"
    if wrong:
        raise SetupError(wrong)
    text = load_as_one(options.datasets or ["demo_encyclopaedia"], options.text_key)
    subject = set_up(config_from(options))
    loaded, beginning = subject.loaded, subject.beginning
    if text.warning:
        print(f"warning: {text.warning}", file=sys.stderr)
    each = beginning.start if options.bos_per_document else ()
    if options.bos_per_document and not each:
        raise SetupError("--bos-per-document: the tokenizer has no beginning-of-sequence token")
    stream = DocumentStream(text, loaded.tokenizer, beginning.ids, options.max_tokens, each)
    block_size = options.block_size or default_block_size(subject.streaming.window_size, loaded.model)
    return Job(options, subject, block_size, text, stream)


# Scoring


def score(job: Job, command: str) -> None:
    """Score a job's stream, and write the result; raises SetupError, SaveError, ScoringError, StoppedError."""
    options, streaming = job.options, job.subject.streaming
    wrapper = StreamingLLMWrapper(job.subject.loaded.model, streaming.n_sink, streaming.window_size)
    with wrapper as stream, StopRequest() as stop:
        every = options.checkpoint_every
        run = LongScoring(job.work, job.identity(), stream, job.block_size, every, stop, say)
        if run.passes:
            say(f"goes on at token {sum(state.tokens for state in run.passes.values()):,}")
        with token_bar("stream", options.progress, job.stream.expected_tokens) as show:
            losses = run.run("stream", job.stream.chunks, show)
        tail = None
        if options.fresh_tail is not None:
            start = len(losses) + 1 - loss_figures.tail_length(len(losses) + 1, options.fresh_tail)
            with token_bar("fresh tail", options.progress) as show:
                tail = run.run("tail", lambda position: tail_chunks(job, start, position), show)
        value = result(job, run, losses, tail, command)
        if job.token_nll_path.exists():  # of an earlier result, perhaps another one
            set_aside(job.token_nll_path, "earlier")
        if options.save_token_nll:
            write_npz(job.token_nll_path, nll=np.asarray(losses), position=np.arange(1, len(losses) + 1))
            say(f"wrote: {job.token_nll_path}")
        say(save_result(options.output, value, keep_previous=options.force).line)
        say(loss_figures.in_words(value))
    del losses, tail  # mapped from files that are removed
    shutil.rmtree(job.work)


def tail_chunks(job: Job, start: int, position: int) -> Iterator[Tensor]:
    """From `position` on, the fresh stream that goes on with token `start`.

    It begins with what a fresh stream begins with, or, where there is no such token, with the one before.
    """
    front = job.subject.beginning.start[-1:]
    if front and position == 0:
        yield torch.tensor([front], dtype=torch.int64)
    yield from job.stream.chunks(start + max(0, position - 1) if front else start - 1 + position)


def result(job: Job, run: LongScoring, losses: np.ndarray, tail: np.ndarray | None, command: str) -> dict:
    """The result file's contents. Times are sums over all sessions, without loading and checkpoints."""
    subject = job.subject
    config, state = subject.streaming, run.passes["stream"]
    if tail is not None:
        tail = loss_figures.tail_figures(losses, tail, job.options.fresh_tail, config.cache_size)
    facts, at_start = subject.facts(), "at the start of the stream" if subject.beginning.ids else "nowhere"
    facts["streaming_llm"] |= {"max_cache_size": config.cache_size}
    return {
        "schema_version": SCHEMA_VERSION,
        "experiment": "long_scoring",
        "method": "streaming",
        **facts,
        "weights": subject.source.weights,
        "dataset": job.text.dataset,
        "documents": max(1, job.text.num_documents),
        "characters": job.text.num_characters,
        "beginning_of_sequence": "per document" if job.options.bos_per_document else at_start,
        "num_tokens": state.tokens,
        "max_tokens": job.options.max_tokens,
        "block_size": job.block_size,
        **loss_figures.stream_figures(losses),
        "fresh_tail": tail,
        "scoring_sec": state.scoring_sec,
        "waiting_for_text_sec": state.waiting_for_text_sec,
        "toks_per_sec": state.tokens / state.scoring_sec,
        **run.facts,
        "environment": environment(subject.machine.device, command, job.options.seed),
        "config_hash": hash_of(job.identity()),
        "data_sha256": job.text.sha256,
        "status": "ok",
        "timestamp": now(),
    }


# The command


def is_finished(job: Job) -> bool:
    """Whether the output holds the result of this very job, with the losses if they are wanted."""
    try:
        finished = read_result(job.options.output)["config_hash"] == hash_of(job.identity())
    except (OSError, ValueError):
        return False
    return finished and (job.token_nll_path.exists() or not job.options.save_token_nll)


def say(line: str) -> None:
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


def run(argv: list[str]) -> int:
    job = prepare(build_parser().parse_args(argv))
    output, force = job.options.output, job.options.force
    if not force and is_finished(job):
        say(f"there already: {output} (--force scores again)")
        return 0
    check_writable(output.parent, _CHECKPOINT_ROOM)
    with folder_lock(job.work / "lock", f"--output {output}"):
        remove_leftovers(job.work)
        for path in job.work.iterdir() if force else ():
            if path.name != "lock":
                path.unlink()
        try:
            score(job, shlex.join(["python", "scripts/score_long.py", *argv]))
        except StoppedError as stopped:
            print(f"error: {stopped}; the same command goes on from there", file=sys.stderr, flush=True)
            return EXIT_SIGNAL + stopped.signal_number
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    later = "the same command goes on from the last checkpoint, if there is one"
    failures = (ScoringError, torch.OutOfMemoryError)
    return guarded(lambda: run(sys.argv[1:] if argv is None else argv), *failures, later=later)


if __name__ == "__main__":
    raise SystemExit(main())
