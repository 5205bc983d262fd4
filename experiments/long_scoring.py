"""Scoring a stream of any length so that nothing is lost: a killed run goes on from its last checkpoint, to the bit.

In the work folder: `checkpoint.json` (how far each pass over the text has come), the stream's cache as
`StreamingKVCache.save` writes it, and the losses of each pass so far. Losses and cache are on the disk before the
checkpoint that counts them; when it is taken up, the losses are cut back to it.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.config import SetupError
from experiments.costs import PeakMemory
from experiments.progress import Show, StopRequest, perplexity_shown
from experiments.storage import differences, read_json, write_json
from streaming_llm import StreamingKVCache, StreamingLLMWrapper
from streaming_llm.blockwise import BlockScorer, in_blocks
from streaming_llm.families import text_config

CHECKPOINT_FORMAT = 3
CHECKPOINT = "checkpoint.json"

Chunks = Callable[[int], Iterator[Tensor]]
"""The token ids of a pass from a given token on, in chunks int64 [1, n] of any length."""


class ScoringError(RuntimeError):
    """A stream could not be scored to its end."""


class StoppedError(Exception):
    """A signal ended the run; what had been done is in the checkpoint."""

    def __init__(self, signal_number: int, position: int):
        super().__init__(f"interrupted at token {position:,}")
        self.signal_number = signal_number


@dataclass
class Pass:
    """How far one pass over the text has come. `scoring_sec` contains `waiting_for_text_sec`, and no checkpoint."""

    tokens: int = 0
    done: bool = False
    scoring_sec: float = 0.0
    waiting_for_text_sec: float = 0.0


@dataclass
class LongScoring:
    """Passes over texts, each resumable, with a model inside a `StreamingLLMWrapper`.

    `identity`: JSON values that a checkpoint has to share with this run to be taken up. `every_sec`: seconds between
    checkpoints; 0 for one after each block. `say` is told when a checkpoint has been written. Raises SetupError where
    the checkpoint in `work` is of another run, or cannot be read.
    """

    work: Path
    identity: dict
    stream: StreamingLLMWrapper
    block_size: int
    every_sec: float
    stop: StopRequest
    say: Callable[[str], None]

    def __post_init__(self):
        self.memory = PeakMemory(self.stream.model.get_input_embeddings().weight.device)
        self.memory.start()
        self.passes: dict[str, Pass] = {}
        self.facts = {"sessions": 1, "checkpoint_sec": 0.0, "peak_memory_mb": None}
        self._saved: dict | None = None  # the stream in the checkpoint, until it is taken up
        if (self.work / CHECKPOINT).exists():
            saved = read_checkpoint(self.work / CHECKPOINT, self.identity)
            self.passes = {name: Pass(**values) for name, values in saved["passes"].items()}
            self.facts = saved["facts"] | {"sessions": saved["facts"]["sessions"] + 1}
            self._saved = saved["stream"]

    def run(self, name: str, chunks: Chunks, show: Show | None = None) -> np.ndarray:
        """Score one pass to its end, from where the checkpoint left it.

        Returns the losses of all tokens but the first, float32 in nats, mapped from their file. Raises StoppedError
        where a signal came (the checkpoint has been written), ScoringError where a loss is not finite or a token is
        none of the model's.
        """
        state = self.passes.setdefault(name, Pass())
        with _Losses(self.work / f"{name}.f32", max(0, state.tokens - 1)) as losses:
            if not state.done:
                with closing(read_ahead(chunks(state.tokens))) as tokens:
                    self._score(state, losses, in_blocks(tokens, self.block_size), show or (lambda *_: None))
            return losses.read()

    def _score(self, state: Pass, losses: "_Losses", blocks: Iterator[Tensor], show: Show) -> None:
        scorer, seen = self._scorer(), state.tokens
        arriving = Arriving(scorer.device)
        show(seen, None)
        block = next(blocks, None)  # finding the place in the text is no part of scoring
        begin = time.perf_counter()
        while True:
            stopping = self.stop.signal_number is not None
            due = seen > state.tokens and time.perf_counter() - begin >= self.every_sec
            if block is None or stopping or due:
                losses.append(arriving.swap(None))
                state.scoring_sec += time.perf_counter() - begin
                state.tokens, state.done = seen, block is None
                self._checkpoint(losses, None if state.done else scorer)
                if state.done:
                    return
                if stopping:
                    raise StoppedError(self.stop.signal_number, seen)
                speed = seen / state.scoring_sec
                self.say(f"token {seen:,}: perplexity {losses.perplexity:.3f} so far, {speed:,.0f} tokens/s")
                begin = time.perf_counter()
            losses.append(arriving.swap(self._score_block(scorer, block)))
            seen += block.shape[1]
            show(block.shape[1], losses.perplexity)
            asked = time.perf_counter()
            block = next(blocks, None)
            state.waiting_for_text_sec += time.perf_counter() - asked

    def _score_block(self, scorer: BlockScorer, block: Tensor) -> Tensor:
        """Losses [n] of the next tokens [1, n]; [n - 1] of a stream's first, whose first token nothing predicts."""
        largest = int(block.max())
        if largest >= text_config(scorer.model.config).vocab_size:
            raise ScoringError(f"token id {largest} is outside the model's vocabulary")
        return scorer.score(block)[0][0]

    # --- checkpoints -----------------------------------------------------------------------------------------

    def _scorer(self) -> BlockScorer:
        """A scorer of the stream in the checkpoint, or of a fresh one."""
        model, saved = self.stream.model, self._saved
        self._saved = None
        if saved is None:
            return BlockScorer(model, self.stream.new_cache())
        try:
            cache = StreamingKVCache.load(self.work / saved["cache"], model)
        except (OSError, ValueError) as error:
            raise SetupError(f"{error}; --force starts anew") from None
        last_hidden = torch.tensor(saved["last_hidden"], dtype=torch.float64).to(model.dtype)
        return BlockScorer(model, cache, last_hidden[None, None].to(model.get_input_embeddings().weight.device))

    def _checkpoint(self, losses: "_Losses", scorer: BlockScorer | None) -> None:
        begin = time.perf_counter()
        losses.sync()
        stream = None
        if scorer is not None and scorer.last_hidden is not None:
            stream = {"cache": f"cache-{time.time_ns()}.safetensors"}
            scorer.cache.save(self.work / stream["cache"])
            stream["last_hidden"] = scorer.last_hidden[0, 0].double().tolist()
        figure = self.memory.stop()  # the highest peak of all sessions, as far as they came to a checkpoint
        known = [value for value in (self.facts["peak_memory_mb"], figure.peak_mb) if value is not None]
        self.facts |= {"peak_memory_mb": max(known, default=None), "peak_memory_kind": figure.kind}
        passes = {name: asdict(state) for name, state in self.passes.items()}
        value = {"format": CHECKPOINT_FORMAT, "identity": self.identity, "passes": passes, "facts": self.facts}
        write_json(self.work / CHECKPOINT, value | {"stream": stream})
        for path in self.work.glob("cache-*"):  # of checkpoints before
            if stream is None or path.name != stream["cache"]:
                path.unlink()
        self.facts["checkpoint_sec"] += time.perf_counter() - begin


