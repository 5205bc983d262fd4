"""Matrix-vector products of a decode step of batch 1, with the layer norm before and the residual sum behind them.

A step reads every weight once and computes next to nothing, so a kernel is as good as the fraction of the memory
bandwidth that it uses. A program owns a few output rows and requests their first tiles before it looks at its input;
with programmatic dependent launch, before the kernels in front have ended. The norm of the input all programs compute
for themselves: it is a few kilobytes in the second-level cache, where weights leave it in peace.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, nn

from .launch import wait_for_input

TILE_OF_NORM = {"BLOCK_R": 4, "BLOCK_K": 512, "AHEAD": 1, "num_warps": 2}
TILE_OF_SUM = {"BLOCK_R": 2, "BLOCK_K": 512, "AHEAD": 5, "num_warps": 2}
"""Rows and columns of a tile, tiles that are requested ahead, and warps: of two dozen tried in whole steps on an H200,
for the sizes of Pythia-70m, 2.8b and 6.9b the fastest, or within 7% of it."""


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
def _tile(w_rows, in_rows, columns, start: tl.constexpr, K: tl.constexpr):
    """Weights ``[BLOCK_R, BLOCK_K]`` from column ``start`` on, which nothing reads again in this step."""
    mask = in_rows[:, None] & (start + columns < K)[None, :]
    return tl.load(w_rows + start, mask, 0.0, eviction_policy="evict_first")


@triton.jit
def _first_tiles(w_rows, in_rows, columns, K: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr):
    """Up to ``AHEAD`` tiles, requested at once."""
    tiles = ()
    for start in tl.static_range(0, min(K, AHEAD * BLOCK_K), BLOCK_K):
        tiles = tiles + (_tile(w_rows, in_rows, columns, start, K),)  # noqa: RUF005 - Triton cannot unpack
    return tiles


@triton.jit
def _norm_gemv(
    x_ptr, norm_w_ptr, norm_b_ptr, w_ptr, bias_ptr, y_ptr, eps,
    N: tl.constexpr, K: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr, PDL: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_rows = rows < N
    columns = tl.arange(0, BLOCK_K)
    w_rows = w_ptr + rows.to(tl.int64)[:, None] * K + columns[None, :]
    tiles = _first_tiles(w_rows, in_rows, columns, K, BLOCK_K, AHEAD)
    if BIAS:
        bias = tl.load(bias_ptr + rows, in_rows, 0.0).to(tl.float32)
    wait_for_input(PDL)

    xs = ()
    total = tl.zeros((BLOCK_K,), tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        x = tl.load(x_ptr + start + columns, start + columns < K, 0.0)
        xs = xs + (x,)  # noqa: RUF005
        total += x
    mean = tl.sum(total, 0) / K
    total = tl.zeros((BLOCK_K,), tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        centred = tl.where(start + columns < K, xs[start // BLOCK_K] - mean, 0.0)
        total += centred * centred
    rstd = 1.0 / tl.sqrt(tl.sum(total, 0) / K + eps)

    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        inside = start + columns < K
        if start < AHEAD * BLOCK_K:
            tile = tiles[start // BLOCK_K]
        else:
            tile = _tile(w_rows, in_rows, columns, start, K)
        x = (xs[start // BLOCK_K] - mean) * rstd
        x = x * tl.load(norm_w_ptr + start + columns, inside, 0.0).to(tl.float32)
        x += tl.load(norm_b_ptr + start + columns, inside, 0.0).to(tl.float32)
        acc += tile.to(tl.float32) * x[None, :]
    y = tl.sum(acc, 1)
    if BIAS:
        y += bias
    if GELU:
        y = gelu(y)
    tl.store(y_ptr + rows, y.to(y_ptr.dtype.element_ty), in_rows)


def norm_gemv(
    x: Tensor, norm: nn.LayerNorm, linear: nn.Linear, y: Tensor, *, with_gelu: bool = False, pdl: bool = False
) -> None:
    """``y = act(linear(norm(x)))`` in one launch.

    Args:
        x: ``[K]``, float32.
        linear: of ``K`` columns.
        y: ``[rows]``, of any floating dtype.
        with_gelu: whether ``act`` is GELU.
        pdl: launched with programmatic dependence on the kernel in front.
    """
    n, k = linear.weight.shape
    _norm_gemv[(triton.cdiv(n, TILE_OF_NORM["BLOCK_R"]),)](
        x, norm.weight, norm.bias, linear.weight, _or(linear.bias, x), y, norm.eps,
        N=n, K=k, BIAS=linear.bias is not None, GELU=with_gelu, PDL=pdl, **TILE_OF_NORM,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def _or(bias: Tensor | None, other: Tensor) -> Tensor:
    """A pointer to pass where there is no bias."""
    return other if bias is None else bias


@triton.jit
def _add_product(
    acc, tiles, x_ptr, w_rows, in_rows, columns, K: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr
):  # fmt: skip
    """``acc`` plus the products of rows and input, tile by tile; ``tiles`` are the first ``AHEAD``."""
    for start in tl.static_range(0, K, BLOCK_K):
        if start < AHEAD * BLOCK_K:
            tile = tiles[start // BLOCK_K]
        else:
            tile = _tile(w_rows, in_rows, columns, start, K)
        x = tl.load(x_ptr + start + columns, start + columns < K, 0.0).to(tl.float32)
        acc += tile.to(tl.float32) * x[None, :]
    return acc


@triton.jit
def _gemv_sum(
    residual_ptr, other_ptr, x1, w1, bias1, x2, w2, bias2, y_ptr,
    N: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr,
    RESIDUAL: tl.constexpr, OTHER: tl.constexpr, PDL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_rows = rows < N
    columns = tl.arange(0, BLOCK_K)
    rows1 = w1 + rows.to(tl.int64)[:, None] * K1 + columns[None, :]
    tiles = _first_tiles(rows1, in_rows, columns, K1, BLOCK_K, AHEAD)
    added = tl.zeros((BLOCK_R,), tl.float32)
    if BIAS1:
        added += tl.load(bias1 + rows, in_rows, 0.0).to(tl.float32)
    if BIAS2:
        added += tl.load(bias2 + rows, in_rows, 0.0).to(tl.float32)
    wait_for_input(PDL)
    if RESIDUAL:
        added += tl.load(residual_ptr + rows, in_rows, 0.0)
    if OTHER:
        added += tl.load(other_ptr + rows, in_rows, 0.0)
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    acc = _add_product(acc, tiles, x1, rows1, in_rows, columns, K1, BLOCK_K, AHEAD)
    if K2 > 0:
        rows2 = w2 + rows.to(tl.int64)[:, None] * K2 + columns[None, :]
        acc = _add_product(acc, (), x2, rows2, in_rows, columns, K2, BLOCK_K, 0)
    y = tl.sum(acc, 1) + added
    tl.store(y_ptr + rows, y, in_rows)


def gemv_sum(
    first: tuple[nn.Linear, Tensor],
    second: tuple[nn.Linear, Tensor] | None,
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
