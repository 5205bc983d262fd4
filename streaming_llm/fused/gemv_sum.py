"""Matrix-vector products of a decode step of batch 1, with the residual sum behind them."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch, wait_for_input
from .int4_tiles import (
    SIGNS,
    int4_add_product,
    int4_as_doubled,
    int4_loaded_input,
    int4_next_tiles,
    int4_request_input,
)
from .norms import or_other
from .recipe import Linear
from .tiles import add_product, first_tiles, next_tile, no_products, row_factors, row_sums
from .weights import Packed

TILE_OF_SUM = {
    0: {"BLOCK_R": 2, "BLOCK_K": 512, "AHEAD": 5, "num_warps": 2},
    8: {"BLOCK_R": 4, "BLOCK_K": 1024, "AHEAD": 1, "num_warps": 2},
    4: {"BLOCK_R": 16, "BLOCK_K": 2048, "AHEAD": 1, "num_warps": 16},
}
"""As ``TILE_OF_NORM`` in :mod:`.norm_gemv`."""
TILE_OF_MIDDLE = {
    0: {"BLOCK_R": 2, "BLOCK_K": 1024, "AHEAD": 3, "num_warps": 4},
    4: {"BLOCK_R": 16, "BLOCK_K": 1024, "AHEAD": 4, "num_warps": 8},
}
MIDDLE_COLUMNS = 3072, 4096
"""A single matrix, plain or of 4 bits, whose columns are from the one to the other has a tile of its own, which asks
for nearly all of a row at once: with 4,096 columns, a step of Qwen3-4B takes 0.975 of the time, one of Llama-3.1-8B in
4 bits 0.99 (fewer were not measured)."""


@triton.jit
def _add_products(
    acc, rest, tiles, x_ptr, of_rows, signs,
    K: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``acc`` and ``rest``, of 4 bits 0 so far, with the products of all tiles; ``tiles`` are the first ``AHEAD``."""
    if BITS == 4:
        x = int4_request_input(x_ptr, 0, K, BLOCK_K, GROUP)
        for begin in tl.range(0, K, AHEAD * BLOCK_K, num_stages=1):
            for i in tl.static_range(AHEAD):
                start = begin + i * BLOCK_K
                next_x = int4_request_input(x_ptr, start + BLOCK_K, K, BLOCK_K, GROUP)
                acc = int4_add_product(acc, tiles[0], int4_loaded_input(x), signs)
                x, tiles = next_x, int4_next_tiles(tiles, of_rows, start + AHEAD * BLOCK_K, K, BLOCK_K, GROUP)
        acc = int4_as_doubled(acc, x_ptr)
    else:
        columns = tl.arange(0, BLOCK_K)
        for start in tl.static_range(0, K, BLOCK_K):
            tile = next_tile(tiles, of_rows, start, K, BLOCK_K, AHEAD, BITS)
            x = tl.load(x_ptr + start + columns, start + columns < K, 0.0).to(tl.float32)
            acc, rest = add_product(acc, rest, tile, x, BITS)
    return acc, rest


@triton.jit
def _gemv_sum(
    residual_ptr, other_ptr, x1, w1, bias1, x2, w2, bias2, y_ptr, multiplier, s1, z1, s2, z2, signs,
    N: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr,
    RESIDUAL: tl.constexpr, OTHER: tl.constexpr, SCALE: tl.constexpr, PDL: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    VALUES: tl.constexpr = 32 // BITS if BITS > 0 else 1
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_rows = rows < N
    rows1 = w1 + rows.to(tl.int64) * (K1 // VALUES), in_rows, s1 + rows, z1 + rows, N
    tiles = first_tiles(rows1, K1, BLOCK_K, AHEAD, BITS, GROUP)
    scale1, zero1 = row_factors(rows1, BITS)
    y = tl.zeros((BLOCK_R,), tl.float32)
    if BIAS1:
        y += tl.load(bias1 + rows, in_rows, 0.0).to(tl.float32)
    if BIAS2:
        y += tl.load(bias2 + rows, in_rows, 0.0).to(tl.float32)
    wait_for_input(PDL)
    added = tl.zeros((BLOCK_R,), tl.float32)
    if RESIDUAL:
        added += tl.load(residual_ptr + rows, in_rows, 0.0)
    if OTHER:
        added += tl.load(other_ptr + rows, in_rows, 0.0)
    acc, rest = no_products(BLOCK_R, BLOCK_K, BITS, GROUP)
    acc, rest = _add_products(acc, rest, tiles, x1, rows1, signs, K1, BLOCK_K, AHEAD, BITS, GROUP)
    if K2 > 0:
        rows2 = w2 + rows.to(tl.int64) * (K2 // VALUES), in_rows, s2 + rows, z2 + rows, N
        if BITS > 0:  # the factors of whole rows are others
            y += row_sums(acc, rest, scale1, zero1, BITS)
            acc, rest = no_products(BLOCK_R, BLOCK_K, BITS, GROUP)
        scale2, zero2 = row_factors(rows2, BITS)
        AHEAD2: tl.constexpr = AHEAD if BITS == 4 else 0  # products of 4 bits replace the tiles that there are
        tiles = first_tiles(rows2, K2, BLOCK_K, AHEAD2, BITS, GROUP)
        acc, rest = _add_products(acc, rest, tiles, x2, rows2, signs, K2, BLOCK_K, AHEAD2, BITS, GROUP)
        y += row_sums(acc, rest, scale2, zero2, BITS)
    else:
        y += row_sums(acc, rest, scale1, zero1, BITS)
    if SCALE:
        y *= multiplier
    tl.store(y_ptr + rows, y + added, in_rows)


def gemv_sum(
    first: tuple[Linear, Tensor],
    second: tuple[Linear, Tensor] | None,
    y: Tensor,
    residual: Tensor | None = None,
    other: Tensor | None = None,
    *,
    multiplier: float = 1.0,
    pdl: bool = False,
) -> None:
    """``y = residual + other + multiplier * (linear1(x1) + linear2(x2))``, in one launch.

    Args:
        first, second: ``(linear, x)`` with ``x`` ``[columns]`` of any floating dtype; ``second`` may be ``None``. Of 4
            bits, whole matrices with groups of the same size.
        y, residual, other: ``[rows]``, float32; ``y`` is none of the inputs.
        pdl: launched with programmatic dependence on the kernel in front.
    """
    linear1, x1 = first
    linear2, x2 = first if second is None else second
    assert all(linear.weight.is_whole for linear in (linear1, linear2) if isinstance(linear.weight, Packed))
    assert linear1.bits != 4 or linear1.group == linear2.group
    fewest, most = MIDDLE_COLUMNS
    is_middle = second is None and linear1.bits in TILE_OF_MIDDLE and fewest <= linear1.columns <= most
    tile = (TILE_OF_MIDDLE if is_middle else TILE_OF_SUM)[linear1.bits]
    launch(
        _gemv_sum, (triton.cdiv(linear1.rows, tile["BLOCK_R"]),),
        or_other(residual, y), or_other(other, y), x1, *linear1.pointers(y), x2, *linear2.pointers(y),
        y, multiplier, *linear1.factors(y), *linear2.factors(y), SIGNS,
        N=linear1.rows, K1=linear1.columns, K2=0 if second is None else linear2.columns,
        BIAS1=linear1.bias is not None, BIAS2=second is not None and linear2.bias is not None,
        RESIDUAL=residual is not None, OTHER=other is not None, SCALE=multiplier != 1.0, pdl=pdl, **tile,
        BITS=linear1.bits, GROUP=linear1.group,
    )  # fmt: skip
