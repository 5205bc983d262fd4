"""What lies between the matrix products of a forward over many tokens, in as few passes over memory as it takes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gemv import gelu


@triton.jit
def _layer_norm(x, columns, w_ptr, b_ptr, mean, rstd, inside):
    y = (x - mean) * rstd * tl.load(w_ptr + columns, inside, 0.0).to(tl.float32)
    return y + tl.load(b_ptr + columns, inside, 0.0).to(tl.float32)


@triton.jit
def _sum_and_norms(
    x_ptr, a_ptr, b_ptr, new_x_ptr, w1, b1, y1_ptr, w2, b2, y2_ptr, eps,
    K: tl.constexpr, ADD: tl.constexpr, TWO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * K
    columns = tl.arange(0, BLOCK)
    inside = columns < K
    x = tl.load(x_ptr + row + columns, inside, 0.0).to(tl.float32)
    if ADD:
        x += tl.load(a_ptr + row + columns, inside, 0.0).to(tl.float32)
        x += tl.load(b_ptr + row + columns, inside, 0.0).to(tl.float32)
    tl.store(new_x_ptr + row + columns, x, inside)
    mean = tl.sum(x, 0) / K
    centred = tl.where(inside, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / K + eps)
    y = _layer_norm(x, columns, w1, b1, mean, rstd, inside)
    tl.store(y1_ptr + row + columns, y.to(y1_ptr.dtype.element_ty), inside)
    if TWO:
        y = _layer_norm(x, columns, w2, b2, mean, rstd, inside)
        tl.store(y2_ptr + row + columns, y.to(y2_ptr.dtype.element_ty), inside)


def sum_and_norms(
    x: Tensor, add: tuple[Tensor, Tensor] | None, norms: tuple[torch.nn.LayerNorm, ...]
) -> tuple[Tensor, list[Tensor]]:
    """The residual sum of a parallel block and the one or two norms of it that follow, reading everything once.

    Args:
        x: residual stream ``[..., hidden]``, contiguous: embeddings in the model's dtype, or what this returned.
        add: attention's and MLP's output, contiguous, to add to it.
        norms: one or two ``nn.LayerNorm`` with the same epsilon.

    Returns:
        The new residual stream in float32, and a norm of it for each of ``norms``, in the norm's dtype.
    """
    hidden = x.shape[-1]
    rows = x.numel() // hidden
    new_x = x if x.dtype == torch.float32 and add is not None else torch.empty_like(x, dtype=torch.float32)
    outs = [torch.empty_like(x, dtype=norm.weight.dtype) for norm in norms]
    a, b = (x, x) if add is None else add
    first, last = norms[0], norms[-1]
    block = triton.next_power_of_2(hidden)
    _sum_and_norms[(rows,)](
        x, a, b, new_x, first.weight, first.bias, outs[0], last.weight, last.bias, outs[-1], first.eps,
        K=hidden, ADD=add is not None, TWO=len(norms) == 2, BLOCK=block, num_warps=min(8, max(1, block // 512)),
    )  # fmt: skip
    return new_x, outs


@triton.jit
def _gelu(x_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, at < n, 0.0)
    tl.store(x_ptr + at, gelu(x.to(tl.float32)).to(x_ptr.dtype.element_ty), at < n)


def gelu_(x: Tensor) -> Tensor:
    """Exact GELU of a contiguous tensor, in place, computed in float32."""
    _gelu[(triton.cdiv(x.numel(), 2048),)](x, x.numel(), BLOCK=2048, num_warps=4)
    return x


@triton.jit
def _rotate_in_place(
    qkv_ptr, cos_ptr, sin_ptr, length, num_heads,
    HALF: tl.constexpr, HEAD_DIM: tl.constexpr, HALF_P: tl.constexpr, HEADS_P: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    pair = tl.arange(0, HALF_P)[None, :]
    head = tl.arange(0, HEADS_P)[:, None]
    mask = (pair < HALF) & (head < num_heads)
    angle = (token % length) * HALF + pair
    cos, sin = tl.load(cos_ptr + angle, pair < HALF, 0.0), tl.load(sin_ptr + angle, pair < HALF, 0.0)
    at = qkv_ptr + (token.to(tl.int64) * num_heads + head) * (3 * HEAD_DIM) + pair
    for part in tl.static_range(2):  # query, key
        a = tl.load(at + part * HEAD_DIM, mask, 0.0).to(tl.float32)
        b = tl.load(at + part * HEAD_DIM + HALF, mask, 0.0).to(tl.float32)
        tl.store(at + part * HEAD_DIM, (a * cos - b * sin).to(qkv_ptr.dtype.element_ty), mask)
        tl.store(at + part * HEAD_DIM + HALF, (b * cos + a * sin).to(qkv_ptr.dtype.element_ty), mask)


def rotate_qk_(qkv: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate queries and keys where they lie.

    Args:
        qkv: ``[batch, length, num_heads, 3 * head_dim]``, contiguous.
        cos, sin: ``[length, rotary_dim / 2]``, float32, contiguous.
    """
    batch, length, num_heads, width = qkv.shape
    half = cos.shape[1]
    _rotate_in_place[(batch * length,)](
        qkv, cos, sin, length, num_heads, HALF=half, HEAD_DIM=width // 3,
        HALF_P=triton.next_power_of_2(half), HEADS_P=triton.next_power_of_2(num_heads), num_warps=4,
    )  # fmt: skip


@triton.jit
def _cross_entropy(logits_ptr, targets_ptr, nll_ptr, vocab, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits = logits_ptr + row * stride
    columns = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits + start + columns, start + columns < vocab, float("-inf")).to(tl.float32)
        new = tl.maximum(largest, x)
        shift = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(largest - shift) + tl.exp(x - shift)
        largest = new
    peak = tl.max(largest, 0)
    log_sum = peak + tl.log(tl.sum(total * tl.exp(largest - peak), 0))
    target = tl.load(targets_ptr + row)
    tl.store(nll_ptr + row, log_sum - tl.load(logits + target).to(tl.float32))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood ``[n]``, float32, of ``targets`` ``[n]`` under ``logits`` ``[n, vocab]`` of any dtype.

    The logits are read once and never copied to float32.
    """
    nll = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
    _cross_entropy[(logits.shape[0],)](
        logits, targets, nll, logits.shape[1], logits.stride(0), BLOCK=4096, num_warps=8
    )
    return nll
