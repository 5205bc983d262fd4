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
from .running_softmax import attend, nothing_seen, of_each, put_together, scores_of

MOST_SHARED = 16
"""Query heads of a program: as many as a product of the matrix units has rows."""


@triton.jit
def _ring_attention(
    qkv_ptr, k_ptr, v_ptr, sinks_ptr, out_ptr, partial_ptr, arrived_ptr, counters_ptr, angles_ptr,
    q_norm_w, q_norm_b, k_norm_w, k_norm_b, q_eps, k_eps, scale, softcap,
    CAPACITY: tl.constexpr, N_SINK: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SHARED: tl.constexpr, H: tl.constexpr, CHUNKS: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM_P: tl.constexpr, QKV_WIDTH: tl.constexpr, Q_STEP: tl.constexpr,
    K_START: tl.constexpr, K_STEP: tl.constexpr, V_START: tl.constexpr, V_STEP: tl.constexpr,
    NORM: tl.constexpr, NORM_STEP: tl.constexpr, CAP: tl.constexpr, SPLITS: tl.constexpr, PARTS: tl.constexpr,
    SPLIT_LEN: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = HEADS // KV_HEADS
    program, split = tl.program_id(0), tl.program_id(1)
    chunk, kv_head = program % CHUNKS, program // CHUNKS % KV_HEADS
    ring, row = (program // CHUNKS).to(tl.int64), (program // CHUNKS // KV_HEADS).to(tl.int64)
    dims = tl.arange(0, DIM_P)
    head = 0 if H == 1 else tl.arange(0, H)[:, None]
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
    group = tl.minimum(chunk * SHARED + head, GROUPS - 1)
    query, partner = load_head(
        qkv + (kv_head * Q_STEP + group) * HEAD_DIM, kv_head * GROUPS + group, q_norm_w, q_norm_b, q_eps, q_rstd,
        HALF, INTERLEAVED, HEAD_DIM, DIM_P, NORM, NORM_STEP,
    )  # fmt: skip
    queries = rotate(query, partner, angles_ptr, WIDTH, HALF, INTERLEAVED, DIM_P) * scale
    to_sinks = rotate(query, partner, angles_ptr + 2 * WIDTH, WIDTH, HALF, INTERLEAVED, DIM_P) * scale
    largest, total, acc = nothing_seen(H, DIM_P)
    if split == 0:  # the token itself, which no other program reads
        k, k_partner = load_head(
            qkv + (K_START + kv_head * K_STEP) * HEAD_DIM, kv_head, k_norm_w, k_norm_b, k_eps, k_rstd,
            HALF, INTERLEAVED, HEAD_DIM, DIM_P, NORM, NORM_STEP,
        )  # fmt: skip
        new_key = rotate(k, k_partner, angles_ptr, WIDTH, HALF, INTERLEAVED, DIM_P).to(k_ptr.dtype.element_ty)
        v_at = qkv + (V_START + kv_head * V_STEP) * HEAD_DIM
        new_value = tl.load(v_at + dims, inside, 0.0).to(v_ptr.dtype.element_ty)
        if chunk == 0:
            tl.store(k_ptr + slot * HEAD_DIM + dims, new_key, inside)
            tl.store(v_ptr + slot * HEAD_DIM + dims, new_value, inside)
            if N_SINK > 0:
                first_copy = sinks_ptr + (ring * N_SINK + slot) * HEAD_DIM
                tl.store(first_copy + dims, new_key, inside & (slot < N_SINK))
        score = tl.sum(queries * new_key.to(tl.float32), -1)
        largest = capped(score, softcap) if CAP else score
        total += 1.0
        acc += new_value.to(tl.float32)

    end = tl.minimum(last, now).to(tl.int32)  # what lies behind has never been written
    visible = (token < end) & (token != slot)
    scores = scores_of(queries, key, softcap, H, CAP)
    if N_SINK > 0:  # sinks lie as first rotated, so that queries are turned for them
        if first < N_SINK:
            scores = tl.where(token < N_SINK, scores_of(to_sinks, key, softcap, H, CAP), scores)
    largest, total, acc = attend(scores, value, visible, largest, total, acc, H)
    for start in tl.range(first + BLOCK, end, BLOCK, num_stages=STAGES):
        token = start + tl.arange(0, BLOCK)
        visible = (token < end) & (token != slot)
        at = token[:, None] * HEAD_DIM + dims[None, :]
        mask = visible[:, None] & inside[None, :]
        key, value = tl.load(k_ptr + at, mask, 0.0), tl.load(v_ptr + at, mask, 0.0)
        scores = scores_of(queries, key, softcap, H, CAP)
        # With one query a branch behind which no request is moved: both tiles are asked for at once.
        if N_SINK > (0 if H == 1 else BLOCK):
            if start < N_SINK:
                scores = tl.where(token < N_SINK, scores_of(to_sinks, key, softcap, H, CAP), scores)
        largest, total, acc = attend(scores, value, visible, largest, total, acc, H)

    if SPLITS == 1:
        group = chunk * SHARED + head
        out = out_ptr + (row * HEADS + kv_head * GROUPS + group) * HEAD_DIM + dims
        exists = inside & (head < SHARED) & (group < GROUPS)
        tl.store(out, (acc / of_each(total, H)).to(out_ptr.dtype.element_ty), exists)
    else:
        part = (program.to(tl.int64) * SPLITS + split) * H
        peaks_ptr = partial_ptr + tl.num_programs(0) * SPLITS * H * DIM_P
        peak = peaks_ptr + (part if H == 1 else part + tl.arange(0, H)) * 2
        tl.store(partial_ptr + (part + head) * DIM_P + dims, acc)
        tl.store(peak, largest)
        tl.store(peak + 1, total)
        tl.debug_barrier()  # every thread has written before the program is counted
        if tl.atomic_add(arrived_ptr + program, 1, sem="acq_rel") == SPLITS - 1:  # the last puts the parts together
            part -= split * H
            whole = put_together(partial_ptr + part * DIM_P, peaks_ptr + part * 2, H, SPLITS, PARTS, DIM_P)
            of_head, dim = tl.arange(0, H * DIM_P) // DIM_P, tl.arange(0, H * DIM_P) % DIM_P
            of_group = chunk * SHARED + of_head
            out = out_ptr + (row * HEADS + kv_head * GROUPS + of_group) * HEAD_DIM + dim
            exists = (dim < HEAD_DIM) & (of_head < SHARED) & (of_group < GROUPS)
            tl.store(out, whole.to(out_ptr.dtype.element_ty), exists)
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

    WARPS = 4  # of a program with several query heads; one with a single head has one warp, which waits for no other
    TILE = 2048  # elements of a tile of keys, and of values, for each warp
    MOST_ROWS = 64  # of a tile: shorter ones are for more programs
    FEW = 8192  # keys in all: where there are no more, tiles of a program with several heads are half as long
    STAGES = 3  # tiles that such a program has on their way
    PARTIAL = 4096  # elements of partial results that are asked for at a time, for each warp
    WARPS_IN_ALL = 1056  # to aim for: eight for each of an H100's multiprocessors

    def __init__(self, attention: Attention, keys: Tensor, state: RingState) -> None:
        batch, num_kv_heads, capacity, head_dim = keys.shape
        self.state = state
        self.chunks = triton.cdiv(attention.groups, MOST_SHARED)
        self.shared = triton.cdiv(attention.groups, self.chunks)
        self.heads = triton.next_power_of_2(self.shared)
        alone = self.shared == 1
        self.warps, least = (1, 1) if alone else (self.WARPS, 16)  # the matrix units take 16 or more
        self.dim_p = max(least, triton.next_power_of_2(head_dim))
        self.programs = batch * num_kv_heads * self.chunks
        few = not alone and self.programs * capacity <= self.FEW
        most_rows = self.MOST_ROWS // 2 if few else self.MOST_ROWS
        self.block = max(least, min(most_rows, self.TILE * self.warps // self.dim_p))
        blocks = max(1, capacity // self.block)  # the last program takes what is over
        # Two for each head at least where they have one warp: so that few multiprocessors wait for the last ones.
        wanted = max(2 if alone else 1, self.WARPS_IN_ALL // (self.warps * self.programs))
        per_split = triton.cdiv(blocks, min(blocks, wanted))
        self.splits, self.split_len = triton.cdiv(blocks, per_split), per_split * self.block
        self.stages = 1 if alone else max(1, min(self.STAGES, per_split - 1))
        at_once = max(1, self.PARTIAL * self.warps // (self.dim_p * self.heads))
        self.parts = min(triton.next_power_of_2(self.splits), at_once)
        parts = self.programs * self.splits * self.heads
        self.out = keys.new_empty(batch, attention.num_heads * head_dim)
        self.partial = torch.empty(parts * (self.dim_p + 2), dtype=torch.float32, device=keys.device)
        self.arrived = torch.zeros(self.programs, dtype=torch.int32, device=keys.device)

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
            **state.meta_of(attention) | {"DIM_P": self.dim_p}, SHARED=self.shared, H=self.heads, CHUNKS=self.chunks,
            CAP=softcap is not None,
            SPLITS=self.splits, PARTS=self.parts, SPLIT_LEN=self.split_len, BLOCK=self.block, STAGES=self.stages,
            num_warps=self.warps, pdl=pdl,
        )  # fmt: skip
        return self.out
