"""Attention of many new tokens, each over its own window and the sinks, in one kernel.

A program has some queries of a head. It begins with the sinks, with the queries turned to their distance, and goes
over the keys from the first that its first query sees to the last that its last one does; only at both ends tiles need
a mask. Nothing but the result is written.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..attention.math_kernel import Scores
from ..attention.triton_kernels import Sinks, turned_to_sinks
from ..launch import launch, shared_memory
from .activations import capped
from .running_softmax import nothing_seen, scores_of

TILES = {
    64: {"BLOCK_M": 128, "BLOCK_N": 64, "STAGES": 3, "num_warps": 8},
    128: {"BLOCK_M": 128, "BLOCK_N": 64, "STAGES": 2, "num_warps": 8, "maxnreg": 128},
    256: {"BLOCK_M": 128, "BLOCK_N": 64, "STAGES": 2, "num_warps": 8},
}
"""By the dimensions of a head, at most: queries of a program, keys of a tile, tiles on their way, warps, and registers
of a thread (128: two programs on a multiprocessor, of which one computes while the other takes its softmax). The
fastest on an H100 of up to seven tried, with a window of 2,048 in bfloat16."""

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _attend(scores, value, state, factor, SEEN: tl.constexpr):
    """Take scores ``[M, N]``, which ``factor`` makes logarithms to base 2, and values ``[N, DIM_P]`` into a softmax.

    Args:
        state: the largest score so far by ``factor`` ``[M]``, the sum of the weights ``[M]``, and that of the values
            ``[M, DIM_P]``. The next one is returned.
        factor: above 0.
        SEEN: every query has seen a key, with these.
    """
    largest, total, acc = state
    new = tl.maximum(largest, tl.max(scores, 1) * factor)
    base = new if SEEN else tl.where(new == float("-inf"), 0.0, new)
    keep = tl.exp2(largest - base)
    weights = tl.exp2(scores * factor - base[:, None])
    acc = tl.dot(weights.to(value.dtype), value, acc * keep[:, None], input_precision="ieee")
    return new, total * keep + tl.sum(weights, 1), acc


@triton.jit
def _over_keys(
    state, query, position, begin, end, keys, values, batch, kv_head, window, scale, softcap,
    MASKED: tl.constexpr, WINDOWED: tl.constexpr, CAP: tl.constexpr, DIM_P: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The state of a softmax with keys from ``begin`` on, in whole tiles until ``end`` is reached.

    Args:
        position: of each query among the keys, ``[M]``: that of the last one that it sees.
        MASKED: not every query sees each of them.
    """
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        key = tl.reshape(keys.load([batch, kv_head, start, 0]), (BLOCK_N, DIM_P))
        value = tl.reshape(values.load([batch, kv_head, start, 0]), (BLOCK_N, DIM_P))
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        factor = scale * LOG2_E
        if CAP:
            scores, factor = capped(scores * scale, softcap), LOG2_E
        if MASKED:
            at = start + tl.arange(0, BLOCK_N)[None, :]
            visible = at <= position[:, None]
            if WINDOWED:
                visible &= at >= position[:, None] - window
            scores = tl.where(visible, scores, float("-inf"))
        state = _attend(scores, value, state, factor, not MASKED)
    return state


