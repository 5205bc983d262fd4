"""Forward passes of this library's own, made of Triton kernels and PyTorch's matrix products, for CUDA.

They compute what the family's own forward computes, with fewer passes over memory. The model's own call stays the
reference beside them and is never replaced without being named.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

from torch import Tensor, nn

from ..families import rotary_from_model
from ..placement import why_not_one_cuda_device

FUSED = {"gpt_neox": "neox"}
"""Transformers' ``model_type`` -> module of this package."""


def _module(model: nn.Module) -> ModuleType:
    return importlib.import_module(f".{FUSED[model.config.model_type]}", __name__)


def why_not_fused(model: nn.Module) -> str | None:
    """Why ``model`` cannot go through fused forwards here; ``None`` if it can."""
    if model.config.model_type not in FUSED:
        return f"there are none for model type {model.config.model_type!r} (only for {', '.join(sorted(FUSED))})"
    elsewhere = why_not_one_cuda_device(model)
    if elsewhere:
        return elsewhere
    try:
        module = _module(model)
    except ImportError:
        return "Triton is not installed"
    return module.why_not(model, rotary_from_model(model))


def require_fused(model: nn.Module) -> ModuleType:
    """The module with the forwards of ``model``'s family.

    Raises:
        ValueError: it cannot go through them; says why.
    """
    reason = why_not_fused(model)
    if reason:
        raise ValueError(f"fused forwards cannot run: {reason}")
    return _module(model)


def fused_forward(model: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """A dense causal forward ``[batch, length] -> [batch, vocab]`` (logits of the last token), or ``None``."""
    if why_not_fused(model):
        return None
    forward = _module(model).BlockForward(model, rotary_from_model(model))
    head = model.get_output_embeddings()
    return lambda input_ids: head(forward(input_ids)[:, -1])
