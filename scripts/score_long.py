"""Perplexity of a text of any length with streaming attention: exact, block-parallel, resumable.

python scripts/score_long.py --datasets book.txt --output book.json
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from long_scoring.command_line import build_parser
from long_scoring.figures import stream_figures, tail_figures, tail_length
from long_scoring.job import Job, prepare
from long_scoring.resumable import ResumableRun, Show, StoppedError
from long_scoring.scorer import ScoringError, StreamScorer
from stop_request import StopRequest
from torch import Tensor
from tqdm import tqdm

from experiments.cli import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_SETUP
from experiments.config import SetupError
from experiments.environment import environment
from experiments.memory import PeakMemory
from experiments.results import SCHEMA_VERSION, now, read_result, save_result
from experiments.storage import SaveError, check_writable, folder_lock, remove_leftovers, set_aside, write_npz
from streaming_llm import StreamingLLMWrapper

EXIT_SIGNAL = 128  # plus the signal's number: 130 for Ctrl-C
_CHECKPOINT_ROOM = 1 << 20


def score(job: Job, command: str) -> None:
    """Score a job's stream, and write the result.

    Raises:
        SetupError, SaveError, ScoringError, StoppedError: see there.
    """
    model = job.loaded.model
    memory = PeakMemory(job.machine.device)
    memory.start()
    config = job.streaming
    with StreamingLLMWrapper(model, config.n_sink, config.window_size) as stream, StopRequest() as stop:
        run = ResumableRun(
            job.work,
            job.identity(),
            lambda: StreamScorer(model, stream.new_cache()),
            job.block_size,
            job.options.checkpoint_every,
            stop,
            memory,
            say,
        )
        if run.passes:
            say(f"goes on at token {sum(state.tokens for state in run.passes.values()):,}")
        with display(job, "stream") as show:
            losses = run.run("stream", job.stream.chunks, show)
        tail = None
        if job.options.fresh_tail is not None:
            start = len(losses) + 1 - tail_length(len(losses) + 1, job.options.fresh_tail)
            with display(job, "fresh tail") as show:
                tail = run.run("tail", lambda position: tail_chunks(job, start, position), show)
        write_result(job, run, losses, tail, command)
    del losses, tail  # mapped from files that are removed
    run.discard()


def tail_chunks(job: Job, start: int, position: int) -> Iterator[Tensor]:
    """The fresh stream that begins with the token of a fresh start and goes on with token `start`, from
    `position` on."""
    front = len(job.tail_start[-1:])
    if position < front:
        yield torch.tensor([job.tail_start[-1:]], dtype=torch.int64)
    yield from job.stream.chunks(start + max(0, position - front))


@contextmanager
def display(job: Job, title: str) -> Iterator[Show]:
    """A bar on standard error, where a person watches."""
    visible = job.options.progress and sys.stderr.isatty()
    with tqdm(desc=title, unit=" tokens", unit_scale=True, leave=False, disable=not visible) as bar:

        def show(tokens: int, perplexity: float | None) -> None:
            if perplexity is not None:
                bar.set_postfix_str(f"perplexity {perplexity:.2f}", refresh=False)
            whole = job.stream.expected_tokens() if title == "stream" else None
            bar.total = whole if whole is None else max(whole, bar.n + tokens)
            bar.update(tokens)

        yield show


def write_result(job: Job, run: ResumableRun, losses: np.ndarray, tail: np.ndarray | None, command: str) -> None:
    """Assemble the result and save it; prints what there is to know."""
    value = result(job, run, losses, tail, command)
    if job.token_nll_path.exists():  # of an earlier result, perhaps another one
        set_aside(job.token_nll_path, "earlier")
    if job.options.save_token_nll:
        write_npz(job.token_nll_path, nll=np.asarray(losses), position=np.arange(1, len(losses) + 1))
        say(f"wrote: {job.token_nll_path}")
    say(str(save_result(job.output, value, keep_previous=job.options.force)))
    say(summary(value))


def result(job: Job, run: ResumableRun, losses: np.ndarray, tail: np.ndarray | None, command: str) -> dict:
    """The result file's contents."""
    is_random = job.source.weights == "random"
    figures = dict.fromkeys(("mean_nll", "perplexity", "tenths", "curve")) | {"scored_tokens": len(losses)}
    if is_random:
        figures["perplexity_reason"] = "the weights are random"
    else:
        figures = stream_figures(losses)
    config = job.streaming
    return {
        "schema_version": SCHEMA_VERSION,
        "experiment": "long_scoring",
        "method": "streaming",
        "model": job.source.name,
        "weights": job.source.weights,
        "dataset": job.dataset,
        "documents": job.survey.documents,
        "characters": job.survey.characters,
        "beginning_of_sequence": "per document" if job.options.bos_per_document else "at the start of the stream",
        "backend": job.backend,
        "dtype": job.machine.dtype_name,
        "device": job.identity()["device"],
        "num_tokens": run.passes["stream"].tokens,
        "max_tokens": job.options.max_tokens,
        "streaming_llm": {
            "n_sink": config.n_sink,
            "window_size": config.window_size,
            "max_cache_size": config.cache_size,
        },
        "block_size": job.block_size,
        **figures,
        "fresh_tail": tail if tail is None else tail_figures(losses, tail, job.options.fresh_tail, config.cache_size),
        **speed(run),
        "environment": environment(job.machine.device, command, job.options.seed, kvpress_imported=False),
        "config_hash": job.config_hash,
        "data_sha256": job.survey.sha256,
        "status": "ok",
        "timestamp": now(),
    }


