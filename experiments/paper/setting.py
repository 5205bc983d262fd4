"""What experiments are made of: pieces of work whose outcome is kept; and what all pieces of a model share, the model
on its device, the stream of tokens, and how long everything is.
"""

import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from torch import Tensor

from experiments.config import ExperimentConfig, SetupError
from experiments.environment import environment, sources_hash, what_matters
from experiments.kept import Found
from experiments.measuring import Machine, free_memory
from experiments.method_base import MethodSettings
from experiments.methods import METHODS
from experiments.models import LoadedModel, ModelSource
from experiments.perplexity import compute_perplexity, perplexity
from experiments.placements import model_call_engine
from experiments.results import run_record
from experiments.storage import hash_of
from experiments.texts import Text
from experiments.tokens import first_tokens
from streaming_llm import StreamingConfig, resolve_block_engine
from streaming_llm.engines.blocks import block_forward

PIECES = ".pieces"


@dataclass(frozen=True)
class Piece:
    """One computation. Pieces of equal `config` are the same; `name` tells it from others of its experiment.

    `config`: JSON values that could change what is found, beside what is common to a model's pieces. `kind`: pieces
    of one kind take about equally long for each of their `tokens`.
    """

    name: str
    config: dict
    compute: Callable[[], Found]
    kind: tuple[str, ...]
    tokens: int

    @property
    def stem(self) -> str:
        """Names its record."""
        return "".join(c if c.isalnum() or c in "-." else "_" for c in "-".join(self.kind[1:]))

    @cached_property
    def key(self) -> str:
        """The same for pieces that are the same."""
        return hash_of(self.config)


