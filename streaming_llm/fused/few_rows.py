"""Matrix products of a few rows: the tokens of several streams, or a few of one.

Such a product takes as long as its weights take to arrive. A program owns some of the output's columns, for all rows,
and keeps several tiles of weights on their way; matrices with the same input share a launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch, pdl_available, shared_memory, wait_for_input
from .activations import activate
from .recipe import Linear

MOST_ROWS = 16
"""As many as the matrix units take at a time. With 64 cuBLAS comes as near to the memory's bandwidth by itself."""
BLOCK_N, BLOCK_K, STAGES = 64, 128, 6
"""Output columns of a program, how much of each is one tile, and tiles on their way, where shared memory holds them:
for Llama-3.1-8B and Pythia-2.8b on an H100 within 8% of the fastest of 14 tried."""


@triton.jit
def _few_rows(
    x_ptr, w1, b1, w2, b2, w3, b3, y_ptr, rows, clip,
    N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, BIASES: tl.constexpr,
    GATED: tl.constexpr, ACT: tl.constexpr, CLIP: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    first, w, b, n, before = program, w1, b1, N1, 0
    if not GATED and N2 > 0:
        P1: tl.constexpr = (N1 + BLOCK_N - 1) // BLOCK_N
        P2: tl.constexpr = (N2 + BLOCK_N - 1) // BLOCK_N
        if program >= P1 + P2:
            first, w, b, n, before = program - P1 - P2, w3, b3, N3, N1 + N2
        elif program >= P1:
            first, w, b, n, before = program - P1, w2, b2, N2, N1
    column, k, row = first * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K), tl.arange(0, ROWS)
    inside, in_rows = column < n, row < rows
    at = column.to(tl.int64)[:, None] * K + k[None, :]
    x_at = row[:, None] * K + k[None, :]
    y = tl.zeros((BLOCK_N, ROWS), tl.float32)
    up = tl.zeros((BLOCK_N, ROWS), tl.float32)
    wait_for_input(PDL)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        in_k = (start + k < K)[None, :]
        there = inside[:, None] & in_k
        x = tl.trans(tl.load(x_ptr + x_at + start, in_rows[:, None] & in_k, 0.0))
        tile = tl.load(w + at + start, there, 0.0, eviction_policy="evict_first")
        y = tl.dot(tile, x, y, input_precision="ieee")
        if GATED:
            tile = tl.load(w2 + at + start, there, 0.0, eviction_policy="evict_first")
            up = tl.dot(tile, x, up, input_precision="ieee")
    if BIASES:
        y += tl.load(b + column, inside, 0.0).to(tl.float32)[:, None]
        if GATED:
            up += tl.load(b2 + column, inside, 0.0).to(tl.float32)[:, None]
    y = activate(y, ACT)
    if GATED:
        y *= up
    if CLIP:
        y = tl.minimum(tl.maximum(y, -clip), clip)
    to = row[None, :] * WIDTH + before + column[:, None]
    tl.store(y_ptr + to, y.to(y_ptr.dtype.element_ty), inside[:, None] & in_rows[None, :])


def are_few(x: Tensor, linear: Linear) -> bool:
    """Whether products of ``x`` ``[..., columns]`` with matrices like this one are for :func:`few_rows`."""
    plain = x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) and x.is_contiguous()
    return plain and x.numel() // x.shape[-1] <= MOST_ROWS and not linear.bits


def few_rows(
    x: Tensor, linears: Sequence[Linear], *, clip: float | None = None, activation: str = "none", gated: bool = False
) -> Tensor:
    """``activation(linear(x))`` for one matrix or three, the outputs one after the other, in one launch.

    Args:
        x: ``[..., columns]``, contiguous, at most ``MOST_ROWS`` rows in all, in the dtype of the weights.
        linears: all with a bias or none.
        gated: ``activation(first(x)) * second(x)`` of two matrices.
        clip: bound of what is returned.

    Returns:
        ``[..., rows of the matrices]``, in the dtype of ``x``.
    """
    first, (second, third) = linears[0], (*linears[1:], linears[0], linears[0])[:2]
    rows = [linear.rows for linear in linears]
    outputs = rows[:1] if gated else rows
    n1, n2, n3 = (*outputs, 0, 0)[:3]
    y = x.new_empty(*x.shape[:-1], sum(outputs))
    of_tiles = ((1 + gated) * BLOCK_N + MOST_ROWS) * BLOCK_K * x.element_size()
    launch(
        _few_rows, (sum(triton.cdiv(n, BLOCK_N) for n in outputs),),
        x, *first.pointers(x), *second.pointers(x), *third.pointers(x), y, x.numel() // first.columns, clip or 0.0,
        N1=n1, N2=n2, N3=n3, K=first.columns, WIDTH=sum(outputs), BIASES=first.bias is not None, GATED=gated,
        ACT=activation, CLIP=clip is not None, ROWS=MOST_ROWS, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
        STAGES=min(STAGES, shared_memory(x.device) // of_tiles), pdl=pdl_available(x.device),
    )  # fmt: skip
    return y
