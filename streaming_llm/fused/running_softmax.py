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
    """Results ``[H * DIM_P]`` of ``SPLITS`` parts: sums of values ``[H, DIM_P]``, peaks beside sums ``[H, 2]``.

    ``PARTS`` are taken at a time. The first of all has seen the token itself, so that its peak is finite.
    """
    if H == 1:  # the program has one warp
        return _shared_out_by_part(partial_ptr, peaks_ptr, SPLITS, PARTS, DIM_P)
    else:
        return _shared_out_by_element(partial_ptr, peaks_ptr, H, SPLITS, PARTS, DIM_P)


@triton.jit
def _shared_out_by_element(
    partial_ptr, peaks_ptr, H: tl.constexpr, SPLITS: tl.constexpr, PARTS: tl.constexpr, DIM_P: tl.constexpr
):
    """Each thread has the same elements of every part, so that no warp waits for another."""
    WHOLE: tl.constexpr = SPLITS // PARTS * PARTS
    acc = tl.zeros((H * DIM_P,), tl.float32)
    largest, total = acc + float("-inf"), acc
    for first in tl.range(0, WHOLE, PARTS, num_stages=1):  # unrolled it would take minutes to compile
        largest, total, acc = _take(partial_ptr, peaks_ptr, first, largest, total, acc, H, PARTS, DIM_P)
    if WHOLE < SPLITS:
        largest, total, acc = _take(partial_ptr, peaks_ptr, WHOLE, largest, total, acc, H, SPLITS - WHOLE, DIM_P)
    return acc / total


@triton.jit
def _take(
    partial_ptr, peaks_ptr, first, largest, total, acc, H: tl.constexpr, PARTS: tl.constexpr, DIM_P: tl.constexpr
):
    """The running state of each element ``[H * DIM_P]`` with ``PARTS`` more parts, all asked for at once."""
    at = tl.arange(0, H * DIM_P)
    head = at // DIM_P
    peaks, sums, accs, new = (), (), (), largest
    for i in tl.static_range(PARTS):
        part = first + i
        peak_ptr = peaks_ptr + (part * H + head) * 2
        peak = tl.load(peak_ptr, cache_modifier=".cg")
        new = tl.maximum(new, peak)
        peaks = peaks + (peak,)  # type: ignore[assignment]  # noqa: RUF005 - Triton cannot unpack
        sums = sums + (tl.load(peak_ptr + 1, cache_modifier=".cg"),)  # type: ignore[assignment]  # noqa: RUF005
        added = tl.load(partial_ptr + part * H * DIM_P + at, cache_modifier=".cg")
        accs = accs + (added,)  # type: ignore[assignment]  # noqa: RUF005
    keep = tl.exp(largest - new)
    acc, total = acc * keep, total * keep
    for i in tl.static_range(PARTS):
        share = tl.exp(peaks[i] - new)
        acc += accs[i] * share
        total += sums[i] * share
    return new, total, acc


@triton.jit
def _shared_out_by_part(partial_ptr, peaks_ptr, SPLITS: tl.constexpr, PARTS: tl.constexpr, DIM_P: tl.constexpr):
    """Each thread has some of the parts, which makes for fewer and wider requests."""
    dims = tl.arange(0, DIM_P)
    largest, total, acc = nothing_seen(1, DIM_P)
    for first in tl.static_range(0, SPLITS, PARTS):
        part = first + tl.arange(0, PARTS)
        exists = part < SPLITS
        peaks = tl.load(peaks_ptr + part * 2, exists, float("-inf"), cache_modifier=".cg")
        sums = tl.load(peaks_ptr + part * 2 + 1, exists, 0.0, cache_modifier=".cg")
        at = part[:, None] * DIM_P + dims
        accs = tl.load(partial_ptr + at, exists[:, None], 0.0, cache_modifier=".cg")
        new = tl.maximum(largest, tl.max(peaks, 0))
        keep, share = tl.exp(largest - new), tl.exp(peaks - new)
        acc = acc * keep + tl.sum(accs * share[:, None], 0)
        total = total * keep + tl.sum(sums * share, 0)
        largest = new
    return acc / total
