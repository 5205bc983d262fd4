"""A stream scored block by block, which can stop between two blocks and go on from there, to the bit.

The computation is that of `streaming_llm.score_stream`; with the same blocks it gives the same losses.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from streaming_llm import StreamingKVCache
from streaming_llm.blockwise import BlockScorer
from streaming_llm.families import text_config
from streaming_llm.stream_state import StreamState


class ScoringError(RuntimeError):
    """A stream could not be scored to its end."""


class StreamScorer:
    """One stream on an attached model: losses of one block after the other, and a state in between.

    Args:
        model: a causal language model inside a `StreamingLLMWrapper`, which has to stay entered.
        cache: an empty cache of that wrapper.
    """

    def __init__(self, model: nn.Module, cache: StreamingKVCache) -> None:
        self._scorer = BlockScorer(model, cache)
        self.device = self._scorer.device
        self.n_seen = 0

    def score(self, block: Tensor) -> Tensor:
        """Feed the next tokens ``[1, n]``.

        Returns:
            Losses in nats ``[n]``, or ``[n - 1]`` of a stream's first block, whose first token nothing predicts; on
            the model's device, float32 (float64 for a float64 model).
        """
        largest = int(block.max())
        if largest >= text_config(self._scorer.model.config).vocab_size:
            raise ScoringError(f"token id {largest} is outside the model's vocabulary")
        nll, _ = self._scorer.score(block)
        self.n_seen += block.shape[1]
        return nll[0]

    def state(self) -> dict[str, Any]:
        """Everything that the next block depends on, on the CPU."""
        last = self._scorer.last_hidden
        last = None if last is None else last.cpu()
        cache = self._scorer.cache.state()
        tensors = {name: tensor.contiguous().cpu() for name, tensor in cache.tensors.items()}
        return {"n_seen": self.n_seen, "last_hidden": last, "cache_facts": cache.facts, "cache_tensors": tensors}

    def load(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        last = state["last_hidden"]
        self.n_seen = state["n_seen"]
        self._scorer.last_hidden = None if last is None else last.to(self.device)
        self._scorer.cache.restore(StreamState(state["cache_facts"], state["cache_tensors"]), device=self.device)


class LossFetcher:
    """Brings losses to the CPU one block late, so that a GPU has its next block before anyone waits for the last."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._pending: tuple[Tensor, Any] | None = None

    def put(self, losses: Tensor) -> np.ndarray:
        """Start fetching `losses` ``[n]``; returns those of the call before (none at first), float32."""
        previous = self.flush()
        if self._on_cuda:
            home = torch.empty(losses.shape, dtype=torch.float32, pin_memory=True)
            home.copy_(losses.float(), non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            self._pending = (home, arrived)
        else:
            self._pending = (losses.float(), None)
        return previous

    def flush(self) -> np.ndarray:
        """Wait for what is under way and return it."""
        if self._pending is None:
            return np.empty(0, dtype=np.float32)
        home, arrived = self._pending
        self._pending = None
        if arrived is not None:
            arrived.synchronize()
        return home.numpy()
