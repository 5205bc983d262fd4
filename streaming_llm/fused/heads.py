"""A head of a query or key as kernels read it: normed and rotated."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..attention.triton_kernels import pairing
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
        NORM, NORM_STEP: see :func:`head_meta`.
    """
    dims = tl.arange(0, DIM_P)
    inside = dims < HEAD_DIM
    rotates = dims < 2 * HALF
    _, partner, _ = pairing(dims, HALF, INTERLEAVED)
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
        pair, _, leads = pairing(dims, HALF, INTERLEAVED)
        cos = tl.load(angles_ptr + pair, rotates, 1.0)
        sin = tl.load(angles_ptr + WIDTH + pair, rotates, 0.0)
        x = x * cos + tl.where(leads, -other, other) * sin
    return x


def head_meta(attention: Attention) -> dict[str, Any]:
    """Compile-time arguments for queries and keys.

    ``NORM`` is ``none``, ``layer``, ``layer+bias``, ``rms``, ``rms+1``, or ``all``: an RMSNorm over all heads at once.
    ``NORM_STEP`` leads from the weights of a head to those of the next: 0 where all share theirs.
    """
    norm, head_dim, kind, step = attention.query_norm, attention.head_dim, "none", 0
    if norm is not None:
        rms = "all" if attention.norms_all_heads else "rms+1" if norm.plus_one else "rms"
        kind = ("layer" if norm.bias is None else "layer+bias") if norm.centred else rms
        step = 0 if norm.weight is None or norm.weight.numel() == head_dim else head_dim
    return {
        "INTERLEAVED": attention.rotary.interleaved, "HEAD_DIM": head_dim, "DIM_P": triton.next_power_of_2(head_dim),
        "NORM": kind, "NORM_STEP": step,
    }  # fmt: skip
