"""Softmax attention of a few queries over keys and values that come tile by tile.

Each query has a running state: the largest score so far, the sum of the weights, and the weighted sum of the values.
A single query, ``H`` is 1, comes without the first dimension of what is described here; its products are summed up.
Those of several go through the matrix units.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import capped


@triton.jit
def nothing_seen(H: tl.constexpr, DIM_P: tl.constexpr):
    """The state before the first tile: largest ``[H]``, total ``[H]``, acc ``[H, DIM_P]``."""
    if H == 1:
        return tl.full((), float("-inf"), tl.float32), tl.zeros((), tl.float32), tl.zeros((DIM_P,), tl.float32)
    else:
        total = tl.zeros((H,), tl.float32)
        return total + float("-inf"), total, tl.zeros((H, DIM_P), tl.float32)


@triton.jit
def scores_of(queries, key, softcap, H: tl.constexpr, CAP: tl.constexpr):
    """Scores ``[H, BLOCK]`` of scaled queries ``[H, DIM_P]``, float32, with keys ``[BLOCK, DIM_P]``."""
    if H == 1:
        scores = tl.sum(key.to(tl.float32) * queries[None, :], 1)
    else:
        high, keys = queries.to(key.dtype), tl.trans(key)
        scores = tl.dot(high, keys, input_precision="ieee")
        if key.dtype != tl.float32:  # what rounding took off the queries has a product of its own
            scores = tl.dot((queries - high.to(tl.float32)).to(key.dtype), keys, scores)
    return capped(scores, softcap) if CAP else scores


@triton.jit
def attend(scores, value, visible, largest, total, acc, H: tl.constexpr):
    """Take scores ``[H, BLOCK]`` and values ``[BLOCK, DIM_P]`` of a tile into the running softmax of each query.

    Args:
        visible: ``[BLOCK]``.
        largest, total, acc: the state: ``[H]``, ``[H]``, ``[H, DIM_P]``; the next one is returned.
    """
    scores = tl.where(visible, scores, float("-inf"))
    new = tl.maximum(largest, tl.max(scores, -1))
    base = tl.where(new == float("-inf"), 0.0, new)  # nothing has been visible so far
    keep = tl.exp(largest - base)
    weights = tl.exp(scores - of_each(base, H))
    if H == 1:
        value = tl.where(visible[:, None], value.to(tl.float32), 0.0)
        added = tl.sum(weights[:, None] * value, 0)
    else:
        added = tl.dot(weights.to(value.dtype), tl.where(visible[:, None], value, 0.0), input_precision="ieee")
    return new, total * keep + tl.sum(weights, -1), acc * of_each(keep, H) + added


@triton.jit
def of_each(x, H: tl.constexpr):
    """A number of each query beside its row: ``[H]`` as ``[H, 1]``."""
    return x if H == 1 else x[:, None]


@triton.jit
def put_together(
    partial_ptr, peaks_ptr, H: tl.constexpr, SPLITS: tl.constexpr, PARTS: tl.constexpr, DIM_P: tl.constexpr
):
    """Results ``[H, DIM_P]`` of ``SPLITS`` parts: sums of values ``[H, DIM_P]``, peaks beside sums ``[H, 2]``."""
    dims, heads = tl.arange(0, DIM_P), tl.arange(0, H)
    largest, total, acc = nothing_seen(H, DIM_P)
    for first in tl.static_range(0, SPLITS, PARTS):
        part = first + tl.arange(0, PARTS)
        exists = part < SPLITS
        head = part if H == 1 else part[:, None] * H + heads
        there = exists if H == 1 else exists[:, None]
        peaks = tl.load(peaks_ptr + head * 2, there, float("-inf"), cache_modifier=".cg")
        sums = tl.load(peaks_ptr + head * 2 + 1, there, 0.0, cache_modifier=".cg")
        at = tl.expand_dims(head, -1) * DIM_P + dims
        accs = tl.load(partial_ptr + at, tl.expand_dims(there, -1), 0.0, cache_modifier=".cg")
        new = tl.maximum(largest, tl.max(peaks, 0))  # finite: the first part has seen the token itself
        keep, share = tl.exp(largest - new), tl.exp(peaks - new)
        acc = acc * of_each(keep, H) + tl.sum(accs * tl.expand_dims(share, -1), 0)
        total = total * keep + tl.sum(sums * share, 0)
        largest = new
    return acc / of_each(total, H)
