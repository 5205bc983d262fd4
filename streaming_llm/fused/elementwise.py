"""What lies between the matrix products of a forward over many tokens, in as few passes over memory as it takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch, pdl_available, wait_for_input
from .activations import activate
from .norms import any_plus_one, meta_of, normed, pointers_of
from .recipe import Norm


@triton.jit
def _add_and_norm(
    x_ptr, a_ptr, b_ptr, new_x_ptr, out_w, out_b, out_eps, w1, b1, eps1, y1_ptr, w2, b2, eps2, y2_ptr, factor,
    K: tl.constexpr, ADDS: tl.constexpr, OUTS: tl.constexpr, SCALE: tl.constexpr,
    PLUS_ONE: tl.constexpr, OUT_NORM: tl.constexpr, OUT_WEIGHT: tl.constexpr, OUT_BIAS: tl.constexpr,
    NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_input(PDL)
    row = tl.program_id(0).to(tl.int64) * K
    columns = tl.arange(0, BLOCK)
    inside = columns < K
    x = tl.load(x_ptr + row + columns, inside, 0.0).to(tl.float32)
    if ADDS == 0:
        if SCALE:
            x *= factor
    else:
        add = tl.load(a_ptr + row + columns, inside, 0.0).to(tl.float32)
        if ADDS == 2:
            add += tl.load(b_ptr + row + columns, inside, 0.0).to(tl.float32)
        add = normed(add, columns, inside, out_w, out_b, out_eps, K, OUT_NORM, OUT_WEIGHT, OUT_BIAS, PLUS_ONE)
        x += add * factor if SCALE else add
    tl.store(new_x_ptr + row + columns, x, inside)
    y = normed(x, columns, inside, w1, b1, eps1, K, NORM, WEIGHT, BIAS, PLUS_ONE)
    tl.store(y1_ptr + row + columns, y.to(y1_ptr.dtype.element_ty), inside)
    if OUTS == 2:
        y = normed(x, columns, inside, w2, b2, eps2, K, NORM, WEIGHT, BIAS, PLUS_ONE)
        tl.store(y2_ptr + row + columns, y.to(y2_ptr.dtype.element_ty), inside)


def add_and_norm(
    x: Tensor,
    adds: Sequence[Tensor],
    norms: Sequence[Norm | None],
    dtype: torch.dtype,
    *,
    out_norm: Norm | None = None,
    factor: float = 1.0,
) -> tuple[Tensor, list[Tensor]]:
    """The residual sum of a layer and the norms of it that follow, reading everything once.

    Args:
        x: residual stream ``[..., hidden]``, contiguous: embeddings in the model's dtype, or what this returned, which
            is written over.
        adds: nothing, or one or two outputs, contiguous, whose sum is added.
        norms: one or two of one kind; ``None``: the sum itself.
        dtype: of what is returned for each of ``norms``.
        out_norm: of the sum of ``adds``, before it is added.
        factor: on what is added; where nothing is, on ``x``.

    Returns:
        The new residual stream in float32, and for each of ``norms`` a tensor.
    """
    hidden = x.shape[-1]
    in_place = x.dtype == torch.float32 and bool(adds)
    new_x = x if in_place else torch.empty_like(x, dtype=torch.float32)
    outs = [torch.empty_like(x, dtype=dtype) for _ in norms]
    a, b = (*adds, x, x)[:2]
    block = triton.next_power_of_2(hidden)
    first, last = norms[0], norms[-1]
    launch(
        _add_and_norm, (x.numel() // hidden,), x, a, b, new_x, *pointers_of(out_norm, x),
        *pointers_of(first, x), outs[0], *pointers_of(last, x), outs[-1], factor,
        K=hidden, ADDS=len(adds), OUTS=len(norms), SCALE=factor != 1.0,
        PLUS_ONE=any_plus_one(*norms, out_norm), **meta_of(out_norm, "OUT_"), **meta_of(first),
        BLOCK=block, num_warps=min(8, max(1, block // 512)), pdl=pdl_available(x.device),
    )  # fmt: skip
    return new_x, outs


@triton.jit
def _activate(
    x_ptr, gate_ptr, out_ptr, columns, x_step, gate_step, out_step,
    GATED: tl.constexpr, ACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    x = tl.load(x_ptr + row * x_step + at, inside, 0.0).to(tl.float32)
    if GATED:
        x *= activate(tl.load(gate_ptr + row * gate_step + at, inside, 0.0).to(tl.float32), ACT)
    else:
        x = activate(x, ACT)
    tl.store(out_ptr + row * out_step + at, x.to(out_ptr.dtype.element_ty), inside)


def activated(x: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    """``act(x)`` in place, or ``act(gate) * x``, computed in float32.

    Args:
        x, gate: ``[..., columns]``; rows lie at equal distances, each contiguous.

    Returns:
        Contiguous, like ``x``: ``x`` itself where that is contiguous.
    """
    columns = x.shape[-1]
    rows = x.numel() // columns
    out = x if x.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format)
    gate = x if gate is None else gate
    block = min(4096, triton.next_power_of_2(columns))
    launch(
        _activate, (rows, triton.cdiv(columns, block)), x, gate, out, columns,
        x.stride(-2), gate.stride(-2), columns,
        GATED=gate is not x, ACT=activation, BLOCK=block, num_warps=max(1, min(8, block // 512)),
    )  # fmt: skip
    return out


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
    launch(
        _cross_entropy, (logits.shape[0],), logits, targets.contiguous(), nll, logits.shape[1], logits.stride(0),
        BLOCK=4096, num_warps=8,
    )  # fmt: skip
    return nll
