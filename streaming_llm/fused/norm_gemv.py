"""Matrix-vector products of a decode step of batch 1, with the norm before them.

A step reads every weight once and computes next to nothing, so a kernel is as good as the fraction of the memory
bandwidth that it uses. A program owns a few output rows and requests their first tiles before it looks at its input;
with programmatic dependent launch, before the kernels in front have ended. The norm of the input all programs compute
for themselves: it is a few kilobytes in the second-level cache, where weights leave it in peace.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch, wait_for_input
from .activations import activate, capped
from .int4_tiles import SIGNS, int4_add_product, int4_input, int4_next_tiles
from .norms import any_plus_one, meta_of, norm_weight, or_other, pointers_of, residual, rstd_of
from .recipe import Linear, Norm
from .tiles import add_product, first_tiles, next_tile, no_products, row_factors, row_sums
from .weights import Packed

TILE_OF_NORM = {
    0: {"BLOCK_R": 4, "BLOCK_K": 1024, "AHEAD": 1, "num_warps": 4},
    8: {"BLOCK_R": 4, "BLOCK_K": 1024, "AHEAD": 4, "num_warps": 4},
    4: {"BLOCK_R": 32, "BLOCK_K": 256, "AHEAD": 2, "num_warps": 2},
}
"""By the bits of packed weights (0: plain ones), rows and columns of a tile, tiles requested ahead, and warps.
The fastest on an H100, or near it: within 3%, of up to a dozen tried for plain weights of the benchmark's models, and
within 7%, of a dozen for packed weights of Llama-3.1-8B (of 4 bits: the fastest of thirty)."""
TILE_OF_SMALL = {
    0: {"BLOCK_R": 4, "BLOCK_K": 512, "AHEAD": 1, "num_warps": 2},
    8: {"BLOCK_R": 4, "BLOCK_K": 1024, "AHEAD": 2, "num_warps": 2},
    4: {"BLOCK_R": 16, "BLOCK_K": 1024, "AHEAD": 1, "num_warps": 8},
}
FEW_ROWS, FEW_COLUMNS = 12288, 2048
"""Products with fewer rows in all, or, of plain weights, fewer columns, have the tiles of small ones: so that there
are programs for all multiprocessors, and columns for all threads."""


@triton.jit
def _normed(
    x, start, of_norm, squares, K: tl.constexpr, BLOCK_K: tl.constexpr,
    ADDS: tl.constexpr, NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, PLUS_ONE: tl.constexpr,
):  # fmt: skip
    """``x`` ``[BLOCK_K]`` from column ``start`` on, normed but for an RMSNorm's factor; sums of squares for it."""
    new_x_ptr, norm_w_ptr, norm_b_ptr, mean, rstd = of_norm
    at = start + tl.arange(0, BLOCK_K)
    inside = at < K
    if ADDS:
        if start // BLOCK_K % tl.num_programs(0) == tl.program_id(0):
            tl.store(new_x_ptr + at, x, inside)
    if NORM == "layer":
        x = (x - mean) * rstd
    if NORM == "rms":
        squares += x * x
    if NORM != "none":
        x *= norm_weight(norm_w_ptr, at, inside, WEIGHT, PLUS_ONE)
    if BIAS:
        x += tl.load(norm_b_ptr + at, inside, 0.0).to(tl.float32)
    return x, squares


