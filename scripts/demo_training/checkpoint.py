"""Checkpoints: written whole or not at all, and taken up again only by the run that they belong to."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .byte_bpe import atomic_path

CHECKPOINT_FORMAT = 1


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: optimiser steps done.
        total_steps: steps at which the learning rate reaches zero; None until --max-minutes has decided it.
        train_sec: wall-clock seconds spent in the training loop, over all sessions.
        curve: (step, mean training loss since the entry before), in nats per token.
        loss_sum, loss_count: the entry under way.
    """

    step: int = 0
    total_steps: int | None = None
    train_sec: float = 0.0
    curve: list[tuple[int, float]] = field(default_factory=list)
    loss_sum: float = 0.0
    loss_count: int = 0


def save_checkpoint(
    path: Path,
    identity: dict[str, object],
    weights: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
) -> None:
    """Replace `path` by the present state; a process killed meanwhile leaves the old file whole."""
    state = {
        "format": CHECKPOINT_FORMAT,
        "identity": identity,
        "model": weights,
        "optimizer": optimizer.state_dict(),
        "progress": vars(progress),
        "rng": torch.get_rng_state(),
    }
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def load_checkpoint(path: Path, identity: dict[str, object]) -> dict[str, object]:
    """Read a checkpoint on the CPU.

    Raises:
        ValueError: it cannot be read, or was written with another configuration or text.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: not a readable checkpoint ({error}); --force starts anew") from error
    if not isinstance(state, dict) or state.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(f"{path}: not a checkpoint of this script; --force starts anew")
    theirs = state["identity"]
    if theirs != identity:
        keys = sorted(k for k in {*theirs, *identity} if theirs.get(k) != identity.get(k))
        differences = "; ".join(f"{k}: {theirs.get(k)} there, {identity.get(k)} now" for k in keys)
        raise ValueError(
            f"{path}: belongs to a run of another configuration ({differences}); "
            "choose another --output-dir, or --force to start anew"
        )
    return state
