"""StreamingDecoder: one stream, decoded step by step."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

from .attachment import Attachment
from .config import StreamingConfig, require_int
from .endings import Criterion, generate_until
from .engines import make_engine, resolve_block_engine, resolve_engine
from .engines.blocks import block_forward, feed_rows, rows_of
from .families import last_logits, transformers_model
from .kv_cache import StreamingKVCache
from .placement import layer_devices, output_device
from .sampling import Choice, Ending, Sampling, generator_at
from .saving import StreamState, naming, read, require_dtype, write

LOGITS, RANDOM = "decoder.logits", "decoder.random"
"""What a decoder saves beside its cache: the last logits, and the state of its random numbers."""


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
        n_sink, window_size: see :class:`StreamingConfig`, or
        config: both in one.
        engine: how a step runs, with equal results but for rounding: a name of :data:`streaming_llm.ENGINES`, or
            ``auto``, the fastest of them that runs here. :attr:`engine` says which runs.

    Attributes:
        streaming_config: sinks and window.
        cache: the stream's, always up to date. What is done to it from outside is done to the decoder's stream.

    Raises:
        ValueError: an argument is out of range, the model cannot stream, or the engine cannot run it.
    """

    def __init__(
        self,
        model: nn.Module,
        n_sink: int = 4,
        window_size: int = 1020,
        engine: str = "auto",
        *,
        config: StreamingConfig | None = None,
    ) -> None:
        name = resolve_engine(model, engine)
        self.model = model
        self._inner = transformers_model(model)
        self.cache = StreamingKVCache.from_model(model, n_sink, window_size, config=config)
        self.streaming_config = self.cache.streaming_config
        self._engine = make_engine(model, self.cache, name)
        self._forward = block_forward(model, resolve_block_engine(model, name))
        self._logits: tuple[int, Tensor | None] = (-1, None)  # of which version of the stream
        self._generator: torch.Generator | None = None
        self.close = weakref.finalize(self, Attachment.enter(model).leave)

    def __enter__(self) -> StreamingDecoder:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def engine(self) -> str:
        """What runs a step: a name of :data:`streaming_llm.ENGINES`."""
        return self._engine.name

    @property
    def compile_sec(self) -> float:
        """Seconds spent so far on compiling, tuning and recording, in the first steps of each kind."""
        return self._engine.compile_sec

    @property
    def logits(self) -> Tensor:
        """Logits ``[batch, vocab]`` of the last token.

        Raises:
            RuntimeError: nothing has been fed, or the cache was changed from outside since.
        """
        self._require_open()
        version, logits = self._logits
        if logits is None or version != self.cache.progress.version:
            what = "nothing has been fed yet" if logits is None else "the cache was changed since the last token"
            raise RuntimeError(f"{what}, so that there are no logits: call prefill() or step() first")
        return logits

    def _keep(self, logits: Tensor) -> Tensor:
        self._logits = self.cache.progress.version, logits
        return logits

    @torch.no_grad()
    def prefill(
        self, input_ids: Tensor, block_size: int | None = None, *, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Feed prompts of any length, exactly as if token by token; goes on where the streams are.

        Args:
            input_ids: ``[batch, length]``, ``length >= 1``.
            block_size: tokens processed at a time; chosen for the device when ``None``.
            attention_mask: ``[batch, length]``, 0 at padding, left or right: rows of unequal length, each a stream
                of its own.

        Returns:
            Logits ``[batch, vocab]`` of each row's last token, in the model's dtype.
        """
        self._require_open()
        rows = rows_of(input_ids, attention_mask)
        hidden = feed_rows(self._inner, self.cache, rows, self._forward, block_size)
        return self._keep(last_logits(self._inner, hidden))

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
        self.cache.require_rows(len(token_ids))
        return self._keep(self._engine.step(token_ids))

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
        self.cache.require_rows(len(token_ids))
        logits = self.logits
        losses, logits = self._engine.score(logits, token_ids.to(logits.device))
        self._keep(logits)
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
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        stopping_criteria: Criterion | None = None,
        streamer: BaseStreamer | None = None,
    ) -> Tensor:
        """Sample tokens and feed each of them; with a graph, without coming back to the host per token.

        Args:
            max_new_tokens: at least 1.
            temperature: divides the logits; 0 takes the most likely token.
            top_k, top_p: only the most likely tokens, so many or with so much probability together.
            seed: starts the random numbers anew; ``None`` goes on with them.
            eos_token_id: tokens that end a row. They are fed; the row is filled with padding from there on, and its
                stream stays there, whatever the other rows do.
            pad_token_id: the padding; ``eos_token_id`` if not given.
            stopping_criteria: Transformers' criteria, or any function ``(ids [batch, n], None) -> bool or [batch]``
                of the ids generated in this call. What a row was fed behind its stop is taken back.
            streamer: one of Transformers'; tokens reach it some at a time.

        Returns:
            Token ids ``[batch, n]``, on the device; ``n`` is ``max_new_tokens`` or that of the longest row.

        Raises:
            RuntimeError: nothing has been fed.
        """
        require_int("max_new_tokens", max_new_tokens, 1)
        sampling, logits = Sampling(temperature, top_k, top_p), self.logits
        if self._generator is None:
            self._generator = torch.Generator(logits.device)
            self._generator.seed()
        if seed is not None:
            self._generator.manual_seed(seed)
        engine, choice = self._engine, Choice(sampling, self._generator)
        if eos_token_id is None and stopping_criteria is None and streamer is None:
            tokens, logits = engine.generate(logits, max_new_tokens, choice)
        else:
            ends = Ending.of(logits, eos_token_id, pad_token_id)
            tokens, logits = generate_until(engine, logits, max_new_tokens, choice, ends, stopping_criteria, streamer)
        self._keep(logits)
        return tokens

    def reset(self) -> None:
        """Forget the stream; buffers and recordings stay."""
        self.cache.reset()
        self._logits = -1, None

    def move_to(self, position: int) -> None:
        """Go on as if ``position`` tokens had been seen; see :meth:`StreamingKVCache.move_to`."""
        version, logits = self._logits
        up_to_date = version == self.cache.progress.version
        self.cache.move_to(position)
        if up_to_date:
            self._logits = self.cache.progress.version, logits

    @property
    def cache_nbytes(self) -> int:
        """Bytes of keys and values held."""
        return self.cache.nbytes

    # The stream as a value

    def state(self) -> StreamState:
        """Its cache's state, the last logits and the random numbers' state; views, for use before the next token."""
        state, (version, logits) = self.cache.state(), self._logits
        if logits is not None and version == self.cache.progress.version:
            state.tensors[LOGITS] = logits
        if self._generator is not None:
            state.tensors[RANDOM] = self._generator.get_state()
        return state

    def restore(self, state: StreamState, *, dtype: torch.dtype | None = None) -> None:
        """Go on where ``state`` was taken, in the buffers and recordings that are there; as
        :meth:`StreamingKVCache.restore`.

        The state of a cache alone has no logits: feed a token before scoring or generating.
        """
        self._require_open()
        self.cache.restore(state, device=layer_devices(self._inner, self.cache.family.stores), dtype=dtype)
        logits, device = state.tensors.get(LOGITS), output_device(self._inner)
        logits = None if logits is None else logits.to(device, self._inner.dtype)
        self._logits = self.cache.progress.version, logits
        self._generator = generator_at(state.tensors.get(RANDOM), device)

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
        """Write the decoder's stream to a safetensors file; see :meth:`load` and :meth:`StreamingKVCache.save`."""
        write(path, self.state(), metadata)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: nn.Module, engine: str = "auto", *, dtype: torch.dtype | None = None
    ) -> StreamingDecoder:
        """A decoder that goes on where a saved one was: with the same bits on the same device by the same engine.

        Also takes what :meth:`StreamingKVCache.save` wrote, which has no logits: feed a token first.

        Args:
            dtype: convert keys and values, for a model loaded in another dtype; the outputs are then not the same.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is no saved stream, or of another model or dtype, or the engine cannot run it.
        """
        state = read(path)
        with naming(path):
            require_dtype(state, transformers_model(model).dtype, dtype)
        decoder = cls(model, engine=engine, config=state.streaming_config)
        try:
            with naming(path):
                decoder.restore(state, dtype=dtype)
        except ValueError:
            decoder.close()
            raise
        return decoder

    def _require_open(self) -> None:
        if not self.close.alive:
            raise RuntimeError("this decoder has been closed")