def read_checkpoint(path: Path, identity: dict) -> dict:
    """A checkpoint of the run that `identity` describes; raises SetupError that says what differs or is broken."""
    try:
        saved = read_json(path)
    except (OSError, ValueError) as error:
        raise SetupError(f"{path}: not a readable checkpoint ({error}); --force starts anew") from None
    if saved.get("format") != CHECKPOINT_FORMAT:
        raise SetupError(f"{path}: not a checkpoint of this program, or of another version; --force starts anew")
    if what := differences(saved["identity"], identity):
        raise SetupError(f"{path}: belongs to another run ({what}); choose another --output, or --force to start anew")
    return saved


class _Losses:
    """The losses of a pass in a file, float32 in nats, in the order of the stream; cut back to `length` at first.

    Raises SetupError where there are fewer.
    """

    def __init__(self, path: Path, length: int):
        self.path = path
        path.touch()
        if path.stat().st_size < 4 * length:
            raise SetupError(f"{path} holds fewer than the {length} losses that were written; --force starts anew")
        self._file = path.open("r+b")
        self._file.truncate(4 * length)
        self._file.seek(4 * length)
        held = self.read()
        self._count, self._sum = len(held), float(held.sum(dtype=np.float64))

    def __enter__(self) -> "_Losses":
        return self

    def __exit__(self, *exc_info) -> None:
        self._file.close()

    def append(self, losses: np.ndarray) -> None:
        """Write losses [n] behind the others; raises ScoringError where one is not finite."""
        finite = np.isfinite(losses)
        if not finite.all():
            token = 1 + self._count + int(np.argmin(finite))
            raise ScoringError(f"the loss of token {token} is not finite: try another --dtype")
        self._file.write(losses.astype("<f4", copy=False).tobytes())
        self._count += len(losses)
        self._sum += float(losses.sum(dtype=np.float64))

    def sync(self) -> None:
        """Bring what was appended to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def read(self) -> np.ndarray:
        """All losses [n], mapped from the file."""
        self._file.flush()
        return np.memmap(self.path, dtype="<f4", mode="r") if self.path.stat().st_size else np.empty(0, dtype="<f4")

    @property
    def perplexity(self) -> float | None:
        """None before the first loss."""
        return perplexity_shown(self._sum / self._count) if self._count else None


class Arriving:
    """Brings losses to the CPU one block late, so that a GPU has its next block before anyone waits for the last."""

    def __init__(self, device: torch.device):
        self._on_cuda = device.type == "cuda"
        self._pending: tuple[Tensor, torch.cuda.Event | None] | None = None

    def swap(self, losses: Tensor | None) -> np.ndarray:
        """Start fetching `losses` [n] (None: nothing); returns those of the call before (none at first), float32."""
        before, self._pending = self._pending, None
        if losses is not None and self._on_cuda:
            home = torch.empty(losses.shape, dtype=torch.float32, pin_memory=True)
            home.copy_(losses.float(), non_blocking=True)
            self._pending = home, torch.cuda.current_stream(losses.device).record_event()
        elif losses is not None:
            self._pending = losses.float(), None
        if before is None:
            return np.empty(0, dtype=np.float32)
        if before[1] is not None:
            before[1].synchronize()
        return before[0].numpy()


def read_ahead(chunks: Iterator[Tensor], depth: int = 32) -> Iterator[Tensor]:
    """The same chunks, up to `depth` of them tokenised by a thread while the model works on those before.

    Close it, or read it to its end, to be rid of the thread.
    """
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read_ahead")
    try:
        pending = deque(pool.submit(next, chunks, None) for _ in range(depth))
        while (chunk := pending.popleft().result()) is not None:
            pending.append(pool.submit(next, chunks, None))
            yield chunk
    finally:
        pool.shutdown(cancel_futures=True)
