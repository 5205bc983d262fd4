"""StreamingDecoder: one stream, decoded step by step."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from .config import StreamingConfig, require_int
from .engines import EagerEngine, Engine, FusedEngine, GraphEngine, best_engine
from .families import lm_head
from .forwards import block_forward
from .kv_cache import StreamingKVCache
from .model import Attachment, feed, new_cache
from .sampling import Sampling

ENGINES = ("eager", "graph", "fused")
ATTENTION = ("sdpa", "triton")


def _make_engine(name: str, model: nn.Module, cache: StreamingKVCache, attention: str, compiled: bool) -> Engine:
    if name == "eager":
        return EagerEngine(model, cache)
    if name == "graph":
        return GraphEngine(model, cache, compiled)
    return FusedEngine(model, cache, attention)


class StreamingDecoder:
    """Prefill and decode a stream, or a batch of streams of equal length, in constant memory.

    The model stays attached (see :class:`~streaming_llm.StreamingLLMWrapper`) until :meth:`close`, leaving the
    context manager, or the decoder's end.

    ::

        with StreamingDecoder(model, n_sink=4, window_size=1020, engine="auto") as decoder:
            logits = decoder.prefill(prompt_ids)         # [batch, length] -> [batch, vocab]
            logits = decoder.step(logits.argmax(-1))     # [batch] -> [batch, vocab]
            tokens = decoder.generate(1000, seed=0)      # [batch, 1000], without coming back to the host per token

    Args:
        model: a Transformers causal language model of a supported family.
        n_sink, window_size: see :class:`StreamingConfig`.
        engine: how a step runs, with equal results but for rounding. ``eager``: the plain model call. ``graph``: one
            CUDA graph of it, once the cache is full, eager until then. ``fused``: a CUDA graph of this library's
            kernels (GPT-NeoX). ``auto``: the fastest of them that runs here; :attr:`engine` says which.
        attention: of the fused engine. ``sdpa``: the one of PyTorch's kernels that is allowed (by the model's
            adapter, or ``torch.nn.attention.sdpa_kernel``). ``triton``: this library's own, which needs no full cache.
        compile: let ``torch.compile`` fuse the model's call before the graph engine records it.

    Raises:
        ValueError: an argument is out of range, the model cannot stream, or the engine cannot run it.
    """

    def __init__(
        self,
        model: nn.Module,
        n_sink: int = 4,
        window_size: int = 1020,
        engine: str = "eager",
        *,
        attention: str = "sdpa",
        compile: bool = False,
    ) -> None:
        if engine not in (*ENGINES, "auto"):
            raise ValueError(f"engine must be one of {', '.join(ENGINES)} or auto, got {engine!r}")
        if attention not in ATTENTION:
            raise ValueError(f"attention must be one of {', '.join(ATTENTION)}, got {attention!r}")
        name = best_engine(model) if engine == "auto" else engine
        if attention != "sdpa" and name != "fused":
            raise ValueError(f"attention={attention!r} is for the fused engine, not {name!r}")
        if compile and name != "graph":
            raise ValueError(f"compile=True is for the graph engine, not {name!r}")
        self.model = model
        self.streaming_config = StreamingConfig(n_sink, window_size)
        self._cache = new_cache(model, self.streaming_config)
        self._engine = _make_engine(name, model, self._cache, attention, compile)
        self._forward = block_forward(model, "fused" if name == "fused" else "eager")
        self._logits: Tensor | None = None
        self._generator: torch.Generator | None = None
        self.close = weakref.finalize(self, Attachment.enter(model).leave)

    def __enter__(self) -> StreamingDecoder:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    @property
    def engine(self) -> str:
        """What runs a step: ``eager``, ``graph``, ``graph+compile`` or ``fused``."""
        return self._engine.name

    @property
    def compile_sec(self) -> float:
        """Seconds spent so far on compiling, tuning and recording, in the first steps of each kind."""
        return self._engine.compile_sec

    @property
    def cache(self) -> StreamingKVCache:
        """The stream's cache, up to date."""
        self._engine.sync()
        return self._cache

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, block_size: int | None = None) -> Tensor:
        """Feed a prompt of any length, exactly as if token by token; goes on where the stream is.

        Args:
            input_ids: ``[batch, length]``, ``length >= 1``.
            block_size: tokens processed at a time; chosen for the device when ``None``.

        Returns:
            Logits ``[batch, vocab]`` of the last token, in the model's dtype.
        """
        self._require_open()
        hidden = feed(self.model, self.cache, input_ids, block_size, self._forward)
        self._logits = lm_head(self.model, hidden)[:, -1]
        return self._logits

    @torch.no_grad()
    def step(self, token_ids: Tensor) -> Tensor:
        """Feed one token to each stream; never waits for the device, but for the first time.

        Args:
            token_ids: ``[batch]``.

        Returns:
            Logits ``[batch, vocab]``, in the model's dtype.
        """
        self._require_open()
        if token_ids.dim() != 1:
            raise ValueError(f"token_ids must be [batch], got {list(token_ids.shape)}")
        self._require_batch(token_ids)
        self._logits = self._engine.step(token_ids)
        return self._logits

    @torch.no_grad()
    def score(self, token_ids: Tensor) -> Tensor:
        """Feed given tokens one by one and return the loss of each: decoding, teacher-forced.

        Args:
            token_ids: ``[batch, n]``, those that follow what has been fed.

        Returns:
            Negative log-likelihoods ``[batch, n]`` in nats, float32 (float64 for a float64 model), on the device.

        Raises:
            RuntimeError: nothing has been fed.
        """
        if token_ids.dim() != 2 or not token_ids.numel():
            raise ValueError(f"token_ids must be [batch, n >= 1], got {list(token_ids.shape)}")
        self._require_batch(token_ids)
        losses, self._logits = self._engine.score(self._last_logits(), token_ids.to(self.model.device))
        return losses

    @torch.no_grad()
    def generate(
        self,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Sample tokens and feed each of them; with a graph, without coming back to the host per token.

        Args:
            max_new_tokens: at least 1; there is no other end.
            temperature: divides the logits; 0 takes the most likely token.
            top_k, top_p: only the most likely tokens, so many or with so much probability together.
            seed: starts the random numbers anew; ``None`` goes on with them.

        Returns:
            Token ids ``[batch, max_new_tokens]``, on the device.

        Raises:
            RuntimeError: nothing has been fed.
        """
        require_int("max_new_tokens", max_new_tokens, 1)
        sampling, logits = Sampling(temperature, top_k, top_p), self._last_logits()
        if self._generator is None:
            self._generator = torch.Generator(self.model.device)
            self._generator.seed()
        if seed is not None:
            self._generator.manual_seed(seed)
        tokens, self._logits = self._engine.generate(logits, max_new_tokens, sampling, self._generator)
        return tokens

    def reset(self) -> None:
        """Forget the stream; buffers and recordings stay."""
        self.cache.reset()
        self._logits = None

    def move_to(self, position: int) -> None:
        """Go on as if ``position`` tokens had been seen; see :meth:`StreamingKVCache.move_to`."""
        self.cache.move_to(position)

    @property
    def cache_nbytes(self) -> int:
        """Bytes of keys and values held."""
        return self.cache.nbytes

    def _last_logits(self) -> Tensor:
        self._require_open()
        if self._logits is None:
            raise RuntimeError("nothing has been fed yet: call prefill() or step() first")
        return self._logits

    def _require_batch(self, token_ids: Tensor) -> None:
        layer = self._cache.layers[0]
        if layer.n_seen and token_ids.shape[0] != layer.batch_size:
            raise ValueError(
                f"this decoder holds {layer.batch_size} streams and was given ids of {token_ids.shape[0]}"
            )

    def _require_open(self) -> None:
        if not self.close.alive:
            raise RuntimeError("this decoder has been closed")
