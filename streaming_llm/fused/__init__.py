"""Forward passes of this library's own, made of Triton kernels and PyTorch's matrix products, for CUDA.

They compute what the model's own forward computes, with fewer passes over memory: any model whose layers a recipe
(:mod:`.recipe`) describes, in blocks of tokens (:mod:`.block`) and in single tokens (:mod:`.step`). The model's own
call stays the reference beside them and is never replaced without being named.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..families import last_logits
from ..kv_cache import StreamingKVCache
from ..placement import why_not_one_cuda_device
from .family_recipes import recipe_of
from .refusals import why_not

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def why_not_fused(model: nn.Module) -> str | None:
    """Why ``model`` cannot go through fused forwards here; ``None`` if it can."""
    reason = why_not_one_cuda_device(model) or why_not(model)
    return reason or (None if _HAS_TRITON else "Triton is not installed")


def require_fused(model: nn.Module) -> None:
    """Raise ``ValueError`` if ``model`` cannot go through fused forwards here, and say why."""
    if reason := why_not_fused(model):
        raise ValueError(f"fused forwards cannot run: {reason}")


def fused_blocks(model: nn.Module, *, own_attention: bool = False) -> Callable[..., Tensor]:
    """A forward of many tokens, see :class:`.block.BlockForward`; ``ValueError`` where it cannot run."""
    require_fused(model)
    from .block import BlockForward

    return BlockForward(model, own_attention=own_attention)


def has_own_attention(model: nn.Module) -> bool:
    """Whether blocks of a model that can go through fused forwards can have this library's own attention kernel."""
    from .band_attention import can_attend

    recipe = recipe_of(model)
    return all(can_attend(recipe.embedding.dtype, layer.attention.head_dim) for layer in recipe.layers)


def fused_step(model: nn.Module, cache: StreamingKVCache, *, own_attention: bool, logits: Tensor) -> Any:
    """A forward of one token, to be recorded, see :class:`.step.StepForward`; ``ValueError`` where it cannot run."""
    require_fused(model)
    from .step import StepForward

    return StepForward(recipe_of(model), cache, own_attention=own_attention, logits=logits)


def sampler_of(logits: Tensor) -> Any:
    """What draws tokens from logits like these, ``[batch, vocab]``, with its settings on the device.

    Returns:
        A :class:`.sampling.HistogramSampler`; ``None`` where logits are not of half precision or Triton is missing.
    """
    if logits.dtype not in (torch.bfloat16, torch.float16) or not _HAS_TRITON:
        return None
    from .sampling import HistogramSampler

    batch, vocab = logits.shape
    return HistogramSampler(batch, vocab, logits.device)


def fused_forward(model: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """A dense causal forward ``[batch, length] -> [batch, vocab]`` (logits of the last token), or ``None``."""
    if why_not_fused(model):
        return None
    forward = fused_blocks(model)
    return lambda input_ids: last_logits(model, forward(input_ids))
