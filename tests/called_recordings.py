"""Calls in place of CUDA graphs, so that what would be recorded runs on a CPU, and is watched.

A CUDA graph is made of kernels alone. What it would have to ask the host for, or take from it, raises here.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from streaming_llm.engines import recorded

FROM_THE_HOST = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "unique", "is_nonzero", "equal")
"""Operators that wait for the device, or copy from the host to it."""


class OnDeviceAlone(TorchDispatchMode):
    """Raises where something waits for the device, makes a shape depend on data, or comes from the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            x.dtype == torch.bool for x in (args[1] if isinstance(args[1], (list, tuple)) else ()) if x is not None
        )
        number = name == "lift_fresh" and args[0].dim() == 0  # a constant, which kernels take as an argument
        assert number or (name not in FROM_THE_HOST and not by_mask), f"{func} cannot be recorded"
        return func(*args, **(kwargs or {}))


class Called:
    """Stands in for a recording: calls before, as that does, and then for each replay.

    Attributes:
        made: how many there are.
        watch: in what a replay runs.
        warm_up: calls before.
    """

    made = 0
    watch: type = OnDeviceAlone
    warm_up = 3

    def __init__(self, call, device, generator=None) -> None:
        Called.made += 1
        self.call = call
        for _ in range(self.warm_up):
            call()

    def replay(self, times: int) -> None:
        for _ in range(times):
            with self.watch(), pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
                self.call()


@pytest.fixture
def called(monkeypatch):
    """Calls in place of recordings."""
    monkeypatch.setattr(Called, "made", 0)
    monkeypatch.setattr(recorded, "Recording", Called)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
