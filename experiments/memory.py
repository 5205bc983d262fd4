"""The peak memory of a run.

On CUDA: what PyTorch's allocator had given out at most, weights included. On a CPU there is no such count: what can
be had is the largest resident size of the whole process (interpreter, libraries and weights included), where the
system lets a process reset it (Linux); elsewhere there is no figure.
"""

import contextlib
import ctypes
import gc
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

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
            _return_freed_heap()
            self._resettable = _reset_peak_rss()

    def stop(self) -> MemoryFigure:
        if self._on_cuda:
            peak = sum(torch.cuda.max_memory_allocated(device) for device in self.devices)
            return MemoryFigure(peak / 1e6, "CUDA memory allocated")
        if sys.platform == "linux" and self._resettable:
            return MemoryFigure(_peak_rss_mb(), "resident size of the whole process")
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


def _return_freed_heap() -> None:
    """Give memory that earlier runs freed back to the system, so that it does not count for the next one."""
    with contextlib.suppress(AttributeError, OSError):  # without it, memory that earlier runs freed may count
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak_rss() -> bool:
    try:
        _CLEAR_REFS.write_text("5")  # 5: reset the peak resident set size to the current one
    except OSError:
        return False
    return True


def _peak_rss_mb() -> float:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"{_STATUS} has no line VmHWM")
