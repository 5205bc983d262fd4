"""PyTorch's attention kernels without a mask, and how the results of several are put together.

Which one runs is said by :mod:`.kernel_choice`.

Shapes: query ``[batch, num_heads, q_len, head_dim]``, key and value ``[batch, num_kv_heads, kv_len, head_dim]``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernel_choice
from .math_kernel import Scores, causal_math, explicit_attention


def repeat_heads(query: Tensor, x: Tensor, kernel: str) -> Tensor:
    """Keys or values repeated to one per query head, except where the kernel shares them itself."""
    groups = query.shape[1] // x.shape[1]
    if groups == 1 or kernel == "own" or (kernel == "flash" and query.device.type == "cuda"):
        return x
    return x.repeat_interleave(groups, dim=1)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scores: Scores, mask: Tensor | None = None) -> Tensor:
    """Causal attention whose last query sees the last key (SDPA's ``is_causal`` aligns the first ones).

    Args:
        mask: of a single query, see :func:`.mask_of_empty`.

    Returns:
        Output like ``query``, maybe of higher precision.
    """
    kernel = "math" if mask is not None else kernel_choice.choose_kernel(query, scores.softcap)
    key, value = repeat_heads(query, key, kernel), repeat_heads(query, value, kernel)
    if mask is not None:
        return explicit_attention(query, key, value, scores, mask == 0)[0]
    if kernel == "math":
        return causal_math(query, key, value, scores)
    past = key.shape[2] - query.shape[2]
    attend = WITH_LSE[kernel]
    out, lse = attend(query, key[:, :, past:], value[:, :, past:], scores.scale, causal=True)
    if past:
        older = attend(query, key[:, :, :past], value[:, :, :past], scores.scale, causal=False)
        out, lse = merge(out, lse, *older)
    return out if scores.learned is None else join_learned(out, lse, scores.learned)


def join_learned(out: Tensor, lse: Tensor, learned: Tensor) -> Tensor:
    """Attention with the learned logits of :class:`.Scores`, from that without them and its log-sum-exp."""
    share = torch.sigmoid(lse - learned.to(lse.dtype)[:, None])
    return out * share.unsqueeze(-1)


def flash(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, **window: int
) -> tuple[Tensor, Tensor]:
    """PyTorch's own flash kernel for the device, without a mask.

    Args:
        window: on CUDA alone, ``window_size_left`` and ``window_size_right`` of a band.

    Returns:
        Output like ``query`` and the log-sum-exp of the scores ``[batch, num_heads, q_len]``, float32 or better.
    """
    head_dim = value.shape[-1]
    if query.device.type == "cpu":
        wide = _same_width(query, key, value, 1)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*wide, 0.0, causal, scale=scale)
        return out[..., :head_dim], lse
    out, lse = torch.ops.aten._flash_attention_forward(
        *(x.transpose(1, 2) for x in _same_width(query, key, value, 8)),
        None, None, query.shape[2], key.shape[2], 0.0, causal, False, scale=scale, **window,
    )[:2]  # fmt: skip
    return out.transpose(1, 2)[..., :head_dim], lse


def cudnn(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """cuDNN's attention; arguments and results as of :func:`flash`."""
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *_same_width(query, key, value, 8), None, True, 0.0, causal, False, scale=scale
    )[:2]
    return out[..., : value.shape[-1]], lse.view(query.shape[:3])


def _same_width(query: Tensor, key: Tensor, value: Tensor, multiple: int) -> list[Tensor]:
    """The same with zeros behind each head, as wide as the kernels want them: all alike, a multiple of a number."""
    width = -(-max(query.shape[-1], value.shape[-1]) // multiple) * multiple
    return [x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (query, key, value)]


WITH_LSE: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"flash": flash, "cudnn": cudnn}
"""Kernels that give the log-sum-exp with the result."""


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys from the attention over each.

    Args:
        out, other: ``[..., q_len, head_dim]``.
        lse, other_lse: log-sum-exp of the scores over each set, ``[..., q_len]``.

    Returns:
        Result and log-sum-exp in the precision of the latter, so that merging again does not round again.
    """
    total = torch.logaddexp(lse, other_lse)
    dtype = torch.promote_types(out.dtype, lse.dtype)
    weight, other_weight = ((x - total).exp().unsqueeze(-1).to(dtype) for x in (lse, other_lse))
    return out * weight + other * other_weight, total
