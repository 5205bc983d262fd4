"""What a method of decoding a stream is, one interface for all that the evaluation compares; and how re-computation
and block-parallel scoring run the engines of the library, so that no speedup compares two engines.

A method object is a context manager: entering attaches it to the model, leaving restores the model, also after an
error. `prefill` starts a stream with its first tokens, `step` feeds one more; both return the logits of the token
after the last one fed.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.costs import synchronise
from streaming_llm.attachment import maskless_attention
from streaming_llm.engines.recorder import Recording
from streaming_llm.fused import fused_forward, why_not_fused

Forward = Callable[[Tensor], Tensor]
"""Token ids [batch, length] -> logits of the last token [batch, vocab]."""


def recomputing_engine(engine: str) -> str:
    """The engine that re-computes a window, where methods run `engine`: it has no ring of kept keys to attend to."""
    return "fused" if engine == "fused-triton" else engine


def plain_forward(model) -> Forward:
    """The model's own forward over all tokens, without a cache."""
    return lambda ids: model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]


def forward_of(model, engine: str) -> Forward:
    """The forward over all tokens that the engine runs, not captured yet.

    Raises ValueError where the engine does not exist or cannot run on the model's device.
    """
    if engine not in ("eager", "graph", "graph+compile", "fused"):
        raise ValueError(f"no engine {engine!r} re-computes a window: choose eager, graph, graph+compile or fused")
    device = model.get_input_embeddings().weight.device
    if engine != "eager" and device.type != "cuda":
        raise ValueError(f"engine {engine!r} needs a CUDA device, and the model is on {device}: choose eager")
    if engine != "fused":
        return plain_forward(model)
    reason = why_not_fused(model)
    if reason is not None:
        raise ValueError(f"engine 'fused' cannot run: {reason}; choose graph or eager")
    return fused_forward(model)


def capture(forward: Forward, example: Tensor, engine: str) -> Forward:
    """`forward` as a CUDA graph for ids of the shape of `example`: each call overwrites the logits of the one before.

    It raises ValueError for ids of another shape.
    """
    call = torch.compile(forward) if engine == "graph+compile" else forward
    with torch.inference_mode(False):
        static = example.clone()
    made: list[Tensor] = []

    def run() -> None:
        made[:] = [call(static)]

    recording = Recording(run, static.device)

    def replayed(ids: Tensor) -> Tensor:
        if ids.shape != static.shape:
            raise ValueError(f"recorded for shape {list(static.shape)}, got {list(ids.shape)}")
        static.copy_(ids)
        recording.replay()
        return made[0]

    return replayed


@dataclass(frozen=True)
class MethodSettings:
    """What a method may need to know. Sizes in tokens; `engine`: how a decode step runs where there is a choice.

    It is never "auto": see `streaming_llm.resolve_engine`.
    """

    n_sink: int
    window_size: int
    engine: str = "eager"
    kvpress_press: str = "streaming_llm"
    seed: int = 0

    @property
    def cache_size(self) -> int:
        return self.n_sink + self.window_size


class Method(ABC):
    """One way of decoding a stream with a model. Batch is 1; token ids are int64 on the model's device."""

    name: str
    label: str
    bounded = True  # a token sees at most cache_size tokens before it
    parallel = False  # `score` gives its losses without the token loop
    optional = False  # taken by default, it is skipped where it cannot run
    compile_sec = 0.0  # spent on capturing and compiling so far: in the first steps, never again for the same sizes
    kv_cache_nbytes = 0  # bytes of keys and values held between steps
    kv_bytes_per_token = 0  # by which one more kept token lets them grow; known once some are held

    def __init__(self, model, settings: MethodSettings):
        self.model = model
        self.settings = settings
        self._stack = ExitStack()

    @classmethod
    def unavailable(cls) -> str | None:
        """Why an optional dependency keeps the method from running here; None if it can run."""
        return None

    @staticmethod
    def engine_for(engine: str) -> str:
        """The engine that the method runs where `engine` is chosen; the plain model call if it has no other."""
        return "eager"

    @property
    def engine(self) -> str:
        """How a decode step really runs."""
        return self.engine_for(self.settings.engine)

    def __enter__(self):
        with ExitStack() as stack:  # what was attached before an error is undone
            self._attach(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info):
        return self._stack.__exit__(*exc_info)

    def _attach(self, stack: ExitStack) -> None:
        """Attach to the model; what has to be undone goes on the stack."""
        stack.enter_context(maskless_attention(self.model))

    @abstractmethod
    def reset(self) -> None:
        """Forget the stream."""

    @abstractmethod
    def prefill(self, ids: Tensor) -> Tensor:
        """The first tokens of a stream, [1, P] with P <= cache_size -> logits of the last one [1, vocab]."""

    @abstractmethod
    def step(self, ids: Tensor) -> Tensor:
        """One more token, [1] -> logits [1, vocab]. Does not wait for the device."""

    @property
    def details(self) -> dict:
        """What else the record of a run should say."""
        return {}

    def score(self, ids: Tensor) -> Tensor:
        """Losses of all tokens but the first without the token loop: ids [1, N] -> nats [1, N - 1], float32.

        The engine's own kernels compute them where it has some, else the plain model call.
        """
        raise NotImplementedError(f"{self.name} has no parallel scoring")


class Cached(Method):
    """A method with one of the library's caches, `_cache`, and what runs its steps, `_runner`: both are attached."""

    parallel = True

    @property
    def compile_sec(self) -> float:
        return self._runner.compile_sec

    def reset(self) -> None:
        self._cache.reset()

    def step(self, ids: Tensor) -> Tensor:
        return self._runner.step(ids)

    @property
    def kv_cache_nbytes(self) -> int:
        return self._cache.nbytes

    @property
    def kv_bytes_per_token(self) -> int:
        return self._cache.nbytes // max(1, self._cache.layers[0].n_stored)


class Capturing(Method):
    """A method that captures its steps of one shape at the first of them, where the engine is not `eager`."""

    def _attach(self, stack: ExitStack) -> None:
        super()._attach(stack)
        self._captured: Forward | None = None
        self.compile_sec = 0.0
        stack.callback(setattr, self, "_captured", None)  # with the memory that it holds

    def _by_capture(self, forward: Forward, ids: Tensor, written: Sequence[Tensor] = ()) -> Tensor:
        """`forward(ids)` by what was captured; `written` is put back after the trial runs of a capture."""
        if self._captured is None:
            synchronise(ids.device)
            start, held = time.perf_counter(), [(x, x.clone()) for x in written]
            self._captured = capture(forward, ids, self.engine)
            for x, before in held:
                x.copy_(before)
            synchronise(ids.device)
            self.compile_sec += time.perf_counter() - start
        return self._captured(ids)
