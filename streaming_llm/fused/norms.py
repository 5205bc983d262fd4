"""Norms as kernels apply them to a row."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .recipe import Norm


@triton.jit
def norm_weight(w_ptr, at, inside, WEIGHT: tl.constexpr, PLUS_ONE: tl.constexpr):
    """What a normed row is multiplied with, in float32; 0 outside."""
    if WEIGHT:
        w = tl.load(w_ptr + at, inside, 0.0).to(tl.float32)
        return tl.where(inside, w + 1.0, 0.0) if PLUS_ONE else w
    else:
        return tl.where(inside, 1.0, 0.0)


@triton.jit
def normed(
    x, at, inside, w_ptr, b_ptr, eps,
    N: tl.constexpr, NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, PLUS_ONE: tl.constexpr,
):  # fmt: skip
    """A row of ``N`` numbers, held whole and 0 outside, normed; ``NORM`` is ``none``, ``rms`` or ``layer``."""
    if NORM != "none":
        if NORM == "layer":
            x = tl.where(inside, x - tl.sum(x, 0) / N, 0.0)
        x *= 1.0 / tl.sqrt(tl.sum(x * x, 0) / N + eps)
        x *= norm_weight(w_ptr, at, inside, WEIGHT, PLUS_ONE)
        if BIAS:
            x += tl.load(b_ptr + at, inside, 0.0).to(tl.float32)
    return x


@triton.jit
def residual(
    x_ptr, add_ptr, add_w_ptr, add_rstd, at, inside, ADDS: tl.constexpr, PLUS_ONE: tl.constexpr
):  # fmt: skip
    """The residual stream, with a normed output added that is not in it yet."""
    x = tl.load(x_ptr + at, inside, 0.0)
    if ADDS:
        add = tl.load(add_ptr + at, inside, 0.0) * add_rstd
        x += add * norm_weight(add_w_ptr, at, inside, True, PLUS_ONE)
    return x


@triton.jit
def rstd_of(x_ptr, eps, N: tl.constexpr, BLOCK: tl.constexpr):
    """One over the root of the mean square of ``N`` numbers."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in tl.static_range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, at < N, 0.0).to(tl.float32)
        total += x * x
    return 1.0 / tl.sqrt(tl.sum(total, 0) / N + eps)


def meta_of(norm: Norm | None, prefix: str = "") -> dict[str, Any]:
    """Compile-time arguments for a norm."""
    return {
        f"{prefix}NORM": "none" if norm is None else "layer" if norm.centred else "rms",
        f"{prefix}WEIGHT": norm is not None and norm.weight is not None,
        f"{prefix}BIAS": norm is not None and norm.bias is not None,
    }


def any_plus_one(*norms: Norm | None) -> bool:
    """Whether norms that a kernel takes together, all of one family, multiply with ``1 + weight``."""
    return any(norm is not None and norm.plus_one for norm in norms)


def pointers_of(norm: Norm | None, other: Tensor) -> tuple[Tensor, Tensor, float]:
    """Weight, bias and epsilon of a norm; ``other`` where there is no tensor to point to."""
    if norm is None:
        return other, other, 0.0
    return or_other(norm.weight, other), or_other(norm.bias, other), norm.eps


def or_other(given: Tensor | None, other: Tensor) -> Tensor:
    """A pointer to pass where there is no tensor."""
    return other if given is None else given
