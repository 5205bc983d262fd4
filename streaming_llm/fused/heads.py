"""A head of a query or key as kernels read it: normed and rotated."""

from __future__ import annotations

import triton
import triton.language as tl

from .recipe import Attention


@triton.jit
def load_head(
    x_ptr, head, w_ptr, b_ptr, eps, all_rstd,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_P: tl.constexpr,
    NORM: tl.constexpr, NORM_STEP: tl.constexpr,
):  # fmt: skip
    """A head ``[DIM_P]`` in float32, normed, and beside each dimension its partner in the rotation.

    Args:
        x_ptr, head: where it lies, and its number, for norms with weights for each. Of several heads, ``[heads, 1]``;
            what is returned is ``[heads, DIM_P]``.
        all_rstd: given for norms over all heads.
        NORM: see :func:`head_norm_kind`.
        NORM_STEP: from the weights of a head to those of the next.
    """
    dims = tl.arange(0, DIM_P)
    inside = dims < HEAD_DIM
    rotates = dims < 2 * HALF
    if INTERLEAVED:
        partner = dims ^ 1
    else:
        partner = tl.where(dims < HALF, dims + HALF, dims - HALF)
    x = tl.load(x_ptr + dims, inside, 0.0).to(tl.float32)
    other = tl.load(x_ptr + partner, rotates, 0.0).to(tl.float32)
    if NORM != "none":
        if NORM == "layer" or NORM == "layer+bias":
            mean = tl.sum(x, -1, keep_dims=True) / HEAD_DIM
            x = tl.where(inside, x - mean, 0.0)
            other -= mean
        if NORM == "all":
            rstd = all_rstd
        else:
            rstd = 1.0 / tl.sqrt(tl.sum(x * x, -1, keep_dims=True) / HEAD_DIM + eps)
        w_ptr += head * NORM_STEP
        b_ptr += head * NORM_STEP
        x = _affine(x * rstd, w_ptr + dims, b_ptr + dims, inside, NORM)
        other = _affine(other * rstd, w_ptr + partner, b_ptr + partner, rotates, NORM)
    return x, other


@triton.jit
def _affine(x, w, b, inside, NORM: tl.constexpr):
    weight = tl.load(w, inside, 0.0).to(tl.float32)
    if NORM == "rms+1":
        weight += 1.0
    x *= weight
    if NORM == "layer+bias":
        x += tl.load(b, inside, 0.0).to(tl.float32)
    return x


@triton.jit
def rotate(
    x, other, angles_ptr, WIDTH: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, DIM_P: tl.constexpr
):  # fmt: skip
    """A head ``[DIM_P]`` rotated in its first ``2 * HALF`` dimensions by the angles given.

    Args:
        angles_ptr: ``HALF`` cosines, and ``WIDTH`` behind them the sines.
    """
    if HALF > 0:
        dims = tl.arange(0, DIM_P)
        rotates = dims < 2 * HALF
        if INTERLEAVED:
            pair, leads = dims // 2, dims % 2 == 0
        else:
            pair, leads = tl.where(dims < HALF, dims, dims - HALF), dims < HALF
        cos = tl.load(angles_ptr + pair, rotates, 1.0)
        sin = tl.load(angles_ptr + WIDTH + pair, rotates, 0.0)
        x = x * cos + tl.where(leads, -other, other) * sin
    return x


@triton.jit
def all_heads_rstd(x_ptr, eps, N: tl.constexpr, BLOCK: tl.constexpr):
    """One over the root of the mean square of ``N`` numbers."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in tl.static_range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, at < N, 0.0).to(tl.float32)
        total += x * x
    return 1.0 / tl.sqrt(tl.sum(total, 0) / N + eps)


def head_norm_kind(attention: Attention) -> str:
    """What kernels call the norms of queries and keys: ``all`` is an RMSNorm over all heads at once."""
    norm = attention.query_norm
    if norm is None:
        return "none"
    if norm.centred:
        return "layer" if norm.bias is None else "layer+bias"
    if attention.norms_all_heads:
        return "all"
    return "rms+1" if norm.plus_one else "rms"


def head_norm_step(attention: Attention) -> int:
    """From the weights of a head to those of the next: 0 where all share theirs."""
    weight = None if attention.query_norm is None else attention.query_norm.weight
    return 0 if weight is None or weight.numel() == attention.head_dim else attention.head_dim
