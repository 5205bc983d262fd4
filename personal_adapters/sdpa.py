"""Attention backends: their names, the context that enforces one, whether it runs here, and the dtype to use.

A backend is exactly one SDPA kernel. Where it cannot run, PyTorch raises; nothing else takes its place.
"""

from __future__ import annotations

import os
import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass
from difflib import get_close_matches

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

FLASH_SDPA = "FLASH_SDPA"
"""Environment variable: 1 means flash and 0 math, for every entry point that was given no explicit backend."""

ATTN_BACKENDS: dict[str, SDPBackend] = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
"""Backend name -> the one kernel that it allows."""

HALF_ON_CUDA = ("flash", "cudnn")
"""Backends that take bfloat16 and float16 only on CUDA."""

DEFAULT_BACKEND = "math"


@dataclass(frozen=True)
class Availability:
    """Whether a backend runs here; ``reason`` says why not. Truthy when it does."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


def require_backend(name: str) -> str:
    """``name`` if it is a backend.

    Raises:
        ValueError: it is none; the message lists those there are and the nearest.
    """
    if name in ATTN_BACKENDS:
        return name
    nearest = get_close_matches(str(name), [*ATTN_BACKENDS, "auto"], n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"unknown attention backend {name!r}: choose one of {', '.join(ATTN_BACKENDS)} or auto.{hint}")


def _allowed() -> set[SDPBackend]:
    flags = {
        SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled(),
        SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled(),
        SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled(),
    }
    return {kernel for kernel, enabled in flags.items() if enabled}


class _OneKernel:
    """One SDPA kernel is allowed, in the whole process: other threads that ask for one wait until it is left."""

    _lock = threading.RLock()

    def __init__(self, kernel: SDPBackend) -> None:
        self._kernel = kernel

    def __enter__(self) -> None:
        self._lock.acquire()
        self._change = None if _allowed() == {self._kernel} else sdpa_kernel(self._kernel)
        if self._change is not None:
            self._change.__enter__()

    def __exit__(self, *exc_info) -> None:
        if self._change is not None:
            self._change.__exit__(*exc_info)
        self._lock.release()


def backend_context(backend: str) -> AbstractContextManager:
    """Context in which SDPA may run the kernel of ``backend`` and no other.

    Costs next to nothing where the same backend is in force already. Which kernels are allowed is a setting of the
    whole process, so that threads take turns.
    """
    kernel = ATTN_BACKENDS[backend]
    # A compiled graph sets the flags; it can neither read them nor take a lock.
    return sdpa_kernel(kernel) if torch.compiler.is_compiling() else _OneKernel(kernel)


def check_backend_available(
    backend: str, dtype: torch.dtype, device: torch.device | str, head_dim: int = 64
) -> Availability:
    """Whether ``backend`` runs on ``device`` in ``dtype``, found by running it.

    Both shapes that a stream needs are run: a small causal block, and a single query over its keys.
    """
    require_backend(backend)
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        return Availability(False, "no CUDA device is available to PyTorch")
    try:
        with torch.no_grad(), sdpa_kernel(ATTN_BACKENDS[backend]):
            query, key, value = torch.randn(3, 1, 2, 16, head_dim, device=device).to(dtype)
            block = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            step = F.scaled_dot_product_attention(query[:, :, -1:], key, value)
            finite = all(bool(out.float().isfinite().all()) for out in (block, step))
    except (RuntimeError, NotImplementedError) as error:
        return Availability(False, _explain(backend, dtype, device, head_dim, str(error)))
    return Availability(finite, "" if finite else f"the {backend} kernel returned values that are not finite")


def _explain(backend: str, dtype: torch.dtype, device: torch.device, head_dim: int, error: str) -> str:
    name = str(dtype).removeprefix("torch.")
    if backend == "cudnn" and device.type != "cuda":
        return f"cuDNN's attention runs on CUDA devices only, not on {device}: choose math or flash"
    if backend in HALF_ON_CUDA and device.type == "cuda" and dtype not in (torch.bfloat16, torch.float16):
        return f"CUDA's {backend} kernel takes bfloat16 and float16, not {name}: choose another dtype, or math"
    if backend == "flash" and device.type == "cuda" and head_dim > 256:
        return f"CUDA's flash kernel takes a head_dim of at most 256, not {head_dim}: choose math"
    return f"the {backend} kernel does not run in {name} on {device}: {error.strip().splitlines()[0]}"


def check_sdpa_flash_available(dtype: torch.dtype, device: torch.device | str) -> Availability:
    """Whether the flash kernel runs on ``device`` in ``dtype``, found by running it."""
    return check_backend_available("flash", dtype, device)


def _from_environment() -> str:
    value = os.environ.get(FLASH_SDPA)
    choices = {None: DEFAULT_BACKEND, "": DEFAULT_BACKEND, "0": "math", "1": "flash"}
    if value not in choices:
        raise ValueError(f"{FLASH_SDPA} must be 0 or 1, got {value!r}")
    return choices[value]


def default_device() -> torch.device:
    """The first CUDA device, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_attn_backend(
    requested: str | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> str:
    """The backend to run: a name of ``ATTN_BACKENDS``, never ``auto``.

    Args:
        requested: a backend, ``auto`` (flash where it runs, else math), or ``None``: what the environment variable
            ``FLASH_SDPA`` says, else math.
        device, dtype: where and in what it has to run; :func:`default_device` and :func:`select_dtype` if not given.

    Raises:
        ValueError: unknown backend or value of ``FLASH_SDPA``, or the backend does not run here; says why.
    """
    device = default_device() if device is None else torch.device(device)
    dtype = select_dtype(device) if dtype is None else dtype
    if requested == "auto":
        return "flash" if check_sdpa_flash_available(dtype, device) else "math"
    backend = _from_environment() if requested is None else require_backend(requested)
    available = check_backend_available(backend, dtype, device)
    if not available:
        asked = f"{FLASH_SDPA}=1" if requested is None else f"attention backend {backend!r}"
        raise ValueError(f"{asked} cannot run here: {available.reason}")
    return backend


def select_dtype(device: torch.device | str) -> torch.dtype:
    """The dtype for a model on ``device``: on CUDA bfloat16 where supported, else float16; elsewhere float32.

    Half precision is emulated on most CPUs, which would make re-computation look slower than it is.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return torch.float32
    if not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r} was asked for, but no CUDA device is available to PyTorch")
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 8:
        return torch.bfloat16
    return torch.float16 if (major, minor) >= (5, 3) else torch.float32