@triton.jit
def _over_sinks(
    state, query, q, rows, in_rows, k_ptr, v_ptr, k_step, v_step, cos_ptr, sin_ptr, scale, softcap,
    CAP: tl.constexpr, N_SINK: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, HEAD_DIM: tl.constexpr,
    DIM_P: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The state of a softmax with the sinks.

    Args:
        q: where each query begins, ``[M, 1]``.
    """
    dims = tl.arange(0, DIM_P)
    inside = (dims < HEAD_DIM)[None, :]
    turned = turned_to_sinks(query, q, rows.to(tl.int64), in_rows, cos_ptr, sin_ptr, HALF, INTERLEAVED, DIM_P)
    for start in tl.range(0, N_SINK, 16, num_stages=1):  # as few as the matrix units take
        sink = start + tl.arange(0, 16)
        mask = (sink < N_SINK)[:, None] & inside
        key = tl.load(k_ptr + sink[:, None] * k_step + dims[None, :], mask, 0.0)
        value = tl.load(v_ptr + sink[:, None] * v_step + dims[None, :], mask, 0.0)
        scores = scores_of(turned * scale, key, softcap, BLOCK_M, CAP)
        scores = tl.where((sink < N_SINK)[None, :], scores, float("-inf"))
        state = _attend(scores, value, state, LOG2_E, True)
    return state


@triton.jit
def _band_attention(
    q_ptr, keys, values, out_ptr, sink_k_ptr, sink_v_ptr, cos_ptr, sin_ptr, q_len, kv_len, num_heads, groups,
    window, scale, softcap, q_b, q_h, q_m, sink_k_b, sink_k_h, sink_k_n, sink_v_b, sink_v_h, sink_v_n, out_b,
    WINDOWED: tl.constexpr, CAP: tl.constexpr, N_SINK: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # without a window the last have the most keys
    rows = first + tl.arange(0, BLOCK_M)
    head, batch = tl.program_id(1), tl.program_id(2)
    kv_head = head // groups
    dims = tl.arange(0, DIM_P)
    in_rows, inside = (rows < q_len)[:, None], (dims < HEAD_DIM)[None, :]
    q = q_ptr + batch.to(tl.int64) * q_b + head.to(tl.int64) * q_h + rows.to(tl.int64)[:, None] * q_m
    query = tl.load(q + dims[None, :], in_rows & inside, 0.0)
    state = nothing_seen(BLOCK_M, DIM_P)
    if N_SINK > 0:
        state = _over_sinks(
            state, query, q, rows, in_rows,
            sink_k_ptr + batch.to(tl.int64) * sink_k_b + kv_head.to(tl.int64) * sink_k_h,
            sink_v_ptr + batch.to(tl.int64) * sink_v_b + kv_head.to(tl.int64) * sink_v_h,
            sink_k_n, sink_v_n, cos_ptr, sin_ptr, scale, softcap,
            CAP, N_SINK, HALF, INTERLEAVED, HEAD_DIM, DIM_P, BLOCK_M,
        )  # fmt: skip

    # Keys in tiles: some queries see those from `begin` on, all those from `all_see` until `all_saw`, some the rest.
    nearest = kv_len - q_len + first
    position = kv_len - q_len + rows
    end = tl.minimum(nearest + BLOCK_M, kv_len)
    begin, all_see = first * 0, first * 0
    if WINDOWED:
        begin = tl.maximum(nearest - window, 0) // BLOCK_N * BLOCK_N
        all_see = tl.cdiv(tl.maximum(nearest + BLOCK_M - 1 - window, 0), BLOCK_N) * BLOCK_N
        state = _over_keys(
            state, query, position, begin, tl.minimum(all_see, end), keys, values, batch, kv_head, window, scale,
            softcap, True, WINDOWED, CAP, DIM_P, BLOCK_N, STAGES,
        )  # fmt: skip
    all_saw = tl.maximum((nearest + 1) // BLOCK_N * BLOCK_N, all_see)
    state = _over_keys(
        state, query, position, all_see, all_saw, keys, values, batch, kv_head, window, scale, softcap,
        False, WINDOWED, CAP, DIM_P, BLOCK_N, STAGES,
    )  # fmt: skip
    state = _over_keys(
        state, query, position, all_saw, end, keys, values, batch, kv_head, window, scale, softcap,
        True, WINDOWED, CAP, DIM_P, BLOCK_N, STAGES,
    )  # fmt: skip
    of_row = batch.to(tl.int64) * out_b + (rows.to(tl.int64)[:, None] * num_heads + head) * HEAD_DIM
    out = state[2] / state[1][:, None]
    tl.store(out_ptr + of_row + dims[None, :], out.to(out_ptr.dtype.element_ty), in_rows & inside)


def can_attend(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether :func:`band_attention` is for heads of this kind.

    In float32 it would multiply without the matrix units; and tiles are copied by hardware that wants rows to begin at
    multiples of 16 bytes.
    """
    return dtype in (torch.float16, torch.bfloat16) and not head_dim % 8 and head_dim <= max(TILES)


def tile_for(dim_p: int, element_size: int, limit: int) -> dict[str, Any]:
    """A row of ``TILES``, or what of it goes into ``limit`` bytes of shared memory."""
    tile: dict[str, Any] = dict(TILES[min(most for most in TILES if dim_p <= most)])

    def need() -> int:
        return (tile["BLOCK_M"] + 2 * tile["STAGES"] * tile["BLOCK_N"]) * dim_p * element_size

    while need() > limit and tile["STAGES"] > 1:
        tile["STAGES"] -= 1
    while need() > limit and tile["BLOCK_M"] > 16:
        tile |= {"BLOCK_M": tile["BLOCK_M"] // 2, "BLOCK_N": max(16, tile["BLOCK_N"] // 2), "num_warps": 4}
    return tile


def band_attention(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, window: int | None, scores: Scores, sinks: Sinks | None
) -> None:
    """Causal attention whose last query sees the last key, over a window and sinks.

    Args:
        query: ``[batch, num_heads, q_len, head_dim]``; the last dimension of all tensors is contiguous. See
            :func:`can_attend`.
        key, value: ``[batch, num_kv_heads, kv_len, head_dim]``, ``kv_len >= q_len``.
        out: ``[batch, q_len, num_heads, head_dim]``, its last three dimensions contiguous.
        window: keys before its own that a query sees; ``None``: all.
        scores: with a factor above 0, and no learned logits.
        sinks: seen by every query, beside these keys.
    """
    batch, num_heads, q_len, head_dim = query.shape
    num_kv_heads, kv_len = key.shape[1:3]
    given = sinks or Sinks(key[:, :, :0], value[:, :, :0], query[0, 0, :, :0], query[0, 0, :, :0], False)
    dim_p = max(16, triton.next_power_of_2(head_dim))
    tile = tile_for(dim_p, query.element_size(), shared_memory(query.device))
    box = [1, 1, tile["BLOCK_N"], dim_p]
    launch(
        _band_attention, (triton.cdiv(q_len, tile["BLOCK_M"]), num_heads, batch),
        query, TensorDescriptor.from_tensor(key, box), TensorDescriptor.from_tensor(value, box), out,
        given.keys, given.values, given.cos, given.sin, q_len, kv_len, num_heads, num_heads // num_kv_heads,
        window or 0, scores.scale, scores.softcap or 0.0,
        *query.stride()[:3], *given.keys.stride()[:3], *given.values.stride()[:3], out.stride(0),
        WINDOWED=window is not None, CAP=scores.softcap is not None, N_SINK=given.keys.shape[2],
        HALF=given.cos.shape[1], INTERLEAVED=given.interleaved, HEAD_DIM=head_dim, DIM_P=dim_p, **tile,
    )  # fmt: skip
