"""Scoring that loses nothing: checkpoints while it runs, and a run that goes on from the last one.

In the work folder: `checkpoint.pt` (what has been done, and what the cache needs to go on) and, for each pass over
the text, the losses so far. The losses are on the disk before the checkpoint that counts them is, and are cut back
to it when it is taken up; so a process may be killed at any moment.
"""

from __future__ import annotations

import math
import pickle
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stop_request import StopRequest
from torch import Tensor

from experiments.config import SetupError
from experiments.memory import PeakMemory
from experiments.storage import write_atomically
from streaming_llm.blockwise import in_blocks

from .losses import LossFile
from .scorer import LossFetcher, ScoringError, StreamScorer
from .tokens import read_ahead

CHECKPOINT_FORMAT = 2
CHECKPOINT = "checkpoint.pt"
LOSSES = "{}.f32"

Show = Callable[[int, float | None], None]
"""Called with the tokens done since the last call, and the running perplexity."""


class StoppedError(Exception):
    """A signal ended the run; what had been done is in the checkpoint."""

    def __init__(self, signal_number: int, position: int) -> None:
        super().__init__(f"interrupted at token {position:,}")
        self.signal_number = signal_number


@dataclass
class Pass:
    """How far one pass over the text has come. `scoring_sec` contains `waiting_for_text_sec`, and no checkpoint."""

    tokens: int = 0
    done: bool = False
    scoring_sec: float = 0.0
    waiting_for_text_sec: float = 0.0

    @property
    def losses(self) -> int:
        """Nothing predicts the first token."""
        return max(0, self.tokens - 1)


class ResumableRun:
    """Passes over texts, each resumable.

    Args:
        identity: JSON values that a checkpoint has to share with this run to be taken up.
        make_scorer: makes a scorer of a fresh stream.
        every_sec: seconds between checkpoints; 0 for one after each block.
        memory: measures the peak of this session; started already.
        say: told when a checkpoint has been written.

    Raises:
        SetupError: the checkpoint in `work` is of another run, or cannot be read.
    """

    def __init__(
        self,
        work: Path,
        identity: dict[str, Any],
        make_scorer: Callable[[], StreamScorer],
        block_size: int,
        every_sec: float,
        stop: StopRequest,
        memory: PeakMemory,
        say: Callable[[str], None],
    ) -> None:
        self.work, self.identity, self.make_scorer = work, identity, make_scorer
        self.block_size, self.every_sec, self.stop = block_size, every_sec, stop
        self.memory, self.say = memory, say
        self.passes: dict[str, Pass] = {}
        self.facts = {"sessions": 1, "checkpoint_sec": 0.0, "peak_memory_mb": None}
        self._scorer_state: dict[str, Any] | None = None
        self._restore()

    def _restore(self) -> None:
        path = self.work / CHECKPOINT
        if not path.exists():
            return
        saved = read_checkpoint(path, self.identity)
        self.passes = {name: Pass(**values) for name, values in saved["passes"].items()}
        self.facts = saved["facts"] | {"sessions": saved["facts"]["sessions"] + 1}
        self._scorer_state = saved["scorer"]

    def run(self, name: str, chunks: Callable[[int], Iterator[Tensor]], show: Show) -> np.ndarray:
        """Score one pass to its end, from where the checkpoint left it.

        Args:
            chunks: the tokens from a given one on, in chunks ``[1, n]``.

        Returns:
            Losses of all tokens but the first, float32 in nats, mapped from their file.

        Raises:
            StoppedError: a signal came; the checkpoint has been written.
            ScoringError: a loss is not finite, or a token is none of the model's.
        """
        state = self.passes.setdefault(name, Pass())
        with LossFile(self.work / LOSSES.format(name)) as losses:
            try:
                losses.cut(state.losses)
            except ValueError as error:
                raise SetupError(f"{error}, says the checkpoint beside it; --force starts anew") from None
            if not state.done:
                self._score(state, losses, chunks, show)
            return losses.read()

    def _score(self, state: Pass, losses: LossFile, chunks: Callable, show: Show) -> None:
        scorer = self.make_scorer()
        if self._scorer_state is not None:
            scorer.load(self._scorer_state)
            self._scorer_state = None
        show(state.tokens, None)
        with closing(read_ahead(chunks(scorer.n_seen))) as tokens:
            blocks = in_blocks(tokens, self.block_size)
            first = next(blocks, None)  # finding the place in the text is no part of scoring
            self._loop(state, losses, scorer, blocks if first is None else chain([first], blocks), show)

    def _loop(self, state: Pass, losses: LossFile, scorer: StreamScorer, blocks: Iterator[Tensor], show: Show) -> None:
        fetcher, writer = LossFetcher(scorer.device), _LossWriter(losses)
        begin = checkpointed = time.perf_counter()
        while True:
            asked = time.perf_counter()
            block = next(blocks, None)
            state.waiting_for_text_sec += time.perf_counter() - asked
            stopping = self.stop.signal_number is not None
            due = scorer.n_seen > state.tokens and time.perf_counter() - checkpointed >= self.every_sec
            if block is None or stopping or due:
                writer.write(fetcher.flush())
                state.scoring_sec += time.perf_counter() - begin
                state.tokens, state.done = scorer.n_seen, block is None
                self._checkpoint(losses, None if state.done else scorer)
                if stopping and not state.done:
                    raise StoppedError(self.stop.signal_number, state.tokens)
                if state.done:
                    return
                speed = state.tokens / state.scoring_sec
                self.say(f"token {state.tokens:,}: perplexity {writer.perplexity:.3f} so far, {speed:,.0f} tokens/s")
                begin = checkpointed = time.perf_counter()
            writer.write(fetcher.put(scorer.score(block)))
            show(block.shape[1], writer.perplexity)

    def _checkpoint(self, losses: LossFile, scorer: StreamScorer | None) -> None:
        begin = time.perf_counter()
        losses.sync()
        self._note_peak()
        value = {
            "format": CHECKPOINT_FORMAT,
            "identity": self.identity,
            "passes": {name: asdict(state) for name, state in self.passes.items()},
            "facts": self.facts,
            "scorer": None if scorer is None else scorer.state(),
        }
        write_atomically(self.work / CHECKPOINT, lambda file: torch.save(value, file))
        self.facts["checkpoint_sec"] += time.perf_counter() - begin

    def _note_peak(self) -> None:
        """The highest peak of all sessions, as far as they came to a checkpoint."""
        figure = self.memory.stop()
        known = [value for value in (self.facts["peak_memory_mb"], figure.peak_mb) if value is not None]
        self.facts |= {"peak_memory_mb": max(known, default=None), "peak_memory_kind": figure.kind}

    def discard(self) -> None:
        """Remove the work folder, once there is a result."""
        shutil.rmtree(self.work)