class Experiment(ABC):
    """A table or figure of the paper; `reference` says where it is there."""

    name: str
    title: str
    reference: str

    def why_not(self, setting) -> str | None:
        """Why it cannot be had of a model; None if it can."""
        return None

    @abstractmethod
    def pieces(self, setting) -> list[Piece]:
        """What has to be computed, in order."""

    @abstractmethod
    def result(self, setting, found: dict[str, Found]) -> dict:
        """What the result file says, from what the pieces found."""


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens, and of what is repeated.

    `cache`: of Figs. 3 and 9 and Tables 1, 5 and 7; `large_cache`: of Table 2 and Fig. 5; `caches`: of Table 6;
    `timed_caches`: of Fig. 10.
    """

    cache: int
    large_cache: int
    caches: tuple[int, ...]
    timed_caches: tuple[int, ...]
    curve: int = 20_000
    book: int = 65_000
    table: int = 400_000
    positions: int = 100_000
    longest: int = 4_000_000
    timed_steps: int = 64
    stream_samples: int = 10
    stream_queries: int = 300
    questions: int = 1_000
    sentences: int = 256

    @classmethod
    def of(
        cls, context_length: int, is_demo: bool, cache: int | None, most: int | None, samples: int | None
    ) -> "Lengths":
        """The paper's for a model with this context; smaller ones for the demo, and none above `most` tokens."""
        large = min(context_length // 2, 2048) if not is_demo else 256
        small = cache or (min(large, 1024) if not is_demo else 128)
        lengths = cls(
            small,
            large,
            tuple(size for size in (64, 128, 256, 512, 1024, 2048, 4096) if large // 8 <= size <= 2 * large),
            tuple(size for size in (256, 512, 1024, 2048, 4096) if size <= context_length),
        )
        if is_demo:
            lengths = replace(
                lengths, curve=2048, book=4096, table=8192, positions=4096, longest=24_000, timed_steps=16,
                timed_caches=(64, 128, 256), stream_samples=2, stream_queries=20, questions=50, sentences=64,
            )  # fmt: skip
        if samples is not None:
            lengths = replace(lengths, stream_samples=samples)
        if most is None:
            return lengths
        names = ("curve", "book", "table", "positions", "longest")
        return replace(lengths, **{name: min(getattr(lengths, name), most) for name in names},
                       stream_queries=min(lengths.stream_queries, max(1, most // 200)))  # fmt: skip


@dataclass
class Setting:
    """A model, loaded when it is first needed, and the stream that it is given."""

    config: ExperimentConfig
    source: ModelSource
    machine: Machine
    text: Text
    lengths: Lengths
    questions: str | None

    def __post_init__(self):
        self.info = self.source.info()
        if self.info.tokenizer is None:
            raise SetupError(f"model {self.source.name!r} has random weights, whose perplexities mean nothing")
        self.beginning = self.info.beginning(self.config.bos)
        self.n_sink = 4 if self.config.n_sink is None else self.config.n_sink
        self._loaded: LoadedModel | None = None
        self._ids: Tensor | None = None

    # The model

    @property
    def loaded(self) -> LoadedModel:
        """The model with its attention by the backend."""
        if self._loaded is None:
            self._loaded = self.machine.load(self.source, self.config.device_map)
        self.machine.wrap(self._loaded, self.backend)
        return self._loaded

    def free(self) -> None:
        """Let go of the model."""
        self._loaded = None
        free_memory()

    @property
    def backend(self) -> str:
        return self.machine.backends[0]

    @property
    def engine(self) -> str:
        """How single tokens run; never "auto"."""
        return self.machine.engine(self.loaded, self.config.engine, self.backend)

    def block_forward(self):
        """The forward for blocks of tokens, by what goes with that engine."""
        model = self.loaded.model
        return block_forward(model, resolve_block_engine(model, self.config.engine))

    # What results depend on

    def common(self) -> dict:
        """What could change anything that is found, as JSON values."""
        return {
            "model": self.source.fingerprint,
            "dtype": self.machine.dtype_name,
            "backend": self.backend,
            "engine": self.config.engine,
            "paper_sources": sources_hash("experiments/paper/*.py"),
            **what_matters(self.machine.device),
        }

    def header(self) -> dict:
        """The conditions that a result file states."""
        return {
            "model": self.source.name,
            "model_fingerprint": self.source.fingerprint,
            "weights": self.source.weights,
            "dataset": self.text.dataset,
            "data_sha256": self.text.sha256,
            "bos": self.beginning.record(),
            "device": what_matters(self.machine.device)["device"],
            "dtype": self.machine.dtype_name,
            "backend": self.backend,
            "environment": environment(self.machine.device, self.config.command, self.config.seed),
        }

    # The stream

    def ids(self, limit: int) -> Tensor:
        """The first `limit` tokens of the stream, int64 [1, n], on the CPU; fewer where the text is shorter."""
        if self._ids is None or (self._ids.shape[1] < limit and not self._is_whole):
            self._ids = first_tokens(self.text, self.info.tokenizer, self.beginning.ids, limit)
            self._is_whole = self._ids.shape[1] < limit
        return self._ids[:, :limit]

    def sizes(self, cache: int, n_sink: int | None = None) -> StreamingConfig:
        """Sinks and window that fill a cache."""
        n_sink = self.n_sink if n_sink is None else n_sink
        return StreamingConfig(n_sink, max(1, cache - n_sink))

    # Pieces that several experiments are made of

    def losses(self, name: str, method: str, cache: int, limit: int, n_sink: int | None = None, **other) -> Piece:
        """The losses of a method along the stream, without a clock: `nll`, float32 in nats, of tokens 1, 2, ...

        `other`: what else tells the piece apart, with `ids`, a function that gives other ids than the stream's.
        """
        make_ids: Callable[[], Tensor] = other.pop("ids", lambda: self.ids(limit))
        sizes = self.sizes(cache, n_sink)

        def compute() -> Found:
            ids, start = make_ids().to(self.loaded.device), time.perf_counter()
            cls = METHODS[method]
            settings = MethodSettings(sizes.n_sink, sizes.window_size, cls.engine_for(self.engine))
            nll = cls(self.loaded.model, settings).score(ids)[0].float().cpu().numpy()
            values = {"tokens": len(nll) + 1, "seconds": time.perf_counter() - start, "perplexity": perplexity(nll)}
            return Found(values, {"nll": nll})

        config = {"what": "losses", "method": method, "n_sink": sizes.n_sink, "window_size": sizes.window_size}
        config |= {"limit": limit, "data": self.text.sha256, "bos": list(self.beginning.ids), **other}
        return Piece(name, config, compute, (self.source.name, "losses", method), limit)

    def timed(self, name: str, method: str, cache: int, repeat: int, by_model_call: bool = False) -> Piece:
        """A method's decode steps in the measured loop, behind a prompt that fills the cache.

        `by_model_call`: by the engine that runs every method, the model's own call, recorded where there is a GPU.
        """
        sizes, steps = self.sizes(cache), self.lengths.timed_steps

        def compute() -> Found:
            cls, ids = METHODS[method], self.ids(cache + steps + 2)
            engine = model_call_engine(self.engine) if by_model_call else self.engine
            settings = MethodSettings(sizes.n_sink, sizes.window_size, cls.engine_for(engine))
            result = compute_perplexity(self.loaded.model, ids, cls(self.loaded.model, settings), scoring="decode")
            return Found(run_record(result, self.backend))

        config = {"what": "timed", "method": method, "n_sink": sizes.n_sink, "window_size": sizes.window_size}
        config |= {"steps": steps, "repeat": repeat, "data": self.text.sha256, "by_model_call": by_model_call}
        return Piece(name, config, compute, (self.source.name, "timed", method, str(cache)), steps)


def curve(nll: np.ndarray, n_points: int = 100) -> dict[str, list]:
    """Perplexity along a stream: of stretches of equal length, with the number of the last token of each."""
    return _stretches(nll, np.unique(np.linspace(0, len(nll), min(n_points, len(nll)) + 1).astype(int))[1:].tolist())


def doubling(nll: np.ndarray, first: int = 256) -> dict[str, list]:
    """Perplexity of stretches each as long as all before it, as `curve` gives it: to token 256, 512, 1,024, ..."""
    return _stretches(nll, [first << n for n in range(64) if first << n < len(nll)] + [len(nll)])


def _stretches(nll: np.ndarray, ends: list[int]) -> dict[str, list]:
    return {"token": ends, "perplexity": [perplexity(nll[a:b]) for a, b in itertools.pairwise([0, *ends])]}
