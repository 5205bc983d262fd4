"""Triton kernels for CUDA. Only imported where Triton is installed; each has a plain PyTorch path beside it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch


@triton.jit
def pairing(dims, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """For each dimension its pair's number, its partner in the pair, and whether it is the first of the two."""
    if INTERLEAVED:
        return dims // 2, dims ^ 1, dims % 2 == 0
    else:
        leads = dims < HALF
        return tl.where(leads, dims, dims - HALF), tl.where(leads, dims + HALF, dims - HALF), leads


@triton.jit
def turned_to_sinks(
    query, q, rows, in_rows, cos_ptr, sin_ptr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, DIM_P: tl.constexpr
):
    """Queries ``[M, DIM_P]``, in float32, turned to where the sinks in their first rotation see them.

    Args:
        q, rows: where each query begins, ``[M, 1]``, and its number among the angles, int64 ``[M]``.
        in_rows: which of them there are, ``[M, 1]``.
    """
    query = query.to(tl.float32)
    if HALF > 0:
        dims = tl.arange(0, DIM_P)
        pair, partner, leads = pairing(dims, HALF, INTERLEAVED)
        rotates = in_rows & (dims < 2 * HALF)[None, :]
        other = tl.load(q + partner[None, :], rotates, 0.0).to(tl.float32)
        angle = rows[:, None] * HALF + pair[None, :]
        cos, sin = tl.load(cos_ptr + angle, rotates, 1.0), tl.load(sin_ptr + angle, rotates, 0.0)
        query = query * cos + tl.where(leads[None, :], -other, other) * sin
    return query


