"""Reading clocks: after the device has done what it was given, and never over a step that captured something."""

import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

from experiments.memory import MemoryFigure, PeakMemory

_ATTEMPTS = 3
Result = TypeVar("Result")


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of a call, the device's work included."""
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - start


def measured(method, run: Callable[[], Result], devices: Iterable[torch.device]) -> tuple[Result, MemoryFigure]:
    """What `run` gives and its peak memory. A run in which the method captured or compiled something is repeated.

    `method`: an `experiments.methods.Method`. Raises RuntimeError where it does so in every run.
    """
    for _ in range(_ATTEMPTS):
        compiled = method.compile_sec
        memory = PeakMemory(*devices)
        memory.start()
        result = run()
        peak = memory.stop()
        if method.compile_sec == compiled:
            return result, peak
    raise RuntimeError(f"engine {method.engine!r} of {method.name} captures or compiles anew in every run")
