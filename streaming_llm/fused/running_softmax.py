"""Softmax attention of a few queries over keys and values that come tile by tile.

Each query has a running state: the largest score so far, the sum of the weights, and the weighted sum of the values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import capped


@triton.jit
def scores_of(queries, key, softcap, SHARED: tl.constexpr, CAP: tl.constexpr):
    """For each scaled query ``[DIM_P]`` its scores ``[BLOCK]`` with keys ``[BLOCK, DIM_P]``."""
    scores = ()
    for j in tl.static_range(SHARED):
        score = tl.sum(key.to(tl.float32) * queries[j][None, :], 1)
        scores = scores + (capped(score, softcap) if CAP else score,)  # type: ignore[assignment]  # noqa: RUF005 - Triton cannot unpack
    return scores


@triton.jit
def attend(scores, value, visible, state, SHARED: tl.constexpr):
    """Take scores ``[BLOCK]`` and values ``[BLOCK, DIM_P]`` of a tile into the running softmax of each query."""
    value = tl.where(visible[:, None], value.to(tl.float32), 0.0)
    after = ()
    for j in tl.static_range(SHARED):
        largest, total, acc = state[j]
        score = tl.where(visible, scores[j], float("-inf"))
        new = tl.maximum(largest, tl.max(score, 0))
        base = tl.where(new == float("-inf"), 0.0, new)  # nothing has been visible so far
        keep = tl.exp(largest - base)
        weight = tl.exp(score - base)
        acc = acc * keep + tl.sum(weight[:, None] * value, 0)
        after = after + ((new, total * keep + tl.sum(weight, 0), acc),)  # type: ignore[assignment]  # noqa: RUF005
    return after


@triton.jit
def put_together(
    partial_ptr, first, stats, STEP: tl.constexpr, SPLITS: tl.constexpr, PARTS: tl.constexpr, DIM_P: tl.constexpr
):  # fmt: skip
    """One head ``[DIM_P]`` from the parts ``first``, ``first + STEP``, ... of it; at ``stats`` lie peaks and sums."""
    dims = tl.arange(0, DIM_P)
    accs_ptr, peaks_ptr = partial_ptr + first * DIM_P, partial_ptr + stats + first * 2
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    acc = tl.zeros((DIM_P,), tl.float32)
    for part0 in tl.static_range(0, SPLITS, PARTS):
        part = part0 + tl.arange(0, PARTS)
        exists = part < SPLITS
        peaks = tl.load(peaks_ptr + part * (2 * STEP), exists, float("-inf"), cache_modifier=".cg")
        sums = tl.load(peaks_ptr + part * (2 * STEP) + 1, exists, 0.0, cache_modifier=".cg")
        at = part[:, None] * (STEP * DIM_P) + dims[None, :]
        accs = tl.load(accs_ptr + at, exists[:, None], 0.0, cache_modifier=".cg")
        new = tl.maximum(largest, tl.max(peaks, 0))  # finite: the first part has seen the token itself
        keep, share = tl.exp(largest - new), tl.exp(peaks - new)
        acc = acc * keep + tl.sum(accs * share[:, None], 0)
        total = total * keep + tl.sum(sums * share, 0)
        largest = new
    return acc / total
