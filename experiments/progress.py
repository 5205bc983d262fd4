"""The running perplexity beside the measured loop, shown without waiting for the device."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

_EVERY_STEPS = 32


class LossDisplay:
    """Shows a bar's progress and the perplexity of the losses so far, a few steps late on a GPU.

    `show(steps, perplexity)` is called every 32 steps with the number of steps done since the last call and the
    running perplexity (None until there is one). On CUDA the mean loss is copied to pinned memory behind the work
    in flight, and read when an event says that it has arrived; nothing waits for it.
    """

    def __init__(self, show: Callable[[int, float | None], None] | None):
        self._show = show
        self._steps = 0
        self._pinned: Tensor | None = None
        self._arrived = None
        self._perplexity: float | None = None

    @classmethod
    def silent(cls) -> "LossDisplay":
        """A display that shows nothing."""
        return cls(None)

    def step(self, nll: Tensor) -> None:
        """Count one step; `nll` is a view of the losses so far [n], on the device."""
        if self._show is None:
            return
        self._steps += 1
        if self._steps % _EVERY_STEPS:
            return
        if nll.device.type == "cuda":
            self._poll(nll)
        elif nll.device.type == "cpu":
            self._perplexity = _exp(nll.mean().item())
        self._show(_EVERY_STEPS, self._perplexity)

    def _poll(self, nll: Tensor) -> None:
        if self._arrived is not None:
            if not self._arrived.query():
                return
            self._perplexity = _exp(self._pinned.item())
        if self._pinned is None:
            self._pinned = torch.empty((), dtype=nll.dtype, pin_memory=True)
            self._arrived = torch.cuda.Event()
        self._pinned.copy_(nll.mean(), non_blocking=True)
        self._arrived.record()


def _exp(mean: float) -> float:
    return math.exp(min(mean, 700.0))
