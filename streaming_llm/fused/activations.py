"""Activations of MLPs, and what else kernels apply to single numbers, in float32."""

from __future__ import annotations

import triton
import triton.language as tl


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
def activate(x, KIND: tl.constexpr):
    """``KIND`` is ``none``, ``silu``, ``gelu``, ``gelu_tanh`` or ``relu``."""
    if KIND == "silu":
        x = x * tl.sigmoid(x)
    elif KIND == "gelu":
        x = gelu(x)
    elif KIND == "gelu_tanh":  # (1 + tanh(u)) / 2 is sigmoid(2 u)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif KIND == "relu":
        x = tl.maximum(x, 0.0)
    return x


@triton.jit
def capped(x, cap):
    """``cap * tanh(x / cap)``."""
    return cap * (2.0 * tl.sigmoid(2.0 * x / cap) - 1.0)
