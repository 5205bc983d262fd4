"""Attention layers whose model file writes the scores out, so that no SDPA kernel has a say: GPT-J's.

Such a layer is given an attention that goes through SDPA, as an attribute of its own; no class is touched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def _gptj_attention(
    layer: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    head_mask: Tensor | None = None,
) -> tuple[Tensor, None]:
    """Like ``GPTJAttention._attn``, without weights: ``[batch, num_heads, q_len, head_dim]`` in and out.

    Raises:
        ValueError: a mask of heads, which SDPA does not take.
    """
    if head_mask is not None:
        raise ValueError("head_mask is not taken by an SDPA kernel: unwrap the attention")
    if attention_mask is not None:
        attention_mask = attention_mask[..., : key.shape[-2]].to(query.dtype)
    dropout = layer.attn_dropout.p if layer.training else 0.0
    scale = float(1 / layer.scale_attn)
    return F.scaled_dot_product_attention(query, key, value, attention_mask, dropout, scale=scale), None


WRITTEN_OUT: dict[str, tuple[str, Callable[..., Any]]] = {"GPTJAttention": ("_attn", _gptj_attention)}
"""Class name of a layer -> the method that holds its attention, and what takes its place."""


def is_written_out(layer: nn.Module) -> bool:
    """Whether a layer goes through SDPA only once :func:`give_sdpa` has been called."""
    return type(layer).__name__ in WRITTEN_OUT


def give_sdpa(layer: nn.Module) -> None:
    """Let a layer of ``WRITTEN_OUT`` go through SDPA; any other stays as it is."""
    if is_written_out(layer):
        name, attention = WRITTEN_OUT[type(layer).__name__]
        layer.__dict__[name] = functools.partial(attention, layer)


def take_sdpa(layer: nn.Module) -> None:
    """Undo :func:`give_sdpa`."""
    if is_written_out(layer):
        layer.__dict__.pop(WRITTEN_OUT[type(layer).__name__][0], None)
