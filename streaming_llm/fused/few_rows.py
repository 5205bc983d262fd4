"""Products of a few rows, of a batch of streams, with a model's matrices: as fast as these can be read.

A tile of the matrix is the large operand of the matrix units, and the rows the small one. Where a matrix is too small
to occupy the device, its columns are split among programs, the last of which adds the parts up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch, wait_for_input
from .activations import activate
from .norms import or_other
from .recipe import Linear

MOST_ROWS = 64
TILE = {"BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4}
PROGRAMS = 264
"""To aim for: two for each of an H100's multiprocessors."""


@triton.jit
def _dots(
    w_at, w2_at, in_out, x_at, in_batch, acc, acc2, first,
    K: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK_K: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """Add the products of ``SPLIT_K`` columns from ``first`` on to ``acc`` ``[BLOCK_N, ROWS_P]``, and to ``acc2``."""
    columns = tl.arange(0, BLOCK_K)
    for start in range(0, SPLIT_K, BLOCK_K):
        at = first + start + columns
        inside = at < K
        x = tl.load(x_at[:, None] + at[None, :], in_batch[:, None] & inside[None, :], 0.0)
        mask = in_out[:, None] & inside[None, :]
        acc = tl.dot(tl.load(w_at[:, None] + at[None, :], mask, 0.0), tl.trans(x), acc, input_precision="ieee")
        if TWO:
            w2 = tl.load(w2_at[:, None] + at[None, :], mask, 0.0)
            acc2 = tl.dot(w2, tl.trans(x), acc2, input_precision="ieee")
    return acc, acc2


@triton.jit
def _few_rows(
    x_ptr, w1, b1, w2, b2, w3, b3, y_ptr, partial_ptr, arrived_ptr, clip, rows, y_step,
    N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, K: tl.constexpr, ROWS_P: tl.constexpr, BIAS: tl.constexpr,
    GATED: tl.constexpr, ACT: tl.constexpr, CLIP: tl.constexpr, SPLITS: tl.constexpr, SPLIT_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    program, split = tl.program_id(0), tl.program_id(1)
    first, w, b, n, before = program, w1, b1, N1, 0
    if N2 > 0 and not GATED:
        P1: tl.constexpr = (N1 + BLOCK_N - 1) // BLOCK_N
        P2: tl.constexpr = (N2 + BLOCK_N - 1) // BLOCK_N
        if program >= P1 + P2:
            first, w, b, n, before = program - P1 - P2, w3, b3, N3, N1 + N2
        elif program >= P1:
            first, w, b, n, before = program - P1, w2, b2, N2, N1
    out = first * BLOCK_N + tl.arange(0, BLOCK_N)
    in_out = out < n
    row = tl.arange(0, ROWS_P)
    in_batch = row < rows
    wait_for_input(PDL)
    x_at = x_ptr + row * K
    at = out.to(tl.int64) * K
    zeros = tl.zeros((BLOCK_N, ROWS_P), tl.float32)
    acc, acc2 = _dots(
        w + at, w2 + at, in_out, x_at, in_batch, zeros, zeros, split * SPLIT_K, K, SPLIT_K, BLOCK_K, GATED
    )
    ends = True
    if SPLITS > 1:
        size: tl.constexpr = BLOCK_N * ROWS_P
        mine = tl.arange(0, BLOCK_N)[:, None] * ROWS_P + row[None, :]
        parts = partial_ptr + program.to(tl.int64) * SPLITS * 2 * size
        tl.store(parts + split * 2 * size + mine, acc)
        if GATED:
            tl.store(parts + split * 2 * size + size + mine, acc2)
        tl.debug_barrier()  # every thread has written before the program is counted
        ends = tl.atomic_add(arrived_ptr + program, 1, sem="acq_rel") == SPLITS - 1
        if ends:
            acc = zeros
            acc2 = zeros
            for part in tl.static_range(SPLITS):
                acc += tl.load(parts + part * 2 * size + mine, cache_modifier=".cg")
                if GATED:
                    acc2 += tl.load(parts + part * 2 * size + size + mine, cache_modifier=".cg")
            tl.store(arrived_ptr + program, 0)
    if ends:
        if BIAS:
            acc += tl.load(b + out, in_out, 0.0).to(tl.float32)[:, None]
        if GATED:
            if BIAS:
                acc2 += tl.load(b2 + out, in_out, 0.0).to(tl.float32)[:, None]
            acc = activate(acc, ACT) * acc2
        else:
            acc = activate(acc, ACT)
        if CLIP:
            acc = tl.minimum(tl.maximum(acc, -clip), clip)
        to = y_ptr + row[None, :] * y_step + before + out[:, None]
        tl.store(to, acc.to(y_ptr.dtype.element_ty), in_out[:, None] & in_batch[None, :])


class FewRows:
    """Products with a model's matrices, with room for the parts of those that are split.

    Args:
        rows: of every input, at most ``MOST_ROWS``.
        device: of the matrices.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.rows, self.rows_p = rows, max(16, triton.next_power_of_2(rows))
        tiles = PROGRAMS * 2
        self.partial = torch.empty(tiles * 2 * TILE["BLOCK_N"] * self.rows_p, dtype=torch.float32, device=device)
        self.arrived = torch.zeros(tiles, dtype=torch.int32, device=device)

    def __call__(
        self,
        x: Tensor,
        linears: Sequence[Linear],
        y: Tensor,
        *,
        activation: str = "none",
        gated: bool = False,
        clip: float | None = None,
        pdl: bool = False,
    ) -> None:
        """Products of ``x`` with one matrix or three, or ``act(gate x) * up x``, in one launch.

        Args:
            x: ``[rows, K]``, contiguous.
            linears: of ``K`` columns, all with a bias or none; their outputs follow each other in ``y``.
            y: ``[rows, columns]``, rows contiguous.
            gated: ``linears`` are gate and up.
        """
        first, (second, third) = linears[0], (*linears[1:], linears[0], linears[0])[:2]
        sizes = [linear.rows for linear in (linears[:1] if gated else linears)]
        n1, n2, n3 = (*sizes, 0, 0)[:3]
        tiles = sum(triton.cdiv(n, TILE["BLOCK_N"]) for n in sizes)
        blocks = triton.cdiv(first.columns, TILE["BLOCK_K"])
        per_split = triton.cdiv(blocks, max(1, min(blocks, PROGRAMS // tiles)))
        splits = triton.cdiv(blocks, per_split)
        launch(
            _few_rows, (tiles, splits), x, first.weight, or_other(first.bias, x), second.weight,
            or_other(second.bias, x), third.weight, or_other(third.bias, x), y, self.partial, self.arrived,
            clip or 0.0, self.rows, y.stride(0),
            N1=n1, N2=n2, N3=n3, K=first.columns, ROWS_P=self.rows_p, BIAS=first.bias is not None, GATED=gated,
            ACT=activation, CLIP=clip is not None, SPLITS=splits, SPLIT_K=per_split * TILE["BLOCK_K"], pdl=pdl, **TILE,
        )  # fmt: skip
