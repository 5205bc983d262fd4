"""Attention of one new token of each stream over whole rings by the SDPA kernel that is allowed.

A kernel of this library norms and rotates query and key, stores key and value in their slot, and moves the sinks to
their distance from the query; attention then goes over all slots. Until the rings are full, it is by a kernel that
takes a mask.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..attention.kernel_choice import kernel_context
from ..attention.math_kernel import mask_of_empty
from ..cache_layer import StreamingLayer
from ..launch import launch, wait_for_input
from .block import causal
from .heads import load_head, rotate
from .norms import pointers_of, rstd_of
from .recipe import Attention
from .rings import RingState


@triton.jit
def _rotate_and_store(
    qkv_ptr, query_ptr, k_ptr, v_ptr, sinks_ptr, counters_ptr, angles_ptr,
    q_norm_w, q_norm_b, q_eps, k_norm_w, k_norm_b, k_eps,
    CAPACITY: tl.constexpr, N_SINK: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_P: tl.constexpr,
    QKV_WIDTH: tl.constexpr, Q_STEP: tl.constexpr, K_START: tl.constexpr, K_STEP: tl.constexpr,
    V_START: tl.constexpr, V_STEP: tl.constexpr, NORM: tl.constexpr, NORM_STEP: tl.constexpr,
    FULL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = HEADS // KV_HEADS
    wait_for_input(PDL)
    ring, part = tl.program_id(0).to(tl.int64), tl.program_id(1)  # the key, a query, or a sink
    row, kv_head = ring // KV_HEADS, ring % KV_HEADS
    dims = tl.arange(0, DIM_P)
    inside = dims < HEAD_DIM
    dtype = k_ptr.dtype.element_ty
    k_ptr += ring * CAPACITY * HEAD_DIM
    v_ptr += ring * CAPACITY * HEAD_DIM
    angles_ptr += row * 6 * WIDTH
    qkv = qkv_ptr + row * QKV_WIDTH
    rstd = 0.0
    if part == 0:
        slot = tl.load(counters_ptr + row * 2 + 1)
        if NORM == "all":
            rstd = rstd_of(qkv + K_START * HEAD_DIM, k_eps, KV_HEADS * HEAD_DIM, 1024)
        key, partner = load_head(
            qkv + (K_START + kv_head * K_STEP) * HEAD_DIM, kv_head, k_norm_w, k_norm_b, k_eps, rstd,
            HALF, INTERLEAVED, HEAD_DIM, DIM_P, NORM, NORM_STEP,
        )  # fmt: skip
        key = rotate(key, partner, angles_ptr, WIDTH, HALF, INTERLEAVED, DIM_P)
        tl.store(k_ptr + slot * HEAD_DIM + dims, key.to(dtype), inside)
        if not FULL and N_SINK > 0:
            first_copy = sinks_ptr + (ring * N_SINK + slot) * HEAD_DIM
            tl.store(first_copy + dims, key.to(dtype), inside & (slot < N_SINK))
        value = tl.load(qkv + (V_START + kv_head * V_STEP) * HEAD_DIM + dims, inside, 0.0)
        tl.store(v_ptr + slot * HEAD_DIM + dims, value.to(dtype), inside)
    elif part <= GROUPS:
        if NORM == "all":
            rstd = rstd_of(qkv, q_eps, HEADS * HEAD_DIM, 1024)
        head = kv_head * GROUPS + part - 1
        query, partner = load_head(
            qkv + (kv_head * Q_STEP + part - 1) * HEAD_DIM, head, q_norm_w, q_norm_b, q_eps, rstd,
            HALF, INTERLEAVED, HEAD_DIM, DIM_P, NORM, NORM_STEP,
        )  # fmt: skip
        query = rotate(query, partner, angles_ptr, WIDTH, HALF, INTERLEAVED, DIM_P)
        tl.store(query_ptr + (row * HEADS + head) * HEAD_DIM + dims, query.to(dtype), inside)
    else:
        sink = part - 1 - GROUPS
        key, partner = load_head(
            sinks_ptr + (ring * N_SINK + sink) * HEAD_DIM, kv_head, k_norm_w, k_norm_b, k_eps, rstd,
            HALF, INTERLEAVED, HEAD_DIM, DIM_P, "none", NORM_STEP,
        )  # fmt: skip
        moved = rotate(key, partner, angles_ptr + 4 * WIDTH, WIDTH, HALF, INTERLEAVED, DIM_P)
        stored = dims < 2 * HALF
        if not FULL:  # a sink at hand, or to come, is not this program's
            stored = stored & (sink < tl.load(counters_ptr + row * 2))
        tl.store(k_ptr + sink * HEAD_DIM + dims, moved.to(dtype), stored)


class FullRing:
    """Attention over whole rings by the kernel that is allowed; arguments as of :class:`.RingAttention`."""

    def __init__(self, attention: Attention, keys: Tensor, state: RingState) -> None:
        self.state, self.ring = state, keys
        self.mask: Tensor | None = None
        self.query = keys.new_empty(keys.shape[0], attention.num_heads, 1, attention.head_dim)

    def begin(self, masked: bool) -> None:
        """Begin a step, in which slots without a token are masked, or there are none."""
        self.mask = mask_of_empty(self.ring, self.state.counters[:, 0]) if masked else None

    def __call__(self, attention: Attention, qkv: Tensor, layer: StreamingLayer, *, pdl: bool = False) -> Tensor:
        """See :meth:`.RingAttention.__call__`."""
        state, keys = self.state, layer.keys
        moving = state.layout.config.n_sink if state.half else 0
        launch(
            _rotate_and_store, (keys.shape[0] * attention.num_kv_heads, 1 + attention.groups + moving),
            qkv, self.query, keys, layer.values, layer.sinks, state.counters, state.angles,
            *pointers_of(attention.query_norm, qkv), *pointers_of(attention.key_norm, qkv),
            **state.meta_of(attention), FULL=self.mask is None, num_warps=1, pdl=pdl,
        )  # fmt: skip
        with kernel_context(attention.module):
            return causal(self.query, keys, layer.values, attention.scores, self.mask).flatten(1)