def speed(run: ResumableRun) -> dict:
    """Times, summed over all sessions: loading, finding the place to go on from and checkpoints are not in them."""
    state = run.passes["stream"]
    return {
        "scoring_sec": state.scoring_sec,
        "waiting_for_text_sec": state.waiting_for_text_sec,
        "toks_per_sec": state.tokens / state.scoring_sec,
        **run.facts,
    }


def summary(value: dict) -> str:
    """The result in a few lines."""
    lines = [f"{value['num_tokens']:,} tokens of {value['dataset']} at {value['toks_per_sec']:,.0f} tokens/s"]
    if value["perplexity"] is not None:
        lines[0] += f": perplexity {value['perplexity']:.3f}"
        lines.append("by tenths: " + " ".join(f"{row['perplexity']:.2f}" for row in value["tenths"]))
    if value["fresh_tail"] is not None:
        part = "settled" if value["fresh_tail"]["settled"] else "all"
        row = value["fresh_tail"][part]
        lines.append(
            f"the last {row['tokens']:,} tokens: {row['in_stream']['perplexity']:.3f} in the stream, "
            f"{row['fresh']['perplexity']:.3f} as a fresh one ({row['drift_percent']:+.2f}%)"
        )
    return "\n".join(lines)


def is_finished(job: Job) -> bool:
    """Whether the output holds the result of this very job, with the losses if they are wanted."""
    if job.options.save_token_nll and not job.token_nll_path.exists():
        return False
    try:
        return read_result(job.output)["config_hash"] == job.config_hash
    except (OSError, ValueError):
        return False


def in_work_folder(job: Job, command: str) -> None:
    """Hold the work folder for this process while the job runs."""
    with ExitStack() as stack:
        check_writable(job.output.parent, _CHECKPOINT_ROOM)
        try:
            stack.enter_context(folder_lock(job.work / "lock"))
        except SetupError as error:
            reason = str(error).partition(": ")[2].partition(";")[0]
            raise SetupError(f"--output {job.output}: {reason}") from None
        remove_leftovers(job.work)
        if job.options.force:
            for path in job.work.iterdir():
                if path.name != "lock":
                    path.unlink()
        score(job, command)


def say(line: str) -> None:
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


def complain(line: str) -> None:
    print(f"error: {line}", file=sys.stderr, flush=True)


def run(argv: list[str]) -> int:
    job = prepare(build_parser(__doc__.splitlines()[0]).parse_args(argv))
    if not job.options.force and is_finished(job):
        say(f"there already: {job.output} (--force scores again)")
        return 0
    in_work_folder(job, shlex.join(["python", "scripts/score_long.py", *argv]))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except SetupError as error:
        complain(str(error))
        return EXIT_SETUP
    except (ScoringError, SaveError, torch.OutOfMemoryError) as error:
        complain(f"{str(error).splitlines()[0]}; the same command goes on from the last checkpoint, if there is one")
        return EXIT_FAILED
    except StoppedError as stopped:
        complain(f"{stopped}; the same command goes on from there")
        return EXIT_SIGNAL + stopped.signal_number
    except KeyboardInterrupt:
        complain("interrupted; the same command goes on from the last checkpoint, if there is one")
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    raise SystemExit(main())