@triton.jit
def _norm_gemv(
    x_ptr, add_ptr, add_w_ptr, add_eps, new_x_ptr, norm_w_ptr, norm_b_ptr, eps,
    w1, b1, w2, b2, w3, b3, y_ptr, clip, scale, cap, s1, z1, s2, z2, s3, z3, signs,
    N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, K: tl.constexpr, BIASES: tl.constexpr, GATED: tl.constexpr,
    ADDS: tl.constexpr, NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    PLUS_ONE: tl.constexpr, ACT: tl.constexpr, CLIP: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr,
    PDL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    VALUES: tl.constexpr = 32 // BITS if BITS > 0 else 1
    program = tl.program_id(0)
    columns, index = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    if GATED:  # rows of two matrices take turns, or follow each other where factors do
        if BITS > 0:
            is_up, row = index // (BLOCK_R // 2), index % (BLOCK_R // 2)
        else:
            is_up, row = index % 2, index // 2
        rows = program * (BLOCK_R // 2) + row
        in_rows = rows < N1
        starts = tl.where(is_up == 0, w1, w2)
        biases = tl.where(is_up == 0, b1, b2)
        scales, zeros, step = tl.where(is_up == 0, s1, s2), tl.where(is_up == 0, z1, z2), STEP
    else:
        first, w, b, n, before, s, z = program, w1, b1, N1, 0, s1, z1
        if N2 > 0:
            P1: tl.constexpr = (N1 + BLOCK_R - 1) // BLOCK_R
            P2: tl.constexpr = (N2 + BLOCK_R - 1) // BLOCK_R
            if program >= P1 + P2:
                first, w, b, n, before, s, z = program - P1 - P2, w3, b3, N3, N1 + N2, s3, z3
            elif program >= P1:
                first, w, b, n, before, s, z = program - P1, w2, b2, N2, N1, s2, z2
        rows = first * BLOCK_R + index
        in_rows = rows < n
        to = before + rows
        starts, biases, scales, zeros, step = w, b, s, z, n
    of_rows = starts + rows.to(tl.int64) * (K // VALUES), in_rows, scales + rows, zeros + rows, step
    tiles = first_tiles(of_rows, K, BLOCK_K, AHEAD, BITS, GROUP)
    row_scale, row_zero = row_factors(of_rows, BITS)
    if BIASES:
        bias = tl.load(biases + rows, in_rows, 0.0).to(tl.float32)
    wait_for_input(PDL)

    add_rstd = rstd_of(add_ptr, add_eps, K, BLOCK_K) if ADDS else 1.0
    mean, rstd = 0.0, 1.0
    if NORM == "layer":
        xs = ()
        total = tl.zeros((BLOCK_K,), tl.float32)
        for start in tl.static_range(0, K, BLOCK_K):
            at = start + columns
            x = residual(x_ptr, add_ptr, add_w_ptr, add_rstd, at, at < K, ADDS, PLUS_ONE)
            xs = xs + (x,)  # type: ignore[assignment]  # noqa: RUF005 - Triton cannot unpack
            total += x
        mean = tl.sum(total, 0) / K
        total = tl.zeros((BLOCK_K,), tl.float32)
        for start in tl.static_range(0, K, BLOCK_K):
            x = tl.where(start + columns < K, xs[start // BLOCK_K] - mean, 0.0)
            total += x * x
        rstd = 1.0 / tl.sqrt(tl.sum(total, 0) / K + eps)

    # An RMSNorm's factor is taken out of the product, so that both are summed up in one pass.
    of_norm = new_x_ptr, norm_w_ptr, norm_b_ptr, mean, rstd
    squares = tl.zeros((BLOCK_K,), tl.float32)
    acc, rest = no_products(BLOCK_R, BLOCK_K, BITS, GROUP)
    if BITS == 4:
        x = residual(x_ptr, add_ptr, add_w_ptr, add_rstd, columns, columns < K, ADDS, PLUS_ONE)
        x, squares = _normed(x, 0, of_norm, squares, K, BLOCK_K, ADDS, NORM, WEIGHT, BIAS, PLUS_ONE)
        for begin in tl.range(0, K, AHEAD * BLOCK_K, num_stages=1):
            for i in tl.static_range(AHEAD):
                behind = begin + (i + 1) * BLOCK_K
                at = behind + columns
                more = residual(x_ptr, add_ptr, add_w_ptr, add_rstd, at, at < K, ADDS, PLUS_ONE)
                more, squares = _normed(more, behind, of_norm, squares, K, BLOCK_K, ADDS, NORM, WEIGHT, BIAS, PLUS_ONE)
                acc = int4_add_product(acc, tiles[0], int4_input(x, GROUP), signs)
                x, tiles = more, int4_next_tiles(tiles, of_rows, begin + (i + AHEAD) * BLOCK_K, K, BLOCK_K, GROUP)
    else:
        # The input of an RMSNorm is requested before each tile: the other way round, as behind a LayerNorm, a step of
        # Llama-3.1-8B took 1.22 times as long.
        for start in tl.static_range(0, K, BLOCK_K):
            at = start + columns
            if NORM == "layer":
                tile = next_tile(tiles, of_rows, start, K, BLOCK_K, AHEAD, BITS)
                x = xs[start // BLOCK_K]
            else:
                x = residual(x_ptr, add_ptr, add_w_ptr, add_rstd, at, at < K, ADDS, PLUS_ONE)
            x, squares = _normed(x, start, of_norm, squares, K, BLOCK_K, ADDS, NORM, WEIGHT, BIAS, PLUS_ONE)
            if NORM != "layer":
                tile = next_tile(tiles, of_rows, start, K, BLOCK_K, AHEAD, BITS)
            acc, rest = add_product(acc, rest, tile, x, BITS)
    if NORM == "rms":
        rstd = 1.0 / tl.sqrt(tl.sum(squares, 0) / K + eps)
        acc, rest = acc * rstd, rest * rstd
    y = row_sums(acc, rest, row_scale, row_zero, BITS)
    if BIASES:
        y += bias
    if GATED:
        if BITS > 0:
            gate, up = tl.split(tl.trans(tl.reshape(y, (2, BLOCK_R // 2))))
        else:
            gate, up = tl.split(tl.reshape(y, (BLOCK_R // 2, 2)))
        y = activate(gate, ACT) * up
        to = program * (BLOCK_R // 2) + tl.arange(0, BLOCK_R // 2)
        in_rows = to < N1
    else:
        y = activate(y, ACT)
    if CLIP:
        y = tl.minimum(tl.maximum(y, -clip), clip)
    if SCALE:
        y *= scale
    if CAP:
        y = capped(y, cap)
    tl.store(y_ptr + to, y.to(y_ptr.dtype.element_ty), in_rows)


def norm_gemv(
    x: Tensor,
    norm: Norm | None,
    linears: tuple[Linear, ...],
    y: Tensor,
    *,
    pending: tuple[Tensor, Norm] | None = None,
    new_x: Tensor | None = None,
    activation: str = "none",
    gated: bool = False,
    clip: float | None = None,
    scale: float = 1.0,
    cap: float | None = None,
    pdl: bool = False,
) -> None:
    """Products of ``norm(x)`` with one matrix or three, or ``act(gate x) * up x``, in one launch.

    Args:
        x: ``[K]``, float32.
        linears: of ``K`` columns, all with a bias or none; their outputs follow each other in ``y``. Halves of a
            matrix of 4 bits only where they are gated.
        y: ``[rows]``, of any floating dtype.
        pending: an output ``[K]``, float32, and an RMSNorm with a weight: normed, it is added to ``x`` first.
        new_x: where that sum goes, ``[K]``, float32.
        gated: ``linears`` are gate and up, and ``y`` has the rows of one.
        clip, scale, cap: what is done to the outputs: limited, multiplied, soft-capped.
        pdl: launched with programmatic dependence on the kernel in front.
    """
    first, (second, third) = linears[0], (*linears[1:], linears[0], linears[0])[:2]
    rows = [linear.rows for linear in linears]
    assert gated or all(linear.weight.is_whole for linear in linears if isinstance(linear.weight, Packed))
    n1, n2, n3 = (*rows, 0, 0)[:3]
    is_small = sum(rows) < FEW_ROWS or (not first.bits and first.columns < FEW_COLUMNS)
    tile = (TILE_OF_SMALL if is_small else TILE_OF_NORM)[first.bits]
    per_program = tile["BLOCK_R"] // 2 if gated else tile["BLOCK_R"]
    grid = triton.cdiv(n1, per_program) if gated else sum(triton.cdiv(n, per_program) for n in rows)
    add, add_norm = (x, None) if pending is None else pending
    add_weight, _, add_eps = pointers_of(add_norm, x)
    launch(
        _norm_gemv, (grid,), x, add, add_weight, add_eps, or_other(new_x, x), *pointers_of(norm, x),
        *first.pointers(x), *second.pointers(x), *third.pointers(x), y, clip or 0.0, scale, cap or 0.0,
        *first.factors(x), *second.factors(x), *third.factors(x), SIGNS,
        N1=n1, N2=0 if gated else n2, N3=0 if gated else n3, K=first.columns, BIASES=first.bias is not None,
        GATED=gated, ADDS=pending is not None, **meta_of(norm), PLUS_ONE=any_plus_one(norm, add_norm), ACT=activation,
        CLIP=clip is not None, SCALE=scale != 1.0, CAP=cap is not None, pdl=pdl, **tile,
        BITS=first.bits, GROUP=first.group, STEP=first.factors(x)[0].stride(0),
    )  # fmt: skip
