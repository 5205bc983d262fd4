"""The methods that the evaluation compares, one small class each, behind one interface.

A method object is a context manager: entering attaches it to the model, leaving restores the model, also after an
error. `prefill` starts a stream with its first tokens, `step` feeds one more; both return the logits of the token
after the last one fed. To add a method: write its class, and add it to `METHODS`.
"""

import time
from abc import ABC, abstractmethod
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from experiments.engines import Forward, capture, engine_of, forward_of, open_decoder, recomputing_engine, score
from experiments.kvpress_support import PRESSES, import_adapter, kvpress_attention_functions, kvpress_unavailable
from experiments.timing import synchronise
from streaming_llm.attention import maskless_attention


@dataclass(frozen=True)
class MethodSettings:
    """What a method may need to know. Sizes in tokens; `engine`: how a decode step runs where there is a choice.

    It is never "auto": see `experiments.engines.resolve_engine`.
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
        return "eager"

    @property
    def compile_sec(self) -> float:
        """Seconds spent on capturing and compiling so far: in the first steps, and never again for the same sizes."""
        return 0.0

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
    def kv_cache_nbytes(self) -> int:
        """Bytes of keys and values held between steps."""
        return 0

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes by which one more kept token lets the held keys and values grow; known once some are held."""
        return 0

    @property
    def details(self) -> dict:
        """What else the record of a run should say."""
        return {}

    def score(self, ids: Tensor) -> Tensor:
        """Losses of all tokens but the first without the token loop: ids [1, N] -> nats [1, N - 1], float32.

        The engine's own kernels compute them where it has some, else the plain model call.
        """
        raise NotImplementedError(f"{self.name} has no parallel scoring")


class Baseline(Method):
    """Sliding window with re-computation: each step is a forward over the last S + W tokens, the new one included.

    Steps over S + W tokens have one shape, which the engine captures at the first of them. Its prefill, and steps
    over fewer tokens, run the same forward uncaptured.
    """

    name, label = "baseline", "Baseline"
    engine_for = staticmethod(recomputing_engine)

    def _attach(self, stack: ExitStack) -> None:
        super()._attach(stack)
        self._forward = forward_of(self.model, self.settings.engine)
        self._captured: Forward | None = None
        self._compile_sec = 0.0
        stack.callback(setattr, self, "_captured", None)  # with the memory that it holds

    @property
    def engine(self) -> str:
        return self.settings.engine

    @property
    def compile_sec(self) -> float:
        return self._compile_sec

    def reset(self) -> None:
        self._context = None

    def prefill(self, ids: Tensor) -> Tensor:
        self._context = ids[:, -self.settings.cache_size :]
        return self._forward(self._context)

    def step(self, ids: Tensor) -> Tensor:
        self._context = torch.cat([self._context, ids[:, None]], dim=1)[:, -self.settings.cache_size :]
        if self.engine == "eager" or self._context.shape[1] < self.settings.cache_size:
            return self._forward(self._context)
        if self._captured is None:
            self._capture()
        return self._captured(self._context)

    def _capture(self) -> None:
        synchronise(self._context.device)
        start = time.perf_counter()
        self._captured = capture(self._forward, self._context, self.engine)
        synchronise(self._context.device)
        self._compile_sec += time.perf_counter() - start


class Dense(Method):
    """The full KV cache: nothing is ever evicted."""

    name, label = "dense", "Dense"
    bounded, parallel = False, True

    def reset(self) -> None:
        self._cache = DynamicCache(config=self.model.config)

    def prefill(self, ids: Tensor) -> Tensor:
        return self._forward(ids)

    def step(self, ids: Tensor) -> Tensor:
        return self._forward(ids[:, None])

    def _forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    @property
    def kv_cache_nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._tensors())

    @property
    def kv_bytes_per_token(self) -> int:
        return sum(t.numel() * t.element_size() // t.shape[-2] for t in self._tensors())

    def _tensors(self) -> list[Tensor]:
        """Keys and values [1, num_kv_heads, kept, head_dim] of every layer."""
        return [t for layer in self._cache.layers for t in (layer.keys, layer.values)]

    def score(self, ids: Tensor) -> Tensor:
        return score(self.model, ids, 0, ids.shape[1], "eager")


class KVPress(Dense):
    """NVIDIA kvpress in the decode loop: a press with key re-rotation, compressing to S + W tokens at every step."""

    name, label = "kvpress", "KVPress"
    bounded, parallel, optional = True, False, True

    @classmethod
    def unavailable(cls) -> str | None:
        return kvpress_unavailable()

    def _attach(self, stack: ExitStack) -> None:
        adapter = import_adapter()
        press_name = self.settings.kvpress_press
        self._press = adapter.build_press(press_name, self.settings.cache_size, self.settings.n_sink)
        stack.enter_context(kvpress_attention_functions())
        stack.enter_context(maskless_attention(self.model))
        stack.enter_context(adapter.attach(self._press, self.model, press_name))
        device = self.model.get_input_embeddings().weight.device
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))

    def reset(self) -> None:
        super().reset()
        self._press.reset()
        torch.manual_seed(self.settings.seed)  # some presses draw random numbers

    @property
    def details(self) -> dict:
        entry = PRESSES[self.settings.kvpress_press]
        return {"kvpress_press": self.settings.kvpress_press, "press_class": entry.class_name, "key_rerotation": True}

    score = Method.score


class Streaming(Method):
    """StreamingLLM: S sinks and the last W tokens, exact, in a ring buffer."""

    name, label = "streaming", "StreamingLLM"
    parallel = True

    @staticmethod
    def engine_for(engine: str) -> str:
        return engine

    @property
    def sizes(self) -> tuple[int, int]:
        """Sinks and window of the stream."""
        return self.settings.n_sink, self.settings.window_size

    def _attach(self, stack: ExitStack) -> None:
        self._decoder = stack.enter_context(open_decoder(self.model, *self.sizes, self.settings.engine))

    @property
    def engine(self) -> str:
        return engine_of(self._decoder, self.settings.engine)

    @property
    def compile_sec(self) -> float:
        return self._decoder.compile_sec

    def reset(self) -> None:
        self._decoder.reset()

    def prefill(self, ids: Tensor) -> Tensor:
        return self._decoder.prefill(ids)

    def step(self, ids: Tensor) -> Tensor:
        return self._decoder.step(ids)

    @property
    def kv_cache_nbytes(self) -> int:
        return self._decoder.cache_nbytes

    @property
    def kv_bytes_per_token(self) -> int:
        held = self._decoder.cache
        return held.nbytes // max(1, held.layers[0].n_stored)

    def score(self, ids: Tensor) -> Tensor:
        return score(self.model, ids, *self.sizes, self.settings.engine)


class Window(Streaming):
    """Window attention without sinks, with as many tokens as the others keep: S = 0, W = cache_size."""

    name, label = "window", "Window"

    @property
    def sizes(self) -> tuple[int, int]:
        return 0, self.settings.cache_size


METHODS: dict[str, type[Method]] = {cls.name: cls for cls in (Baseline, Streaming, KVPress, Window, Dense)}
DEFAULT_METHODS = ("baseline", "streaming", "kvpress")
REFERENCE_METHOD = Baseline.name  # what speedups and perplexity increases are relative to
