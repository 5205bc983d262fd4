"""The one place through which Triton kernels are launched, and programmatic dependent launch.

A kernel runs on the current device and its current stream, whatever its arguments are. :func:`launch` makes the
arguments' device current, so that kernels are right on ``cuda:1`` while ``cuda:0`` is current.

Programmatic dependent launch: a kernel may start while the one in front of it drains. It then asks for the weights
that nobody writes, and waits before it reads what that kernel wrote.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def launch(kernel: triton.JITFunction, grid: tuple[int, ...], *args: Any, pdl: bool = False, **meta: Any) -> None:
    """Launch ``kernel[grid](*args, **meta)`` on the device of its arguments, and that device's current stream.

    Args:
        pdl: with programmatic dependence on the kernel in front; a kernel that knows of it takes it as ``PDL``, for
            :func:`wait_for_input`.
    """
    if "PDL" in kernel.arg_names:
        meta["PDL"] = pdl
    device = next(x.device for x in args if isinstance(x, Tensor))
    if pdl:
        meta["launch_pdl"] = True
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        kernel[grid](*args, **meta)


@triton.jit
def wait_for_input(PDL: tl.constexpr):
    """Let the next kernel start, and wait for the one in front to have written its results."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@functools.cache
def pdl_available(device: torch.device) -> bool:
    """Whether kernels on ``device`` can be launched that way: Hopper or newer, and a Triton that knows of it."""
    known = hasattr(getattr(tl.extra, "cuda", None), "gdc_wait")
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0) and known


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of it that a program can have for its tiles; a little is left for the rest."""
    known = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if known else None
    return getattr(properties, "shared_memory_per_block_optin", 2**17) - 2**12
