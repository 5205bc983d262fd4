"""Attention of one new token of each stream over its ring, on the device alone, for rings filled to any degree.

One kernel norms and rotates query and key, stores key and value in their slot, and attends: no shape and no launch
depends on the position. Up to ``MOST_SHARED`` query heads go through the keys that they share together, so that keys
and values are read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..cache_layer import StreamingLayer
from ..launch import launch, wait_for_input
from .activations import capped
from .heads import load_head, rotate
from .norms import pointers_of, rstd_of
from .recipe import Attention
from .rings import RingState
from .running_softmax import attend, put_together, scores_of

MOST_SHARED = 8
"""Query heads of a program: their running results are held in registers."""


@triton.jit
def _queries(
    given, angles_ptr, scale,
    WIDTH: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, GROUPS: tl.constexpr, SHARED: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM_P: tl.constexpr, Q_STEP: tl.constexpr, NORM: tl.constexpr, NORM_STEP: tl.constexpr,
):  # fmt: skip
    """The queries ``[DIM_P]`` of a program, normed, rotated by the angles given, and scaled.

    Args:
        given: the row's heads, which of them are the program's, and their norm.
    """
    qkv, kv_head, chunk, norm_w, norm_b, eps, rstd = given
    queries = ()
    for j in tl.static_range(SHARED):
        group = tl.minimum(chunk * SHARED + j, GROUPS - 1)
        x, partner = load_head(
            qkv + (kv_head * Q_STEP + group) * HEAD_DIM, kv_head * GROUPS + group, norm_w, norm_b, eps, rstd,
            HALF, INTERLEAVED, HEAD_DIM, DIM_P, NORM, NORM_STEP,
        )  # fmt: skip
        queries = queries + (rotate(x, partner, angles_ptr, WIDTH, HALF, INTERLEAVED, DIM_P) * scale,)  # type: ignore[assignment]  # noqa: RUF005
    return queries


@triton.jit
def _with_sinks(
    scores, to_sinks, key, token, given, angles_ptr, scale, softcap,
    N_SINK: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, GROUPS: tl.constexpr,
    SHARED: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_P: tl.constexpr, Q_STEP: tl.constexpr, NORM: tl.constexpr,
    NORM_STEP: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """The scores, with those of sinks by queries that are turned for them, since sinks lie as first rotated.

    A single query comes turned, ``to_sinks``, so that one wait serves all; several are turned here, so that they take
    no registers from then on.
    """
    if SHARED > 1:
        to_sinks = _queries(
            given, angles_ptr + 2 * WIDTH, scale,
            WIDTH, HALF, INTERLEAVED, GROUPS, SHARED, HEAD_DIM, DIM_P, Q_STEP, NORM, NORM_STEP,
        )  # fmt: skip
    of_sinks = scores_of(to_sinks, key, softcap, SHARED, CAP)
    after = ()
    for j in tl.static_range(SHARED):
        after = after + (tl.where(token < N_SINK, of_sinks[j], scores[j]),)  # type: ignore[assignment]  # noqa: RUF005
    return after


@triton.jit
def _ring_attention(
    qkv_ptr, k_ptr, v_ptr, sinks_ptr, out_ptr, partial_ptr, arrived_ptr, counters_ptr, angles_ptr,
    q_norm_w, q_norm_b, k_norm_w, k_norm_b, q_eps, k_eps, scale, softcap,
    CAPACITY: tl.constexpr, N_SINK: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SHARED: tl.constexpr, CHUNKS: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM_P: tl.constexpr, QKV_WIDTH: tl.constexpr, Q_STEP: tl.constexpr,
    K_START: tl.constexpr, K_STEP: tl.constexpr, V_START: tl.constexpr, V_STEP: tl.constexpr,
    NORM: tl.constexpr, NORM_STEP: tl.constexpr, CAP: tl.constexpr, SPLITS: tl.constexpr, PARTS: tl.constexpr,
    SPLIT_LEN: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = HEADS // KV_HEADS
    program, split = tl.program_id(0), tl.program_id(1)
    chunk, kv_head = program % CHUNKS, program // CHUNKS % KV_HEADS
    ring, row = (program // CHUNKS).to(tl.int64), (program // CHUNKS // KV_HEADS).to(tl.int64)
    dims = tl.arange(0, DIM_P)
    inside = dims < HEAD_DIM
    k_ptr += ring * CAPACITY * HEAD_DIM
    v_ptr += ring * CAPACITY * HEAD_DIM
    counters_ptr += row * 2
    angles_ptr += row * 6 * WIDTH
    first = split * SPLIT_LEN
    last = tl.where(split == SPLITS - 1, CAPACITY, first + SPLIT_LEN)
    # Of what is stored only the token's own slot changes in this step, and that is not read from here.
    token = first + tl.arange(0, BLOCK)
    at = token[:, None] * HEAD_DIM + dims[None, :]
    in_ring = (token < last)[:, None] & inside[None, :]
    key, value = tl.load(k_ptr + at, in_ring, 0.0), tl.load(v_ptr + at, in_ring, 0.0)
    wait_for_input(PDL)
    now, slot = tl.load(counters_ptr), tl.load(counters_ptr + 1)
    qkv = qkv_ptr + row * QKV_WIDTH
    q_rstd = 0.0
    k_rstd = 0.0
    if NORM == "all":
        q_rstd = rstd_of(qkv, q_eps, HEADS * HEAD_DIM, 1024)
        k_rstd = rstd_of(qkv + K_START * HEAD_DIM, k_eps, KV_HEADS * HEAD_DIM, 1024)
    given = qkv, kv_head, chunk, q_norm_w, q_norm_b, q_eps, q_rstd
    queries = _queries(
        given, angles_ptr, scale,
        WIDTH, HALF, INTERLEAVED, GROUPS, SHARED, HEAD_DIM, DIM_P, Q_STEP, NORM, NORM_STEP,
    )  # fmt: skip
    to_sinks = queries
    if N_SINK > 0 and SHARED == 1:
        to_sinks = _queries(
            given, angles_ptr + 2 * WIDTH, scale,
            WIDTH, HALF, INTERLEAVED, GROUPS, SHARED, HEAD_DIM, DIM_P, Q_STEP, NORM, NORM_STEP,
        )  # fmt: skip
    state = ()
    for _ in tl.static_range(SHARED):
        largest = tl.full((), float("-inf"), tl.float32)
        state = state + ((largest, tl.zeros((), tl.float32), tl.zeros((DIM_P,), tl.float32)),)  # type: ignore[assignment]  # noqa: RUF005
    if split == 0:  # the token itself, which no other program reads
        k, partner = load_head(
            qkv + (K_START + kv_head * K_STEP) * HEAD_DIM, kv_head, k_norm_w, k_norm_b, k_eps, k_rstd,
            HALF, INTERLEAVED, HEAD_DIM, DIM_P, NORM, NORM_STEP,
        )  # fmt: skip
        new_key = rotate(k, partner, angles_ptr, WIDTH, HALF, INTERLEAVED, DIM_P).to(k_ptr.dtype.element_ty)
        v_at = qkv + (V_START + kv_head * V_STEP) * HEAD_DIM
        new_value = tl.load(v_at + dims, inside, 0.0).to(v_ptr.dtype.element_ty)
        if chunk == 0:
            tl.store(k_ptr + slot * HEAD_DIM + dims, new_key, inside)
            tl.store(v_ptr + slot * HEAD_DIM + dims, new_value, inside)
            if N_SINK > 0:
                first_copy = sinks_ptr + (ring * N_SINK + slot) * HEAD_DIM
                tl.store(first_copy + dims, new_key, inside & (slot < N_SINK))
        begun = ()
        for j in tl.static_range(SHARED):
            score = tl.sum(queries[j] * new_key.to(tl.float32), 0)
            score = capped(score, softcap) if CAP else score
            begun = begun + ((score, state[j][1] + 1.0, state[j][2] + new_value.to(tl.float32)),)  # type: ignore[assignment]  # noqa: RUF005
        state = begun

    end = tl.minimum(last, now).to(tl.int32)  # what lies behind has never been written
    visible = (token < end) & (token != slot)
    scores = scores_of(queries, key, softcap, SHARED, CAP)
    if N_SINK > 0:
        if first < N_SINK:
            scores = _with_sinks(
                scores, to_sinks, key, token, given, angles_ptr, scale, softcap,
                N_SINK, WIDTH, HALF, INTERLEAVED, GROUPS, SHARED, HEAD_DIM, DIM_P, Q_STEP, NORM, NORM_STEP, CAP,
            )  # fmt: skip
    state = attend(scores, value, visible, state, SHARED)
    start = first + BLOCK
    while start < end:
        token = start + tl.arange(0, BLOCK)
        visible = (token < end) & (token != slot)
        at = token[:, None] * HEAD_DIM + dims[None, :]
        mask = visible[:, None] & inside[None, :]
        key, value = tl.load(k_ptr + at, mask, 0.0), tl.load(v_ptr + at, mask, 0.0)
        scores = scores_of(queries, key, softcap, SHARED, CAP)
        # With one query a branch behind which no request is moved: both tiles are asked for at once.
        if N_SINK > (0 if SHARED == 1 else BLOCK):
            if start < N_SINK:
                scores = _with_sinks(
                    scores, to_sinks, key, token, given, angles_ptr, scale, softcap,
                    N_SINK, WIDTH, HALF, INTERLEAVED, GROUPS, SHARED, HEAD_DIM, DIM_P, Q_STEP, NORM, NORM_STEP, CAP,
                )  # fmt: skip
        state = attend(scores, value, visible, state, SHARED)
        start += BLOCK

    for j in tl.static_range(SHARED):
        group = chunk * SHARED + j
        largest, total, acc = state[j]
        if SPLITS == 1:
            out = out_ptr + (row * HEADS + kv_head * GROUPS + group) * HEAD_DIM
            tl.store(out + dims, (acc / total).to(out_ptr.dtype.element_ty), inside & (group < GROUPS))
        else:
            part = (program.to(tl.int64) * SPLITS + split) * SHARED + j
            tl.store(partial_ptr + part * DIM_P + dims, acc)
            peaks_ptr = partial_ptr + tl.num_programs(0) * SPLITS * SHARED * DIM_P + part * 2
            tl.store(peaks_ptr, largest)
            tl.store(peaks_ptr + 1, total)
    if SPLITS > 1:
        tl.debug_barrier()  # every thread has written before the program is counted
        if tl.atomic_add(arrived_ptr + program, 1, sem="acq_rel") == SPLITS - 1:  # the last puts the parts together
            for j in tl.static_range(SHARED):
                group = chunk * SHARED + j
                part = program.to(tl.int64) * SPLITS * SHARED + j
                stats = tl.num_programs(0) * SPLITS * SHARED * DIM_P
                whole = put_together(partial_ptr, part, stats, SHARED, SPLITS, PARTS, DIM_P)
                out = out_ptr + (row * HEADS + kv_head * GROUPS + group) * HEAD_DIM
                tl.store(out + dims, whole.to(out_ptr.dtype.element_ty), inside & (group < GROUPS))
            tl.store(arrived_ptr + program, 0)


class RingAttention:
    """Split-KV attention of one query of each stream over rings of which any number of slots is filled.

    Sinks stay in the ring as first rotated; for them the query is turned instead. It is for layers of one recipe, one
    layout and one rotation.

    Args:
        attention: of one of the layers.
        keys: its ring, ``[batch, num_kv_heads, capacity, head_dim]``; the others have its shape.
        state: the streams'.
    """

    TILE = 2048  # elements of a tile of keys, and of values, for each warp
    PARTIAL = 4096  # elements of partial results that are put together at a time, as many as a warp can hold
    WARPS_IN_ALL = 1056  # to aim for: eight for each of an H100's multiprocessors

    def __init__(self, attention: Attention, keys: Tensor, state: RingState) -> None:
        batch, num_kv_heads, capacity, head_dim = keys.shape
        self.state = state
        self.chunks = triton.cdiv(attention.groups, MOST_SHARED)
        self.shared = triton.cdiv(attention.groups, self.chunks)
        self.dim_p = triton.next_power_of_2(head_dim)
        self.warps = self.warps_for(self.shared)
        self.programs = batch * num_kv_heads * self.chunks
        self.block = max(1, self.TILE * self.warps // self.dim_p)
        blocks = max(1, capacity // self.block)  # the last program takes what is over
        per_split = triton.cdiv(blocks, max(1, min(blocks, self.WARPS_IN_ALL // (self.warps * self.programs))))
        self.splits, self.split_len = triton.cdiv(blocks, per_split), per_split * self.block
        self.parts = min(triton.next_power_of_2(self.splits), max(1, self.PARTIAL * self.warps // self.dim_p))
        parts = self.programs * self.splits * self.shared
        self.out = keys.new_empty(batch, attention.num_heads * head_dim)
        self.partial = torch.empty(parts * (self.dim_p + 2), dtype=torch.float32, device=keys.device)
        self.arrived = torch.zeros(self.programs, dtype=torch.int32, device=keys.device)

    @staticmethod
    def warps_for(shared: int) -> int:
        """Warps of a program: a single one waits for no other, several share the work of many query heads."""
        return 1 if shared == 1 else 4

    def __call__(self, attention: Attention, qkv: Tensor, layer: StreamingLayer, *, pdl: bool = False) -> Tensor:
        """Store the token of ``qkv`` ``[batch, attention.width]`` in a layer's ring, and attend.

        Args:
            layer: with room for all slots; its first copies of the sinks are written too while these come.

        Returns:
            ``[batch, num_heads * head_dim]``, written over by the next call.
        """
        state, softcap = self.state, attention.scores.softcap
        q_weight, q_bias, q_eps = pointers_of(attention.query_norm, qkv)
        k_weight, k_bias, k_eps = pointers_of(attention.key_norm, qkv)
        launch(
            _ring_attention, (self.programs, self.splits),
            qkv, layer.keys, layer.values, layer.sinks, self.out, self.partial, self.arrived,
            state.counters, state.angles, q_weight, q_bias, k_weight, k_bias, q_eps, k_eps,
            attention.scores.scale, softcap or 0.0,
            **state.meta_of(attention), SHARED=self.shared, CHUNKS=self.chunks, CAP=softcap is not None,
            SPLITS=self.splits, PARTS=self.parts, SPLIT_LEN=self.split_len, BLOCK=self.block,
            num_warps=self.warps, pdl=pdl,
        )  # fmt: skip
        return self.out
