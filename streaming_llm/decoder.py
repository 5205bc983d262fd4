"""StreamingDecoder: one stream, decoded step by step."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from .config import StreamingConfig
from .families import lm_head
from .model import Attachment, feed, new_cache

ENGINES = ("eager",)


class StreamingDecoder:
    """Prefill and decode a stream, or a batch of streams of equal length, in constant memory.

    The model stays attached (see :class:`~streaming_llm.StreamingLLMWrapper`) until :meth:`close`, leaving the
    context manager, or the decoder's end.

    ::

        with StreamingDecoder(model, n_sink=4, window_size=1020) as decoder:
            logits = decoder.prefill(prompt_ids)         # [batch, length] -> [batch, vocab]
            logits = decoder.step(logits.argmax(-1))     # [batch] -> [batch, vocab]

    Args:
        model: a Transformers causal language model of a supported family.
        n_sink, window_size: see :class:`StreamingConfig`.
        engine: how a step runs. ``eager``: the plain model call.

    Raises:
        ValueError: an argument is out of range, or the model cannot stream.
    """

    def __init__(self, model: nn.Module, n_sink: int = 4, window_size: int = 1020, engine: str = "eager") -> None:
        if engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
        self.model = model
        self.engine = engine
        self.streaming_config = StreamingConfig(n_sink, window_size)
        self.cache = new_cache(model, self.streaming_config)
        self.close = weakref.finalize(self, Attachment.enter(model).leave)

    def __enter__(self) -> StreamingDecoder:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

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
        return lm_head(self.model, feed(self.model, self.cache, input_ids, block_size))[:, -1]

    @torch.no_grad()
    def step(self, token_ids: Tensor) -> Tensor:
        """Feed one token to each stream; never waits for the device.

        Args:
            token_ids: ``[batch]``.

        Returns:
            Logits ``[batch, vocab]``, in the model's dtype.
        """
        self._require_open()
        if token_ids.dim() != 1:
            raise ValueError(f"token_ids must be [batch], got {list(token_ids.shape)}")
        output = self.model(input_ids=token_ids.unsqueeze(1), past_key_values=self.cache, use_cache=True)
        return output.logits[:, -1]

    def reset(self) -> None:
        """Forget the stream; the buffers stay allocated."""
        self.cache.reset()

    def move_to(self, position: int) -> None:
        """Go on as if ``position`` tokens had been seen; see :meth:`StreamingKVCache.move_to`."""
        self.cache.move_to(position)

    @property
    def cache_nbytes(self) -> int:
        """Bytes of keys and values held."""
        return self.cache.nbytes

    def _require_open(self) -> None:
        if not self.close.alive:
            raise RuntimeError("this decoder has been closed")
