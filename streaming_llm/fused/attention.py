"""Attention of one new token over the ring, on the device alone: no shape and no launch depends on the position.

``begin_step`` looks up the token's embedding and turns the stream's counters into a slot and three sets of angles.
After it either :func:`ring_attention`, which rotates, stores and attends in one kernel, or :func:`rotate_and_store`,
which leaves the attention over the whole ring to one of PyTorch's kernels.

In both, a head's query, key and value lie next to each other in ``qkv``: ``[batch, num_heads, 3 * head_dim]``,
as GPT-NeoX projects them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..positions import StreamLayout
from ..rope_utils import Rotary
from .launch import wait_for_input

NEXT, OFFSET, NOW, SLOT = range(4)


class RingState:
    """Where a stream is, on the device: advanced by each step, read by its kernels.

    Attributes:
        counters: int64 ``[4]``: tokens seen, position of the stream's first token, number and slot of the token at
            hand.
        angles: float32 ``[6, rotary_dim / 2]``, computed in float64: cosine and sine of the query's position, of the
            position from which it sees the sinks as first rotated, and of the turn that the sinks have made.
    """

    def __init__(self, layout: StreamLayout, rotary: Rotary, device: torch.device) -> None:
        if rotary.scaling != 1.0 or rotary.interleaved:
            raise ValueError("fused kernels rotate halves, without a factor on cosine and sine")
        self.layout = layout
        self.inv_freq = rotary.inv_freq.to(device)
        self.counters = torch.zeros(4, dtype=torch.int64, device=device)
        self.angles = torch.zeros(6, self.half, dtype=torch.float32, device=device)

    @property
    def half(self) -> int:
        """Pairs of dimensions that are rotated."""
        return self.inv_freq.shape[0]

    def set(self, n_seen: int, position_offset: int) -> None:
        """Put the stream where the host says it is."""
        self.counters[:2] = torch.tensor([n_seen, position_offset])


@triton.jit
def _begin_step(
    tokens_ptr, table_ptr, x_ptr, counters_ptr, inv_freq_ptr, angles_ptr, n_sink, window,
    HIDDEN: tl.constexpr, HALF: tl.constexpr, HALF_P: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_input(PDL)
    batch, block = tl.program_id(0), tl.program_id(1)
    if (batch == 0) & (block == 0):
        now = tl.load(counters_ptr)
        offset = tl.load(counters_ptr + 1)
        tl.store(counters_ptr, now + 1)
        tl.store(counters_ptr + 2, now)
        tl.store(counters_ptr + 3, tl.where(now < n_sink, now, n_sink + (now - n_sink) % (window + 1)))
        in_cache = tl.minimum(now, n_sink + window)
        which = tl.arange(0, 4)[:, None]  # a power of two; the last one is not used
        position = tl.where(which == 0, now + offset, tl.where(which == 1, in_cache + offset, now - in_cache))
        pair = tl.arange(0, HALF_P)[None, :]
        inside = (pair < HALF) & (which < 3)
        angle = position.to(tl.float64) * tl.load(inv_freq_ptr + pair, pair < HALF, 0.0)
        at = angles_ptr + which * 2 * HALF + pair
        tl.store(at, tl.cos(angle).to(tl.float32), inside)
        tl.store(at + HALF, tl.sin(angle).to(tl.float32), inside)
    column = block * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(tokens_ptr + batch)
    x = tl.load(table_ptr + row * HIDDEN + column, column < HIDDEN, 0.0)
    tl.store(x_ptr + batch * HIDDEN + column, x.to(tl.float32), column < HIDDEN)


def begin_step(tokens: Tensor, table: Tensor, x: Tensor, state: RingState, *, pdl: bool = False) -> None:
    """Advance ``state`` by one token and write the embeddings of ``tokens`` ``[batch]`` to ``x`` ``[batch, hidden]``.

    Args:
        tokens: int64.
        table: the embedding's weight ``[vocab, hidden]``.
        x: float32.
    """
    batch, hidden = x.shape
    config = state.layout.config
    _begin_step[(batch, triton.cdiv(hidden, 1024))](
        tokens, table, x, state.counters, state.inv_freq, state.angles, config.n_sink, config.window_size,
        HIDDEN=hidden, HALF=state.half, HALF_P=triton.next_power_of_2(state.half), BLOCK=1024, PDL=pdl,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


@triton.jit
def _turn(x_ptr, dims, angles_ptr, HALF: tl.constexpr, HEAD_DIM: tl.constexpr):
    """A head ``[head_dim]`` in float32, with its first ``2 * HALF`` dimensions rotated by the angles given."""
    x = tl.load(x_ptr + dims, dims < HEAD_DIM, 0.0).to(tl.float32)
    in_rotary = dims < 2 * HALF
    partner = tl.where(dims < HALF, dims + HALF, dims - HALF)
    other = tl.load(x_ptr + partner, in_rotary, 0.0).to(tl.float32)
    pair = tl.where(dims < HALF, dims, dims - HALF)
    cos = tl.load(angles_ptr + pair, in_rotary, 1.0)
    sin = tl.load(angles_ptr + HALF + pair, in_rotary, 0.0)
    return x * cos + tl.where(dims < HALF, -other, other) * sin


@triton.jit
def _rotate_and_store(
    qkv_ptr, q_ptr, k_ptr, v_ptr, sinks_ptr, counters_ptr, angles_ptr, num_heads, capacity,
    N_SINK: tl.constexpr, HALF: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_P: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_input(PDL)
    head, part = tl.program_id(0).to(tl.int64), tl.program_id(1)  # of batch * num_heads; the token or a sink
    dims = tl.arange(0, DIM_P)
    inside = dims < HEAD_DIM
    dtype = k_ptr.dtype.element_ty
    ring = head * capacity * HEAD_DIM
    if part == 0:
        qkv = qkv_ptr + head * 3 * HEAD_DIM
        slot = tl.load(counters_ptr + 3)
        query = _turn(qkv, dims, angles_ptr, HALF, HEAD_DIM)
        tl.store(q_ptr + head * HEAD_DIM + dims, query.to(dtype), inside)
        key = _turn(qkv + HEAD_DIM, dims, angles_ptr, HALF, HEAD_DIM)
        tl.store(k_ptr + ring + slot * HEAD_DIM + dims, key.to(dtype), inside)
        value = tl.load(qkv + 2 * HEAD_DIM + dims, inside, 0.0)
        tl.store(v_ptr + ring + slot * HEAD_DIM + dims, value.to(dtype), inside)
    else:
        sink = part - 1
        moved = _turn(sinks_ptr + (head * N_SINK + sink) * HEAD_DIM, dims, angles_ptr + 4 * HALF, HALF, HEAD_DIM)
        tl.store(k_ptr + ring + sink * HEAD_DIM + dims, moved.to(dtype), inside & (dims < 2 * HALF))


def rotate_and_store(
    qkv: Tensor, q: Tensor, keys: Tensor, values: Tensor, sinks: Tensor, state: RingState, *, pdl: bool = False
) -> None:
    """Rotate the query, put key and value into their slot, and move the sinks to their distance from the query.

    For a full ring: afterwards attention goes over all of it.

    Args:
        qkv: ``[batch, num_heads, 3 * head_dim]``.
        q: output, ``[batch, num_heads, 1, head_dim]`` in the dtype of the ring.
        keys, values: the ring, ``[batch, num_heads, capacity, head_dim]``.
        sinks: the sinks' keys as first rotated, ``[batch, num_heads, n_sink, head_dim]``.
    """
    batch, num_heads, capacity, head_dim = keys.shape
    _rotate_and_store[(batch * num_heads, 1 + state.layout.config.n_sink)](
        qkv, q, keys, values, sinks, state.counters, state.angles, num_heads, capacity,
        N_SINK=state.layout.config.n_sink, HALF=state.half, HEAD_DIM=head_dim,
        DIM_P=triton.next_power_of_2(head_dim), PDL=pdl, num_warps=1, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


@triton.jit
def _attend(
    key, value, token, visible, query, to_sinks, largest, total, acc, with_sinks, N_SINK: tl.constexpr
):  # fmt: skip
    """Take a tile of keys and values ``[BLOCK, DIM_P]`` into a running softmax."""
    key = key.to(tl.float32)
    score = tl.sum(key * query[None, :], 1)
    if N_SINK > 0:
        if with_sinks:
            score = tl.where(token < N_SINK, tl.sum(key * to_sinks[None, :], 1), score)
    score = tl.where(visible, score, float("-inf"))
    new = tl.maximum(largest, tl.max(score, 0))
    base = tl.where(new == float("-inf"), 0.0, new)  # nothing has been visible so far
    keep = tl.exp(largest - base)
    weight = tl.exp(score - base)
    value = tl.where(visible[:, None], value.to(tl.float32), 0.0)
    acc = acc * keep + tl.sum(weight[:, None] * value, 0)
    return new, total * keep + tl.sum(weight, 0), acc


@triton.jit
def _ring_attention(
    qkv_ptr, k_ptr, v_ptr, out_ptr, partial_ptr, arrived_ptr, counters_ptr, angles_ptr, scale,
    CAPACITY: tl.constexpr, N_SINK: tl.constexpr, HALF: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_P: tl.constexpr,
    SPLITS: tl.constexpr, PARTS: tl.constexpr, SPLIT_LEN: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    head, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dims = tl.arange(0, DIM_P)
    inside = dims < HEAD_DIM
    k_ptr += head * CAPACITY * HEAD_DIM
    v_ptr += head * CAPACITY * HEAD_DIM
    first = split * SPLIT_LEN
    last = tl.where(split == SPLITS - 1, CAPACITY, first + SPLIT_LEN)
    # Of what is stored only the token's own slot changes in this step, and that is not read from here.
    token = first + tl.arange(0, BLOCK)
    at = token[:, None] * HEAD_DIM + dims[None, :]
    in_ring = (token < last)[:, None] & inside[None, :]
    key, value = tl.load(k_ptr + at, in_ring, 0.0), tl.load(v_ptr + at, in_ring, 0.0)
    wait_for_input(PDL)
    qkv = qkv_ptr + head * 3 * HEAD_DIM
    now, slot = tl.load(counters_ptr + 2), tl.load(counters_ptr + 3)
    query = _turn(qkv, dims, angles_ptr, HALF, HEAD_DIM) * scale
    to_sinks = _turn(qkv, dims, angles_ptr + 2 * HALF, HALF, HEAD_DIM) * scale

    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    acc = tl.zeros((DIM_P,), tl.float32)
    if split == 0:  # the token itself, which no other program reads
        new_key = _turn(qkv + HEAD_DIM, dims, angles_ptr, HALF, HEAD_DIM).to(k_ptr.dtype.element_ty)
        new_value = tl.load(qkv + 2 * HEAD_DIM + dims, inside, 0.0).to(v_ptr.dtype.element_ty)
        tl.store(k_ptr + slot * HEAD_DIM + dims, new_key, inside)
        tl.store(v_ptr + slot * HEAD_DIM + dims, new_value, inside)
        largest = tl.sum(query * new_key.to(tl.float32), 0)
        total += 1.0
        acc += new_value.to(tl.float32)

    end = tl.minimum(last, now).to(tl.int32)  # what lies behind has never been written
    visible = (token < end) & (token != slot)
    state = _attend(key, value, token, visible, query, to_sinks, largest, total, acc, first < N_SINK, N_SINK)
    largest, total, acc = state
    for start in range(first + BLOCK, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        visible = (token < end) & (token != slot)
        at = token[:, None] * HEAD_DIM + dims[None, :]
        mask = visible[:, None] & inside[None, :]
        key, value = tl.load(k_ptr + at, mask, 0.0), tl.load(v_ptr + at, mask, 0.0)
        state = _attend(key, value, token, visible, query, to_sinks, largest, total, acc, start < N_SINK, N_SINK)
        largest, total, acc = state

    if SPLITS == 1:
        tl.store(out_ptr + head * HEAD_DIM + dims, (acc / total).to(out_ptr.dtype.element_ty), inside)
    else:
        width: tl.constexpr = DIM_P + 2
        partial = partial_ptr + head * SPLITS * width
        tl.store(partial + split * width + dims, acc)
        tl.store(partial + split * width + DIM_P, largest)
        tl.store(partial + split * width + DIM_P + 1, total)
        tl.debug_barrier()  # every thread has written before the program is counted
        if tl.atomic_add(arrived_ptr + head, 1, sem="acq_rel") == SPLITS - 1:  # the last one puts the parts together
            largest = tl.full((), float("-inf"), tl.float32)
            total = tl.zeros((), tl.float32)
            acc = tl.zeros((DIM_P,), tl.float32)
            for part0 in tl.static_range(0, SPLITS, PARTS):
                part = part0 + tl.arange(0, PARTS)
                exists = part < SPLITS
                row = partial + part * width
                peaks = tl.load(row + DIM_P, exists, float("-inf"), cache_modifier=".cg")
                sums = tl.load(row + DIM_P + 1, exists, 0.0, cache_modifier=".cg")
                accs = tl.load(row[:, None] + dims[None, :], exists[:, None], 0.0, cache_modifier=".cg")
                new = tl.maximum(largest, tl.max(peaks, 0))  # finite: the first part has seen the token itself
                keep, share = tl.exp(largest - new), tl.exp(peaks - new)
                acc = acc * keep + tl.sum(accs * share[:, None], 0)
                total = total * keep + tl.sum(sums * share, 0)
                largest = new
            tl.store(out_ptr + head * HEAD_DIM + dims, (acc / total).to(out_ptr.dtype.element_ty), inside)
            tl.store(arrived_ptr + head, 0)


class RingAttention:
    """Split-KV attention of one query over a ring of which any number of slots is filled.

    Sinks stay in the ring as first rotated; for them the query is turned instead.

    Args:
        keys: a layer's ring, ``[batch, num_heads, capacity, head_dim]``; the others have its shape.
        state: the stream's.
        scale: factor on the scores.
    """

    TILE = 2048
    """Elements of a tile of keys, and of values. A program is a single warp, which waits for no other."""
    PARTIAL = 4096
    """Elements of partial results that are put together at a time, as many as a warp can hold."""
    PROGRAMS = 1056
    """Programs to aim for: eight for each of an H200's multiprocessors."""

    def __init__(self, keys: Tensor, state: RingState, scale: float) -> None:
        batch, num_heads, capacity, head_dim = keys.shape
        self.state, self.scale = state, scale
        self.dim_p = triton.next_power_of_2(head_dim)
        self.block = max(1, self.TILE // self.dim_p)
        blocks = max(1, capacity // self.block)  # the last program takes what is over
        per_split = triton.cdiv(blocks, max(1, min(blocks, self.PROGRAMS // (batch * num_heads))))
        self.splits, self.split_len = triton.cdiv(blocks, per_split), per_split * self.block
        self.parts = min(triton.next_power_of_2(self.splits), max(1, self.PARTIAL // self.dim_p))
        heads = batch * num_heads
        self.partial = torch.empty(heads * self.splits * (self.dim_p + 2), dtype=torch.float32, device=keys.device)
        self.arrived = torch.zeros(heads, dtype=torch.int32, device=keys.device)

    def __call__(self, qkv: Tensor, keys: Tensor, values: Tensor, out: Tensor, *, pdl: bool = False) -> None:
        """Rotate and store the token of ``qkv`` ``[batch, num_heads, 3 * head_dim]``, then attend.

        Args:
            keys, values: the layer's ring, with room for all slots.
            out: ``[batch, num_heads, head_dim]``.
        """
        batch, num_heads, capacity, head_dim = keys.shape
        _ring_attention[(batch * num_heads, self.splits)](
            qkv, keys, values, out, self.partial, self.arrived, self.state.counters, self.state.angles,
            self.scale, CAPACITY=capacity,
            N_SINK=self.state.layout.config.n_sink, HALF=self.state.half, HEAD_DIM=head_dim, DIM_P=self.dim_p,
            SPLITS=self.splits, PARTS=self.parts, SPLIT_LEN=self.split_len,
            BLOCK=self.block, PDL=pdl, num_warps=1, **({"launch_pdl": True} if pdl else {}),
        )  # fmt: skip
