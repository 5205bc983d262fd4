"""Which attention kernel is meant: by PyTorch's settings in force, and by the adapter on a layer.

The library knows the adapters of ``personal_adapters`` by this protocol alone. An adapter takes the place of an
attention layer in the module tree, and has

* ``wrapped``: the attention layer itself,
* ``backend``: the name of the one kernel that it allows,
* ``kernel_context()``: a context manager in which PyTorch allows that kernel and no other.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

OWN_MODULES = ("torch.nn.", "transformers.", "streaming_llm.", "personal_adapters.")
"""Where the classes of a model come from that no other library has put anything into."""


def unwrapped(layer: nn.Module) -> nn.Module:
    """The attention layer in an adapter; a layer without one is returned as it is."""
    return getattr(layer, "wrapped", layer)


def kernel_context(layer: nn.Module) -> AbstractContextManager[None]:
    """The kernels that an attention layer asks for, if it is wrapped in an adapter."""
    return getattr(layer, "kernel_context", nullcontext)()


def _is_adapter(layer: nn.Module | None) -> bool:
    return hasattr(type(layer), "kernel_context")  # of the class: a module looks long for what it has not


def adapters(model: nn.Module) -> list[nn.Module]:
    """The adapters in a model."""
    return [module for module in model.modules() if _is_adapter(module)]


Place = tuple[dict[str, nn.Module | None], str]
"""Where a module lies: the children of its parent, and its name."""


def attention_places(model: nn.Module) -> list[Place]:
    """Where a model has its attention layers, or adapters in their place: what stores keys knows its ``layer_idx``."""
    tables = (module._modules for module in model.modules())
    return [(table, name) for table in tables for name, child in table.items() if hasattr(child, "layer_idx")]


def kernels_in_force(places: list[Place]) -> tuple[Any, ...]:
    """What decides the kernels of a model: PyTorch's settings, and the backend of an adapter that lies in a place."""
    flags = torch.backends.cuda
    allowed = (
        flags.math_sdp_enabled(),
        flags.flash_sdp_enabled(),
        flags.mem_efficient_sdp_enabled(),
        flags.cudnn_sdp_enabled(),
    )
    layers: Any = (table[name] for table, name in places)
    return (*allowed, *(layer.backend if _is_adapter(layer) else None for layer in layers))


def takes_mask(model: nn.Module) -> bool:
    """Whether the math kernel, which takes a mask, is allowed in every attention layer of a model."""
    backends = {adapter.backend for adapter in adapters(model)}
    return backends == {"math"} if backends else torch.backends.cuda.math_sdp_enabled()


def choose_kernel(query: Tensor, softcap: float | None = None) -> str:
    """The kernel to use among those that are allowed for SDPA: ``flash``, else ``math``, else ``cudnn``.

    Only math will do with gradients, since the other operators do not differentiate the log-sum-exp that results are
    merged by, and for scores that are soft-capped, which have to be written out.

    Raises:
        RuntimeError: none of the allowed kernels can do it.
    """
    if softcap is not None and not torch.backends.cuda.math_sdp_enabled():
        raise RuntimeError(
            f"no allowed attention kernel soft-caps scores (at {softcap}): allow math, which writes the scores out"
        )
    needs_grad = torch.is_grad_enabled() and query.requires_grad
    on_cuda = query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256
    flash_runs = query.device.type == "cpu" or (query.device.type == "cuda" and on_cuda)
    if flash_runs and not needs_grad and softcap is None and torch.backends.cuda.flash_sdp_enabled():
        return "flash"
    if torch.backends.cuda.math_sdp_enabled():
        return "math"
    if query.device.type == "cuda" and on_cuda and not needs_grad and torch.backends.cuda.cudnn_sdp_enabled():
        return "cudnn"
    raise RuntimeError(
        f"no allowed attention kernel takes a block of {query.dtype} with head_dim {query.shape[-1]} on "
        f"{query.device.type}{' with gradients' if needs_grad else ''}: allow math, or flash or cudnn with bfloat16 "
        "or float16 under torch.no_grad()"
    )
