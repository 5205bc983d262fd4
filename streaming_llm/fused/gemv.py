"""Matrix-vector products of a decode step of batch 1, with the layer norm before and the residual sum behind them.

A step reads every weight once and computes next to nothing, so a kernel is as good as the fraction of the memory
bandwidth that it uses. A program owns a few output rows and keeps their first tile in flight while it computes the
norm of the input, which all programs do for themselves: the input is a few kilobytes in the second-level cache.
With programmatic dependent launch that first tile is requested before the kernel in front has ended.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import wait_for_input

TILE_OF_NORM = {"BLOCK_R": 4, "BLOCK_K": 512, "num_warps": 2}
TILE_OF_SUM = {"BLOCK_R": 2, "BLOCK_K": 512, "num_warps": 2}
"""Rows and columns of a tile, and warps: of a dozen tried on an H200 for the sizes of Pythia-70m, 2.8b and 6.9b the
fastest, or within 7% of it."""


@triton.jit
def gelu(x):
    """GELU of a float32 tensor by its definition, within 4e-7 of it: what float32 leaves of the library's too.

    As the positive part of ``x`` less ``|x| / 2 * erfc(|x| / sqrt(2))``, with the error function of Abramowitz and
    Stegun, Handbook of Mathematical Functions, 7.1.26, which takes a third of the instructions.
    """
    size = tl.abs(x)
    t = 1.0 / (1.0 + 0.23164189 * size)  # 0.3275911 / sqrt(2)
    poly = (((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592
    return tl.maximum(x, 0.0) - 0.5 * size * poly * t * tl.exp(-0.5 * x * x)


@triton.jit
def _rows_of_norm(
    x_ptr, norm_w_ptr, norm_b_ptr, w_ptr, bias_ptr, y_ptr, block, n_rows, eps,
    K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Rows of ``act(w @ layer_norm(x) + bias)``."""
    rows = block * BLOCK_R + tl.arange(0, BLOCK_R)
    in_rows = rows < n_rows
    columns = tl.arange(0, BLOCK_K)
    w_rows = w_ptr + rows.to(tl.int64)[:, None] * K + columns[None, :]
    tile = tl.load(w_rows, in_rows[:, None] & (columns < K)[None, :], 0.0)
    wait_for_input(PDL)

    total = tl.zeros((BLOCK_K,), tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        total += tl.load(x_ptr + start + columns, start + columns < K, 0.0)
    mean = tl.sum(total, 0) / K
    total = tl.zeros((BLOCK_K,), tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        inside = start + columns < K
        centred = tl.where(inside, tl.load(x_ptr + start + columns, inside, 0.0) - mean, 0.0)
        total += centred * centred
    rstd = 1.0 / tl.sqrt(tl.sum(total, 0) / K + eps)

    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        inside = start + columns < K
        if start > 0:
            tile = tl.load(w_rows + start, in_rows[:, None] & inside[None, :], 0.0)
        x = (tl.load(x_ptr + start + columns, inside, 0.0) - mean) * rstd
        x = x * tl.load(norm_w_ptr + start + columns, inside, 0.0).to(tl.float32)
        x += tl.load(norm_b_ptr + start + columns, inside, 0.0).to(tl.float32)
        acc += tile.to(tl.float32) * x[None, :]
    y = tl.sum(acc, 1)
    if BIAS:
        y += tl.load(bias_ptr + rows, in_rows, 0.0).to(tl.float32)
    if GELU:
        y = gelu(y)
    tl.store(y_ptr + rows, y.to(y_ptr.dtype.element_ty), in_rows)


@triton.jit
def _norm_gemv(
    x_ptr, norm1_w, norm1_b, w1, bias1, y1, norm2_w, norm2_b, w2, bias2, y2, eps,
    N1: tl.constexpr, N2: tl.constexpr, K: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr,
    GELU1: tl.constexpr, GELU2: tl.constexpr, PDL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    blocks1: tl.constexpr = (N1 + BLOCK_R - 1) // BLOCK_R
    if N2 == 0:
        _rows_of_norm(x_ptr, norm1_w, norm1_b, w1, bias1, y1, block, N1, eps, K, BLOCK_R, BLOCK_K, BIAS1, GELU1, PDL)
    elif block < blocks1:
        _rows_of_norm(x_ptr, norm1_w, norm1_b, w1, bias1, y1, block, N1, eps, K, BLOCK_R, BLOCK_K, BIAS1, GELU1, PDL)
    else:
        _rows_of_norm(
            x_ptr, norm2_w, norm2_b, w2, bias2, y2, block - blocks1, N2, eps, K, BLOCK_R, BLOCK_K, BIAS2, GELU2, PDL
        )


def norm_gemv(x: Tensor, first: tuple, second: tuple | None = None, *, pdl: bool = False) -> None:
    """``y = act(linear(layer_norm(x)))`` for one matrix or for two over the same input, in one launch.

    Args:
        x: ``[K]``, float32.
        first, second: ``(norm, linear, y, with_gelu)``: an ``nn.LayerNorm``, an ``nn.Linear`` of ``K`` columns, the
            output ``[rows]`` of any floating dtype, and whether GELU follows.
        pdl: launched with programmatic dependence on the kernel in front.
    """
    norm1, linear1, y1, gelu1 = first
    norm2, linear2, y2, gelu2 = (norm1, None, y1, False) if second is None else second
    n1, n2 = linear1.weight.shape[0], 0 if linear2 is None else linear2.weight.shape[0]
    linear2 = linear1 if linear2 is None else linear2
    rows = TILE_OF_NORM["BLOCK_R"]
    _norm_gemv[(triton.cdiv(n1, rows) + triton.cdiv(n2, rows),)](
        x, norm1.weight, norm1.bias, linear1.weight, _or(linear1.bias, x), y1,
        norm2.weight, norm2.bias, linear2.weight, _or(linear2.bias, x), y2, norm1.eps,
        N1=n1, N2=n2, K=x.shape[0], BIAS1=linear1.bias is not None, BIAS2=linear2.bias is not None,
        GELU1=gelu1, GELU2=gelu2, PDL=pdl, **TILE_OF_NORM, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def _or(bias: Tensor | None, other: Tensor) -> Tensor:
    """A pointer to pass where there is no bias."""
    return other if bias is None else bias


@triton.jit
def _add_product(acc, tile, x_ptr, w_rows, in_rows, columns, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """``acc`` plus the products of rows and input, tile by tile; ``tile`` is the first one."""
    for start in tl.static_range(0, K, BLOCK_K):
        inside = start + columns < K
        if start > 0:
            tile = tl.load(w_rows + start, in_rows[:, None] & inside[None, :], 0.0)
        x = tl.load(x_ptr + start + columns, inside, 0.0).to(tl.float32)
        acc += tile.to(tl.float32) * x[None, :]
    return acc


@triton.jit
def _gemv_sum(
    residual_ptr, other_ptr, x1, w1, bias1, x2, w2, bias2, y_ptr,
    N: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr,
    RESIDUAL: tl.constexpr, OTHER: tl.constexpr, PDL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_rows = rows < N
    columns = tl.arange(0, BLOCK_K)
    rows1 = w1 + rows.to(tl.int64)[:, None] * K1 + columns[None, :]
    tile = tl.load(rows1, in_rows[:, None] & (columns < K1)[None, :], 0.0)
    wait_for_input(PDL)
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    acc = _add_product(acc, tile, x1, rows1, in_rows, columns, K1, BLOCK_K)
    if K2 > 0:
        rows2 = w2 + rows.to(tl.int64)[:, None] * K2 + columns[None, :]
        tile = tl.load(rows2, in_rows[:, None] & (columns < K2)[None, :], 0.0)
        acc = _add_product(acc, tile, x2, rows2, in_rows, columns, K2, BLOCK_K)
    y = tl.sum(acc, 1)
    if BIAS1:
        y += tl.load(bias1 + rows, in_rows, 0.0).to(tl.float32)
    if BIAS2:
        y += tl.load(bias2 + rows, in_rows, 0.0).to(tl.float32)
    if RESIDUAL:
        y += tl.load(residual_ptr + rows, in_rows, 0.0)
    if OTHER:
        y += tl.load(other_ptr + rows, in_rows, 0.0)
    tl.store(y_ptr + rows, y, in_rows)


def gemv_sum(
    first: tuple[torch.nn.Linear, Tensor],
    second: tuple[torch.nn.Linear, Tensor] | None,
    y: Tensor,
    residual: Tensor | None = None,
    other: Tensor | None = None,
    *,
    pdl: bool = False,
) -> None:
    """``y = residual + other + linear1(x1) + linear2(x2)``, in one launch.

    Args:
        first, second: ``(linear, x)`` with ``x`` ``[columns]`` of any floating dtype; ``second`` may be ``None``.
        y, residual, other: ``[rows]``, float32; ``y`` is none of the inputs.
        pdl: launched with programmatic dependence on the kernel in front.
    """
    linear1, x1 = first
    linear2, x2 = first if second is None else second
    n = linear1.weight.shape[0]
    _gemv_sum[(triton.cdiv(n, TILE_OF_SUM["BLOCK_R"]),)](
        y if residual is None else residual, y if other is None else other,
        x1, linear1.weight, _or(linear1.bias, y), x2, linear2.weight, _or(linear2.bias, y), y,
        N=n, K1=linear1.weight.shape[1], K2=0 if second is None else linear2.weight.shape[1],
        BIAS1=linear1.bias is not None, BIAS2=second is not None and linear2.bias is not None,
        RESIDUAL=residual is not None, OTHER=other is not None, PDL=pdl, **TILE_OF_SUM,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
