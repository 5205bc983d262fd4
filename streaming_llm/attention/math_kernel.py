"""Exact attention with the scores held in memory: PyTorch's math kernel with a mask, or written out.

For a block of a stream it is one softmax over sinks, previous keys and block with a boolean mask. Queries and keys are
doubled in width, so that the sinks see the turned query and the window sees the query itself.

Shapes: query ``[batch, num_heads, q_len, head_dim]``, key and value ``[batch, num_heads, kv_len, head_dim]``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..rope_utils import compute_dtype
from .plan import BlockPlan

MATH_SCORES_BYTES = 1 << 28
"""Attention scores that are held at a time."""


@dataclass(frozen=True, eq=False)
class Scores:
    """What a layer makes of the products of queries and keys before the softmax.

    Args:
        scale: factor on them.
        softcap: scores ``s`` become ``softcap * tanh(s / softcap)`` (Gemma 2).
        learned: ``[num_heads]``, a logit of each head that takes part in every softmax and has no value (gpt-oss).
    """

    scale: float
    softcap: float | None = None
    learned: Tensor | None = None


def explicit_attention(
    query: Tensor, key: Tensor, value: Tensor, scores: Scores, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention written out, for what no kernel of PyTorch's computes.

    Args:
        mask: boolean, ``[q_len, kv_len]``, true where a query sees a key.

    Returns:
        Output like ``query``, and the weights ``[batch, num_heads, q_len, kv_len]`` in float32 or better.
    """
    logits = (query @ key.transpose(2, 3)).to(compute_dtype(query.dtype)) * scores.scale
    if scores.softcap is not None:
        logits = torch.tanh(logits / scores.softcap) * scores.softcap
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    if scores.learned is not None:
        column = scores.learned.to(logits.dtype)[:, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat((logits, column), dim=-1)
    weights = logits.softmax(-1)[..., : key.shape[2]]
    return weights.to(value.dtype) @ value, weights


def mask_of_empty(ring: Tensor, token: Tensor) -> Tensor:
    """What to add to the scores of one query of each row over a ring's slots, the last of which hold no token yet.

    Args:
        ring: ``[batch, num_kv_heads, slots, head_dim]``.
        token: number of the token at hand, int64 ``[batch]``; it lies in its slot already.

    Returns:
        ``[batch, 1, 1, slots]`` in the dtype of ``ring``: ``-inf`` where there is no token, else 0.
    """
    empty = torch.arange(ring.shape[2], device=ring.device) > token[:, None]
    return ring.new_zeros(empty.shape).masked_fill_(empty, -torch.inf)[:, None, None]


def _masked(query: Tensor, key: Tensor, value: Tensor, scores: Scores, mask: Tensor) -> Tensor:
    if scores.softcap is not None or scores.learned is not None:
        return explicit_attention(query, key, value, scores, mask)[0]
    # The kernel itself: which kernels scaled_dot_product_attention may choose from is a setting of all threads.
    bias = query.new_zeros(mask.shape).masked_fill_(~mask, -torch.inf)
    return torch.ops.aten._scaled_dot_product_attention_math(query, key, value, bias, scale=scores.scale)[0]


def _query_rows(query: Tensor, kv_len: int) -> int:
    """Queries whose scores over ``kv_len`` keys fit in the memory that the math path may use."""
    row_bytes = query.shape[0] * query.shape[1] * kv_len * query.element_size()
    return max(1, MATH_SCORES_BYTES // row_bytes)


def causal_math(query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
    """Causal attention, last query to last key, for as many queries at a time as the scores' memory allows."""
    q_len, kv_len = query.shape[2], key.shape[2]
    step = _query_rows(query, kv_len)
    out = []
    for start in range(0, q_len, step):
        n = min(step, q_len - start)
        visible = kv_len - q_len + start + n  # keys up to the last of these queries
        mask = torch.ones(n, visible, dtype=torch.bool, device=query.device).tril(visible - n)
        rows = (query[:, :, start : start + n], key[:, :, :visible], value[:, :, :visible])
        out.append(_masked(*rows, scores, mask))
    return torch.cat(out, dim=2)


def band_math(
    query: Tensor, turned: Tensor | None, key: Tensor, value: Tensor, plan: BlockPlan, scores: Scores
) -> Tensor:
    """Sinks and window in one softmax, for as many queries at a time as the scores' memory allows.

    Args:
        turned: the queries turned to where the sinks in their first rotation see them; ``None`` without sinks.
        key, value: from ``W`` tokens before the first query on.
    """
    window, n_sink = plan.layout.config.window_size, plan.layout.config.n_sink
    q_len = query.shape[2]
    if turned is not None:
        groups = query.shape[1] // plan.sinks[0].shape[1]
        sink_keys, sink_values = (x.repeat_interleave(groups, dim=1) for x in plan.sinks)
        query = torch.cat((query, turned), dim=-1)
        key = torch.cat((key, torch.zeros_like(key)), dim=-1)
        sink_keys = torch.cat((torch.zeros_like(sink_keys), sink_keys), dim=-1)

    # At least 128 queries at a time, so that a small window is no long loop; fewer where the memory asks for it.
    step = min(max(window, 128), q_len)
    step = min(step, _query_rows(query, n_sink + window + step))
    row = torch.arange(step, device=query.device).unsqueeze(1)
    column = torch.arange(-n_sink, window + step, device=query.device)
    mask = (column < 0) | ((column >= row) & (column <= row + window))  # sinks | own window

    out = []
    for start in range(0, q_len, step):
        n = min(step, q_len - start)
        keys, values = (x[:, :, start : start + window + n] for x in (key, value))
        if turned is not None:
            keys, values = torch.cat((sink_keys, keys), dim=2), torch.cat((sink_values, values), dim=2)
        visible = mask[:n, : n_sink + window + n]
        out.append(_masked(query[:, :, start : start + n], keys, values, scores, visible))
    return torch.cat(out, dim=2)
