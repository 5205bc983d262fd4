"""Programmatic dependent launch: a kernel starts while the one in front drains, and waits for its results."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def wait_for_input(PDL: tl.constexpr):
    """Let the next kernel start, and wait for the one in front to have written its results."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


def pdl_available(device: torch.device) -> bool:
    """Whether kernels on ``device`` can be launched that way: Hopper or newer, and a Triton that knows of it."""
    known = hasattr(getattr(tl.extra, "cuda", None), "gdc_wait")
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0) and known
