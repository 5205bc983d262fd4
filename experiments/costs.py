"""What a run takes. Clocks are read after the device has done what it was given, and never over a step that captured.

Peak memory on CUDA: what PyTorch's allocator had given out at most, weights included. On a CPU there is no such count:
what can be had is the largest resident size of the whole process (interpreter, libraries and weights included), where
the system lets a process reset it (Linux); elsewhere there is no figure.
"""

import contextlib
import ctypes
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_STATM = Path("/proc/self/statm")


@dataclass(frozen=True)
class MemoryFigure:
    """Peak memory in MB (10^6 bytes), or None; `kind` says what was measured, or why nothing was."""

    peak_mb: float | None
    kind: str


class PeakMemory:
    """Measures the peak between `start` and `stop`, summed over devices; `start` frees what can be freed first."""

    def __init__(self, *devices: torch.device):
        self.devices = devices
        self._on_cuda = devices[0].type == "cuda"

    def start(self) -> None:
        gc.collect()
        if self._on_cuda:
            torch.cuda.empty_cache()
            for device in self.devices:
                torch.cuda.reset_peak_memory_stats(device)
        elif sys.platform == "linux":
            with contextlib.suppress(AttributeError, OSError):  # without it, memory that earlier runs freed may count
                ctypes.CDLL(None).malloc_trim(0)
            try:
                _CLEAR_REFS.write_text("5")  # reset the peak resident set size to the current one
                self._resettable = True
            except OSError:
                self._resettable = False

    def stop(self) -> MemoryFigure:
        if self._on_cuda:
            peak = sum(torch.cuda.max_memory_allocated(device) for device in self.devices)
            return MemoryFigure(peak / 1e6, "CUDA memory allocated")
        if sys.platform == "linux" and self._resettable:
            peaks = [line.split()[1] for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
            if not peaks:
                raise RuntimeError(f"{_STATUS} has no line VmHWM")
            return MemoryFigure(int(peaks[0]) * 1024 / 1e6, "resident size of the whole process")
        return MemoryFigure(None, "this system has no resettable peak of a process's resident size")


def held_bytes(device: torch.device) -> int:
    """What grows if anything does: on CUDA PyTorch's allocations, else the process's resident size, in bytes."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if _STATM.exists():
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    answer = subprocess.run(["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True, check=True)
    return int(answer.stdout) * 1024


def kind_of_held_bytes(device: torch.device) -> str:
    """What `held_bytes` counts, in words."""
    return "CUDA memory allocated" if device.type == "cuda" else "resident size of the process"


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
