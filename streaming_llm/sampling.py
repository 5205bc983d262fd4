"""The next token from logits, with tensor operations alone: nothing waits for the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import require_int


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, as Transformers' generation names it.

    Args:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: only the ``top_k`` most likely tokens; ``None``: all.
        top_p: only the fewest most likely tokens that reach this probability together; ``None``: all.

    Raises:
        ValueError: a number is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature!r}")
        if self.top_k is not None:
            require_int("top_k", self.top_k, 1)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, or None, got {self.top_p!r}")

    def choose(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One token id ``[batch]``, int64, for each row of ``logits`` ``[batch, vocab]``."""
        if self.temperature == 0:
            return logits.argmax(-1)
        scores, ids = logits.float() / self.temperature, None
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            scores, ids = scores.topk(self.top_k, dim=-1)  # in descending order
        elif self.top_p is not None:
            scores, ids = scores.sort(dim=-1, descending=True)
        probabilities = scores.softmax(-1)
        if self.top_p is not None and ids is not None:
            before = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.masked_fill(before >= self.top_p, 0.0)
        # The largest of p / e with e exponential is a draw from p.
        noise = torch.empty_like(probabilities).exponential_(generator=generator)
        choice = (probabilities / noise).argmax(-1, keepdim=True)
        return (choice if ids is None else ids.gather(-1, choice)).squeeze(-1)