@triton.jit
def _merge(
    q_ptr, out_ptr, lse_ptr, older_ptr, older_lse_ptr, cos_ptr, sin_ptr, k_ptr, v_ptr, result_ptr,
    q_len, num_heads, groups, window, scale,
    result_b, q_b, q_h, q_m, out_b, out_h, out_m, older_b, older_h, older_m, k_b, k_h, k_s, v_b, v_h, v_s,
    OLDER: tl.constexpr, N_SINK: tl.constexpr, HALF: tl.constexpr, HEAD_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr, DIM_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = rows.to(tl.int64)  # offsets may pass 2**31
    index = tl.program_id(1).to(tl.int64)
    batch, head = index // num_heads, index % num_heads
    dims = tl.arange(0, DIM_P)
    in_rows, in_dims = rows < q_len, dims < HEAD_DIM
    mask = in_rows[:, None] & in_dims[None, :]

    # One running softmax that begins with the window's result, or with its newer half.
    part, at = batch * (q_len // window) + rows // window, rows % window
    largest = tl.load(lse_ptr + (part * num_heads + head) * window + at, in_rows, 0.0)
    total = tl.full((BLOCK,), 1.0, tl.float32)
    out = out_ptr + (part * out_b + head * out_h + at * out_m)[:, None] + dims[None, :]
    acc = tl.load(out, mask, 0.0).to(tl.float32)
    if OLDER:
        at = window - 1 - at
        score = tl.load(older_lse_ptr + (part * num_heads + head) * window + at, in_rows, 0.0)
        new_largest = tl.maximum(largest, score)
        keep, weight = tl.exp(largest - new_largest), tl.exp(score - new_largest)
        older = older_ptr + (part * older_b + head * older_h + at * older_m)[:, None] + dims[None, :]
        acc = acc * keep[:, None] + weight[:, None] * tl.load(older, mask, 0.0).to(tl.float32)
        total = total * keep + weight
        largest = new_largest

    if N_SINK > 0:
        q = q_ptr + batch * q_b + head * q_h + rows[:, None] * q_m
        query = tl.load(q + dims[None, :], mask, 0.0)
        turned = turned_to_sinks(query, q, rows, in_rows[:, None], cos_ptr, sin_ptr, HALF, INTERLEAVED, DIM_P)
        k = k_ptr + batch * k_b + (head // groups) * k_h + dims
        v = v_ptr + batch * v_b + (head // groups) * v_h + dims
        for sink in range(N_SINK):
            key = tl.load(k + sink * k_s, in_dims, 0.0).to(tl.float32)
            score = tl.sum(turned * key[None, :], 1) * scale
            new_largest = tl.maximum(largest, score)
            keep, weight = tl.exp(largest - new_largest), tl.exp(score - new_largest)
            value = tl.load(v + sink * v_s, in_dims, 0.0).to(tl.float32)
            acc = acc * keep[:, None] + weight[:, None] * value[None, :]
            total = total * keep + weight
            largest = new_largest

    result = result_ptr + batch * result_b + (rows[:, None] * num_heads + head) * HEAD_DIM  # [b, q_len, heads, dim]
    tl.store(result + dims[None, :], (acc / total[:, None]).to(result_ptr.dtype.element_ty), mask)


@dataclass(frozen=True)
class Sinks:
    """The sinks that the queries of a block see, and how far these have to be turned to see them.

    Args:
        keys, values: ``[batch, num_kv_heads, n_sink, head_dim]``, the last dimension contiguous.
        cos, sin: of the turn of each query, ``[q_len, rotary_dim / 2]``, float32, contiguous.
        interleaved: rotation pairs neighbours instead of halves.
    """

    keys: Tensor
    values: Tensor
    cos: Tensor
    sin: Tensor
    interleaved: bool


def merge_parts(
    query: Tensor,
    newer: tuple[Tensor, Tensor],
    older: tuple[Tensor, Tensor] | None,
    sinks: Sinks | None,
    scale: float,
    result: Tensor,
) -> None:
    """Merge attention over the window with the sinks, reading everything once.

    Args:
        query: ``[batch, num_heads, q_len, head_dim]``, the last dimension contiguous.
        newer: attention ``[batch * n, num_heads, q_len / n, head_dim]``, the last dimension contiguous, and
            log-sum-exp ``[batch * n, num_heads, q_len / n]``, float32, over the window, or over the part of it in the
            same of ``n`` blocks as the query.
        older: the same over the rest of the window, with the queries of each block in reverse order.
        scale: factor on the scores of ``sinks``.
        result: where to write, ``[batch, q_len, num_heads, head_dim]``, the last three dimensions contiguous.
    """
    batch, num_heads, q_len, head_dim = query.shape
    out, lse = newer
    has_older = older is not None
    rest, rest_lse = newer if older is None else older
    nothing = lse.new_empty((0, 0))
    given = sinks or Sinks(query[:, :, :0], query[:, :, :0], nothing, nothing, False)
    block = 32
    launch(
        _merge, (triton.cdiv(q_len, block), batch * num_heads),
        query, out, lse.contiguous(), rest, rest_lse.contiguous(), given.cos, given.sin, given.keys, given.values,
        result, q_len, num_heads, num_heads // given.keys.shape[1], out.shape[2], scale,
        result.stride(0), *query.stride()[:3], *out.stride()[:3], *rest.stride()[:3],
        *given.keys.stride()[:3], *given.values.stride()[:3],
        OLDER=has_older, N_SINK=given.keys.shape[2], HALF=given.cos.shape[1], HEAD_DIM=head_dim,
        INTERLEAVED=given.interleaved, DIM_P=triton.next_power_of_2(head_dim), BLOCK=block,
    )  # fmt: skip


@triton.jit
def _reverse(
    x_ptr, out_ptr, length, num_heads, window, x_b, x_h, x_m,
    HEAD_DIM: tl.constexpr, DIM_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    index = tl.program_id(1).to(tl.int64)
    batch, head = index // num_heads, index % num_heads
    dims = tl.arange(0, DIM_P)
    mask = (rows < length)[:, None] & (dims < HEAD_DIM)[None, :]
    x = tl.load(x_ptr + batch * x_b + head * x_h + rows[:, None] * x_m + dims[None, :], mask, 0.0)
    to = batch * length + (rows // window + 1) * window - 1 - rows % window
    tl.store(out_ptr + (to[:, None] * num_heads + head) * HEAD_DIM + dims[None, :], x, mask)


def reversed_blocks(x: Tensor, window: int) -> Tensor:
    """Blocks of ``window`` tokens as entries of the batch, each in reverse order.

    Args:
        x: ``[batch, num_heads, n * window, head_dim]``, the last dimension contiguous.

    Returns:
        ``[batch * n, num_heads, window, head_dim]``, a view of ``[batch * n, window, num_heads, head_dim]``.
    """
    batch, num_heads, length, head_dim = x.shape
    out = x.new_empty((batch * length // window, window, num_heads, head_dim))
    block = 32
    launch(
        _reverse, (triton.cdiv(length, block), batch * num_heads),
        x, out, length, num_heads, window, *x.stride()[:3],
        HEAD_DIM=head_dim, DIM_P=triton.next_power_of_2(head_dim), BLOCK=block,
    )  # fmt: skip
    return out.transpose(1, 2)


def available(query: Tensor) -> bool:
    """Whether the kernels run on this tensor's device."""
    return query.device.type == "cuda" and torch.cuda.get_device_capability(query.device) >= (8, 0)
