"""The methods that the evaluation compares, one small class each, behind the interface of `method_base`.

To add a method: write its class, and add it to `METHODS`.
"""

from contextlib import ExitStack

import torch
from torch import Tensor
from transformers import DynamicCache

from experiments.kvpress_support import PRESSES, import_adapter, kvpress_attention_functions, kvpress_unavailable
from experiments.method_base import (
    Cached,
    Capturing,
    Method,
    MethodSettings,
    forward_of,
    plain_forward,
    recomputing_engine,
)
from experiments.placements import Gapped, Rerotated
from streaming_llm import StreamingDecoder, score_stream
from streaming_llm.attachment import maskless_attention
from streaming_llm.families import decoder_of, transformers_model
from streaming_llm.losses import cross_entropy, token_nll

__all__ = ["DEFAULT_METHODS", "METHODS", "REFERENCE_METHOD", "Method", "MethodSettings"]


class Baseline(Capturing):
    """Sliding window with re-computation: each step is a forward over the last S + W tokens, the new one included.

    Steps over S + W tokens have one shape, which the engine captures at the first of them. Its prefill, and steps
    over fewer tokens, run the same forward uncaptured.
    """

    name, label = "baseline", "Baseline"
    parallel = True
    engine_for = staticmethod(recomputing_engine)

    def _attach(self, stack: ExitStack) -> None:
        super()._attach(stack)
        self._forward = forward_of(self.model, self.settings.engine)

    def reset(self) -> None:
        self._context = None

    def prefill(self, ids: Tensor) -> Tensor:
        self._context = ids[:, -self.settings.cache_size :]
        return self._forward(self._context)

    def step(self, ids: Tensor) -> Tensor:
        self._context = torch.cat([self._context, ids[:, None]], dim=1)[:, -self.settings.cache_size :]
        if self.engine == "eager" or self._context.shape[1] < self.settings.cache_size:
            return self._forward(self._context)
        return self._by_capture(self._forward, self._context)

    def score(self, ids: Tensor) -> Tensor:
        """See `Method.score`: the windows of many tokens at a time, which tells nothing about speed."""
        model, size = transformers_model(self.model), self.settings.cache_size
        with maskless_attention(self.model):
            first = ids[:, : size + 1]  # those whose window is all that came before
            hidden = decoder_of(model)(first, use_cache=False).last_hidden_state
            losses = [token_nll(model, hidden[:, :-1], first[:, 1:])[0].float()]
            windows = ids[0, 1:].unfold(0, size, 1)[:-1] if ids.shape[1] > size + 1 else ids[:0]
            at_a_time = max(1, (1 << (18 if ids.device.type == "cuda" else 12)) // size)
            for number, part in enumerate(windows.split(at_a_time)):
                targets = ids[0, size + 1 + number * at_a_time :][: len(part)]
                losses.append(cross_entropy(plain_forward(self.model)(part), targets).float())
        return torch.cat(losses)[None]


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
        return score_stream(self.model, ids, 0, ids.shape[1], engine="eager")


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


class Streaming(Cached):
    """StreamingLLM: S sinks and the last W tokens, exact, in a ring buffer."""

    name, label = "streaming", "StreamingLLM"

    @staticmethod
    def engine_for(engine: str) -> str:
        return engine

    @property
    def sizes(self) -> tuple[int, int]:
        """Sinks and window of the stream."""
        return self.settings.n_sink, self.settings.window_size

    def _attach(self, stack: ExitStack) -> None:
        self._runner = stack.enter_context(StreamingDecoder(self.model, *self.sizes, self.settings.engine))
        self._cache = self._runner.cache

    def prefill(self, ids: Tensor) -> Tensor:
        return self._runner.prefill(ids)

    def score(self, ids: Tensor) -> Tensor:
        return score_stream(self.model, ids, *self.sizes, engine=self.settings.engine)


class Window(Streaming):
    """Window attention without sinks, with as many tokens as the others keep: S = 0, W = cache_size."""

    name, label = "window", "Window"

    @property
    def sizes(self) -> tuple[int, int]:
        return 0, self.settings.cache_size


METHODS: dict[str, type[Method]] = {
    cls.name: cls for cls in (Baseline, Streaming, KVPress, Window, Dense, Gapped, Rerotated)
}
DEFAULT_METHODS = ("baseline", "streaming", "kvpress")
REFERENCE_METHOD = Baseline.name  # what speedups and perplexity increases are relative to