def read_checkpoint(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of the run that `identity` describes.

    Raises:
        SetupError: it is of another run (the message says what differs), or cannot be read.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SetupError(f"{path}: not a readable checkpoint ({reason}); --force starts anew") from None
    if not isinstance(saved, dict) or saved.get("format") != CHECKPOINT_FORMAT:
        raise SetupError(f"{path}: not a checkpoint of this program, or of another version; --force starts anew")
    theirs = saved["identity"]
    differing = [key for key in {**theirs, **identity} if theirs.get(key) != identity.get(key)]
    if differing:
        what = "; ".join(f"{key}: {theirs.get(key)} there, {identity.get(key)} now" for key in differing)
        raise SetupError(f"{path}: belongs to another run ({what}); choose another --output, or --force to start anew")
    return saved


class _LossWriter:
    """Writes losses to their file, and knows the perplexity of all of them."""

    def __init__(self, losses: LossFile) -> None:
        self._losses, held = losses, losses.read()
        self._count, self._sum = len(held), float(held.sum(dtype=np.float64))

    def write(self, arrived: np.ndarray) -> None:
        """Append losses ``[n]``.

        Raises:
            ScoringError: one is not finite.
        """
        finite = np.isfinite(arrived)
        if not finite.all():
            token = 1 + self._count + int(np.argmin(finite))
            raise ScoringError(f"the loss of token {token} is not finite: try another --dtype")
        self._losses.append(arrived)
        self._count += len(arrived)
        self._sum += float(arrived.sum(dtype=np.float64))

    @property
    def perplexity(self) -> float | None:
        """`None` before the first loss."""
        return math.exp(min(self._sum / self._count, 700.0)) if self._count else None
