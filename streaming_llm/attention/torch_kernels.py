"""PyTorch's attention kernels without a mask, and how the results of several are put together.

Which one runs is said by :mod:`.kernel_choice`.

Shapes: query ``[batch, num_heads, q_len, head_dim]``, key and value ``[batch, num_heads, kv_len, head_dim]``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .math_kernel import causal_math


def repeat_heads(query: Tensor, x: Tensor, kernel: str) -> Tensor:
    """Keys or values repeated to one per query head, except where the kernel shares them itself."""
    groups = query.shape[1] // x.shape[1]
    if groups == 1 or (kernel == "flash" and query.device.type == "cuda"):
        return x
    return x.repeat_interleave(groups, dim=1)


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    kernel: str,
    softcap: float | None = None,
    learned: Tensor | None = None,
) -> Tensor:
    """Causal attention whose last query sees the last key (SDPA's ``is_causal`` aligns the first ones).

    ``softcap`` and ``learned`` are those of :func:`explicit_attention`.

    The result may be of higher precision than the query.
    """
    q_len, kv_len = query.shape[2], key.shape[2]
    if kernel == "math":
        return causal_math(query, key, value, scale, softcap, learned)
    past = kv_len - q_len
    attend = WITH_LSE[kernel]
    out, lse = attend(query, key[:, :, past:], value[:, :, past:], scale, causal=True)
    if past:
        out, lse = merge(out, lse, *attend(query, key[:, :, :past], value[:, :, :past], scale, causal=False))
    return out if learned is None else join_learned(out, lse, learned)


def join_learned(out: Tensor, lse: Tensor, learned: Tensor) -> Tensor:
    """Attention whose softmax has one more logit of each head ``[num_heads]``, which has no value.

    Args:
        out, lse: attention without it and its log-sum-exp, ``[batch, num_heads, q_len, head_dim]`` and without the
            last dimension.
    """
    share = torch.sigmoid(lse - learned.to(lse.dtype)[:, None])
    return out * share.unsqueeze(-1)


def flash(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """PyTorch's own flash kernel for the device, without a mask.

    Returns:
        Output like ``query`` and the log-sum-exp of the scores ``[batch, num_heads, q_len]``, float32 or better.
    """
    if query.device.type == "cpu":
        wide = _same_width(query, key, value)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*wide, 0.0, causal, scale=scale)
        return out[..., : value.shape[-1]], lse
    return _cuda_flash(query, key, value, scale, causal)


def _same_width(query: Tensor, key: Tensor, value: Tensor, multiple: int = 1) -> list[Tensor]:
    """The same with zeros behind each head, as wide as the kernels want them: all alike, a multiple of a number."""
    width = -(-max(query.shape[-1], value.shape[-1]) // multiple) * multiple
    return [x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (query, key, value)]


def windowed_flash(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int) -> tuple[Tensor, Tensor]:
    """CUDA's flash kernel with a band: query ``i`` sees keys ``i .. i + window`` of ``window + q_len``."""
    return _cuda_flash(query, key, value, scale, True, window_size_left=window, window_size_right=0)


def _cuda_flash(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, **window: int
) -> tuple[Tensor, Tensor]:
    head_dim = value.shape[-1]
    query, key, value = _same_width(query, key, value, 8)
    out, lse = torch.ops.aten._flash_attention_forward(
        *(x.transpose(1, 2) for x in (query, key, value)),
        None, None, query.shape[2], key.shape[2], 0.0, causal, False, scale=scale, **window,
    )[:2]  # fmt: skip
    return out.transpose(1, 2)[..., :head_dim], lse


def cudnn(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """cuDNN's attention; arguments and results as of :func:`flash`."""
    head_dim = value.shape[-1]
    query, key, value = _same_width(query, key, value, 8)
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, causal, False, scale=scale
    )[:2]
    return out[..., :head_dim], lse.view(query.shape[:3])


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
