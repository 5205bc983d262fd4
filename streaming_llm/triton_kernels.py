"""Triton kernels for CUDA. Only imported where Triton is installed; each has a plain PyTorch path beside it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _merge_sinks(
    q_ptr, out_ptr, lse_ptr, cos_ptr, sin_ptr, k_ptr, v_ptr, result_ptr,
    q_len, num_heads, groups, scale,
    result_b, q_b, q_h, q_m, out_b, out_h, out_m, k_b, k_h, k_s, v_b, v_h, v_s,
    N_SINK: tl.constexpr, HALF: tl.constexpr, HEAD_DIM: tl.constexpr, INTERLEAVED: tl.constexpr,
    DIM_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = rows.to(tl.int64)  # offsets may pass 2**31
    batch, head = tl.program_id(1).to(tl.int64) // num_heads, tl.program_id(1) % num_heads
    dims = tl.arange(0, DIM_P)
    in_rows, in_dims = (rows < q_len)[:, None], dims < HEAD_DIM
    if INTERLEAVED:
        pair, partner, leads = dims // 2, dims ^ 1, dims % 2 == 0
    else:
        pair, partner, leads = dims % HALF, tl.where(dims < HALF, dims + HALF, dims - HALF), dims < HALF

    # The query, turned to where the sinks in their first rotation see it.
    q = q_ptr + batch * q_b + head * q_h + rows[:, None] * q_m
    mask = in_rows & in_dims[None, :]
    rotates = in_rows & (dims < 2 * HALF)[None, :]
    query = tl.load(q + dims[None, :], mask, 0.0).to(tl.float32)
    other = tl.load(q + partner[None, :], rotates, 0.0).to(tl.float32)
    angle = rows[:, None] * HALF + pair[None, :]
    cos, sin = tl.load(cos_ptr + angle, rotates, 1.0), tl.load(sin_ptr + angle, rotates, 0.0)
    turned = query * cos + tl.where(leads[None, :], -other, other) * sin

    # One running softmax that begins with the window's result.
    largest = tl.load(lse_ptr + (batch * num_heads + head) * q_len + rows, rows < q_len, 0.0)
    total = tl.full((BLOCK,), 1.0, tl.float32)
    out = out_ptr + batch * out_b + head * out_h + rows[:, None] * out_m
    acc = tl.load(out + dims[None, :], mask, 0.0).to(tl.float32)
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

    # [batch, q_len, num_heads, head_dim]
    result = result_ptr + batch * result_b + (rows[:, None] * num_heads + head) * HEAD_DIM
    tl.store(result + dims[None, :], (acc / total[:, None]).to(result_ptr.dtype.element_ty), mask)


def merge_sinks(
    query: Tensor,
    out: Tensor,
    lse: Tensor,
    cos: Tensor,
    sin: Tensor,
    sink_keys: Tensor,
    sink_values: Tensor,
    scale: float,
    interleaved: bool,
    result: Tensor,
) -> None:
    """Turn the query, score the sinks and add them to the attention over the window, reading everything once.

    Args:
        query, out: ``[batch, num_heads, q_len, head_dim]``, the last dimension contiguous.
        lse: log-sum-exp of the window's scores ``[batch, num_heads, q_len]``, float32.
        cos, sin: of the turn of each query, ``[q_len, rotary_dim / 2]``, float32, contiguous.
        sink_keys, sink_values: ``[batch, num_kv_heads, n_sink, head_dim]``.
        scale: factor on the scores.
        interleaved: rotation pairs neighbours instead of halves.
        result: where to write, ``[batch, q_len, num_heads, head_dim]``, the last three dimensions contiguous.
    """
    batch, num_heads, q_len, head_dim = query.shape
    half = cos.shape[1]
    block = 32
    _merge_sinks[(triton.cdiv(q_len, block), batch * num_heads)](
        query, out, lse.contiguous(), cos, sin, sink_keys, sink_values, result,
        q_len, num_heads, num_heads // sink_keys.shape[1], scale,
        result.stride(0), *query.stride()[:3], *out.stride()[:3], *sink_keys.stride()[:3], *sink_values.stride()[:3],
        N_SINK=sink_keys.shape[2], HALF=half, HEAD_DIM=head_dim, INTERLEAVED=interleaved,
        DIM_P=triton.next_power_of_2(head_dim), BLOCK=block,
    )  # fmt: skip


def available(query: Tensor) -> bool:
    """Whether the kernels run on this tensor's device."""
    return query.device.type == "cuda" and torch.cuda.get_device_capability(query.device) >= (8, 0)
