"""Queries and keys of many tokens, normed and rotated where the projections have put them."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..attention.triton_kernels import pairing
from ..launch import launch
from .heads import head_meta
from .norms import pointers_of
from .recipe import Attention


@triton.jit
def _norm_and_rotate(
    x_ptr, cos_ptr, sin_ptr, w_ptr, b_ptr, eps, length, step,
    HEADS: tl.constexpr, HEADS_P: tl.constexpr, START: tl.constexpr, OF_GROUP: tl.constexpr, GROUP_STEP: tl.constexpr,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_P: tl.constexpr,
    NORM: tl.constexpr, NORM_STEP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    head = tl.arange(0, HEADS_P)[:, None]
    dims = tl.arange(0, DIM_P)[None, :]
    inside = (head < HEADS) & (dims < HEAD_DIM)
    rotates = (head < HEADS) & (dims < 2 * HALF)
    pair, partner, leads = pairing(dims, HALF, INTERLEAVED)
    place = START + head // OF_GROUP * GROUP_STEP + head % OF_GROUP
    at = x_ptr + row.to(tl.int64) * step + place * HEAD_DIM
    x = tl.load(at + dims, inside, 0.0).to(tl.float32)
    other = tl.load(at + partner, rotates, 0.0).to(tl.float32)
    if NORM != "none":
        if NORM == "layer" or NORM == "layer+bias":
            mean = (tl.sum(x, 1) / HEAD_DIM)[:, None]
            x = tl.where(inside, x - mean, 0.0)
            other -= mean
        if NORM == "all":
            rstd = 1.0 / tl.sqrt(tl.sum(tl.sum(x * x, 1), 0) / (HEADS * HEAD_DIM) + eps)
        else:
            rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1) / HEAD_DIM + eps)[:, None]
        weights = w_ptr + head * NORM_STEP
        one = 1.0 if NORM == "rms+1" else 0.0
        x *= rstd * (tl.load(weights + dims, inside, 0.0).to(tl.float32) + one)
        other *= rstd * (tl.load(weights + partner, rotates, 0.0).to(tl.float32) + one)
        if NORM == "layer+bias":
            biases = b_ptr + head * NORM_STEP
            x += tl.load(biases + dims, inside, 0.0).to(tl.float32)
            other += tl.load(biases + partner, rotates, 0.0).to(tl.float32)
    angle = (row % length) * HALF + pair
    cos, sin = tl.load(cos_ptr + angle, dims < 2 * HALF, 1.0), tl.load(sin_ptr + angle, dims < 2 * HALF, 0.0)
    x = x * cos + tl.where(leads, -other, other) * sin
    tl.debug_barrier()  # nothing is written before every thread has read
    tl.store(at + dims, x.to(x_ptr.dtype.element_ty), inside)


def norm_and_rotate_(outputs: list[Tensor], attention: Attention, cos: Tensor, sin: Tensor) -> None:
    """Norm and rotate queries and keys in what the projections gave, in place.

    Args:
        outputs: ``[batch, length, rows]`` of each projection, contiguous.
        cos, sin: ``[length, rotary_dim / 2]``, float32, contiguous, with the rotation's factor.
    """
    places, half, together = attention.places, cos.shape[1], len(outputs) == 1
    if not half and attention.query_norm is None:
        return
    for x, norm, heads, of_group, step, start in (
        (outputs[0], attention.query_norm, attention.num_heads, attention.groups, places.query_step, 0),
        (outputs[0] if together else outputs[1], attention.key_norm, attention.num_kv_heads, 1, places.key_step,
         places.key_start if together else 0),
    ):  # fmt: skip
        batch, length, width = x.shape
        launch(
            _norm_and_rotate, (batch * length,), x, cos, sin, *pointers_of(norm, x), length, width,
            HEADS=heads, HEADS_P=triton.next_power_of_2(heads), START=start, OF_GROUP=of_group, GROUP_STEP=step,
            HALF=half, **head_meta(attention), num_warps=4 if heads > 8 else 1,
        )  # fmt: skip
