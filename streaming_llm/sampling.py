"""The next token from logits, and which tokens end a row, with tensor operations alone: nothing waits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import require_int

LEAST_TEMPERATURE = 1e-30
"""Logits divided by much less would be infinite in float32, and no token likelier than another."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, as Transformers' generation names it.

    Args:
        temperature: divides the logits; 0 takes the most likely token; else at least ``LEAST_TEMPERATURE``.
        top_k: only the ``top_k`` most likely tokens; ``None``: all.
        top_p: only the fewest most likely tokens that reach this probability together; ``None``: all.

    Raises:
        ValueError: a number is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.temperature != 0 and not self.temperature >= LEAST_TEMPERATURE:
            raise ValueError(f"temperature must be 0 or at least {LEAST_TEMPERATURE}, got {self.temperature!r}")
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


@dataclass
class Ending:
    """Tokens that end a row.

    Args:
        eos_token_ids: ``[n]``, int64, on the device of the logits; may be empty.
        pad_token_id: what fills rows that have ended; a tensor ``[1]`` in a recorded step.
        active: boolean ``[batch]``: rows that go on; changed in place by engines.
    """

    eos_token_ids: Tensor
    pad_token_id: Any  # int or Tensor: a recorded step has a place for it
    active: Tensor

    @classmethod
    def of(cls, logits: Tensor, eos_token_id: int | list[int] | None, pad_token_id: int | None) -> Ending:
        """Of a batch with these ``logits``.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        eos = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
        pad = (eos or [0])[0] if pad_token_id is None else pad_token_id
        outside = [token for token in (*eos, pad) if not 0 <= token < logits.shape[-1]]
        if outside:
            raise ValueError(f"token id {outside[0]} is outside the model's vocabulary of {logits.shape[-1]}")
        active = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        return cls(torch.tensor(eos, dtype=torch.int64, device=logits.device), pad, active)

    def copy_(self, other: Ending) -> None:
        """Become ``other`` in place, of tensors that a recorded step reads."""
        n_eos = len(other.eos_token_ids)
        if n_eos > len(self.eos_token_ids):
            raise ValueError(f"at most {len(self.eos_token_ids)} tokens can end a row, got {n_eos}")
        self.eos_token_ids.fill_(-1)[:n_eos] = other.eos_token_ids
        self.pad_token_id.fill_(other.pad_token_id)
        self.active.copy_(other.active)

    def ends(self, tokens: Tensor) -> Tensor:
        """Whether each of ``tokens`` ``[...]`` ends its row; may be recorded."""
        return (tokens.unsqueeze(-1) == self.eos_token_ids).any(-1)

    def fed_of_each_row(self, tokens: Tensor) -> list[int]:
        """How many of new ``tokens`` ``[batch, n]`` each row is fed: up to its first end; none if it has ended."""
        is_end = self.ends(tokens)
        first = torch.where(is_end.any(1), is_end.int().argmax(1) + 1, tokens.shape[1])
        return torch.where(self.active, first, 0).tolist()


@dataclass(frozen=True, eq=False)
class Choice:
    """How an engine goes on by itself.

    Args:
        sampling: how tokens are chosen.
        generator: by which random numbers.
        ending: where rows end; ``None``: nowhere.
    """

    sampling: Sampling
    generator: torch.Generator | None
    ending: Ending | None = None


def generator_at(state: Tensor | None, device: torch.device) -> torch.Generator | None:
    """A generator of random numbers that goes on from ``state``; none where that is of another kind of device."""
    generator = torch.Generator(device)
    if state is None or state.shape != generator.get_state().shape:
        return None
    return generator.set_state(state.cpu())
