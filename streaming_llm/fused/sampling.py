"""Tokens drawn from half-precision logits without sorting the vocabulary, with every setting on the device.

A 16-bit logit has at most 65,536 values, so that a histogram of them says all that sorting would: which value is the
``top_k``-th largest, where the nucleus of ``top_p`` ends, and on which value a draw falls. Three kernels:

1. ``_count``: how often each value occurs, and the largest;
2. ``_pick``: weights of 256 values together, by many programs; the last of them ends the search, first among these
   groups and then among the values of one, and leaves the drawn value and which of its tokens it is;
3. ``_find``: that token, and a clean histogram for the next draw.

The draw is the inversion of the distribution function over tokens in descending order, equal ones by their number:
what :meth:`streaming_llm.sampling.Sampling.choose` does by sorting.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch, wait_for_input
from ..sampling import Sampling

CHUNK = 1024
VALUES = 65536
GROUP = 256
"""Values of a group, and groups."""


@triton.jit
def _order_of(x):
    """A 16-bit float as an integer in ``0 .. 65535`` of the same order; both zeros are one value."""
    bits = x.to(tl.int16, bitcast=True).to(tl.int32)
    bits = tl.where(bits == -32768, 0, bits)
    return tl.where(bits < 0, -1 - bits, bits + 32768) & 65535


@triton.jit
def _value_of(order, DTYPE: tl.constexpr):
    """The float of an integer made by :func:`_order_of`, in float32."""
    bits = tl.where(order >= 32768, order - 32768, 65535 - order)
    return bits.to(tl.uint16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def _count(logits_ptr, counts_ptr, largest_ptr, vocab, CHUNK: tl.constexpr, PDL: tl.constexpr):
    wait_for_input(PDL)
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    order = _order_of(tl.load(logits_ptr + row * vocab + at, at < vocab, 0.0))
    tl.atomic_add(counts_ptr + row * 65536 + order, 1, at < vocab, sem="relaxed")
    tl.atomic_max(largest_ptr + row, tl.max(tl.where(at < vocab, order, 0), 0), sem="relaxed")


@triton.jit
def _weights(order, counts, top, temperature, DTYPE: tl.constexpr):
    """Weight of one token of each value, 1 for the largest."""
    weight = tl.exp((_value_of(order, DTYPE) - _value_of(top, DTYPE)) / temperature)
    return tl.where(counts > 0, weight, 0.0)


@triton.jit
def _above(x):
    """The sum of what lies behind each entry: of the larger values."""
    return tl.cumsum(x, 0, reverse=True) - x


@triton.jit
def _only(x, where):
    """The one entry of ``x`` where ``where`` holds."""
    return tl.sum(tl.where(where, x, 0), 0)


@triton.jit
def _of_group(counts_ptr, group, top, temperature, DTYPE: tl.constexpr):
    """Order, count, and weight of one token, of the 256 values of a group."""
    order = group * 256 + tl.arange(0, 256)
    counts = tl.load(counts_ptr + order)
    return order, counts, _weights(order, counts, top, temperature, DTYPE).to(tl.float64)


@triton.jit
def _draw(
    counts_ptr, groups_ptr, masses_ptr, top, temperature, top_k, top_p, uniform, DTYPE: tl.constexpr
):  # fmt: skip
    """The value on which a draw falls, and which of its tokens in order of their numbers."""
    index = tl.arange(0, 256)
    in_group = tl.load(groups_ptr + index, cache_modifier=".cg")
    of_group = tl.load(masses_ptr + index, cache_modifier=".cg").to(tl.float64)
    above_group, mass_above_group = _above(in_group), _above(of_group)

    # The value at which the top_k tokens end, how many of that value are among them, and the weight of all of them.
    group = tl.max(tl.where((in_group > 0) & (above_group + in_group >= top_k), index, 0), 0)
    order, counts, weight = _of_group(counts_ptr, group, top, temperature, DTYPE)
    above = _above(counts) + _only(above_group, index == group)
    last = tl.max(tl.where((counts > 0) & (above + counts >= top_k), index, 0), 0)
    k_group, k_order, k_of_value = group, group * 256 + last, top_k - _only(above, index == last)
    larger = tl.sum(tl.where(index > last, counts * weight, 0.0), 0) + _only(mass_above_group, index == group)
    total = larger + k_of_value * _only(weight, index == last)

    # The same for the fewest of these that reach top_p of that weight.
    wanted = top_p * total
    group = tl.min(tl.where((in_group > 0) & (index >= k_group) & (mass_above_group < wanted), index, 255), 0)
    order, counts, weight = _of_group(counts_ptr, group, top, temperature, DTYPE)
    counts = tl.where(order > k_order, counts, tl.where(order == k_order, k_of_value, 0))
    mass_above = _above(counts * weight) + _only(mass_above_group, index == group)
    last = tl.min(tl.where((counts > 0) & (mass_above < wanted), index, 255), 0)
    p_group, p_order = group, group * 256 + last
    larger, of_one = _only(mass_above, index == last), _only(weight, index == last)
    p_of_value = tl.minimum(tl.ceil((wanted - larger) / of_one).to(tl.int32), _only(counts, index == last))
    p_of_value = tl.maximum(p_of_value, 1)

    # The value on which the draw falls.
    at = uniform * (larger + p_of_value * of_one)
    group = tl.min(tl.where((in_group > 0) & (index >= p_group) & (mass_above_group <= at), index, 255), 0)
    order, counts, weight = _of_group(counts_ptr, group, top, temperature, DTYPE)
    kept = tl.where(order > p_order, counts, tl.where(order == p_order, p_of_value, 0))
    mass_above = _above(kept * weight) + _only(mass_above_group, index == group)
    drawn = tl.min(tl.where((kept > 0) & (mass_above <= at), index, 255), 0)
    ordinal = (at - _only(mass_above, index == drawn)) / _only(weight, index == drawn)
    return group * 256 + drawn, tl.minimum(ordinal.to(tl.int32), _only(kept, index == drawn) - 1)


@triton.jit
def _pick(
    counts_ptr, largest_ptr, groups_ptr, masses_ptr, arrived_ptr, drawn_ptr,
    uniform_ptr, temperature_ptr, top_k_ptr, top_p_ptr, vocab,
    DTYPE: tl.constexpr, GROUPS_OF_PROGRAM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_input(PDL)
    row, programs = tl.program_id(1).to(tl.int64), tl.num_programs(0)
    counts_ptr += row * 65536
    groups_ptr += row * 256
    masses_ptr += row * 256
    top = tl.load(largest_ptr + row)
    temperature = tl.load(temperature_ptr + row)
    greedy = temperature <= 0.0
    temperature = tl.where(greedy, 1.0, temperature)
    group = tl.program_id(0) * GROUPS_OF_PROGRAM + tl.arange(0, GROUPS_OF_PROGRAM)
    order = group[:, None] * 256 + tl.arange(0, 256)[None, :]
    counts = tl.load(counts_ptr + order)
    mass = counts.to(tl.float32) * _weights(order, counts, top, temperature, DTYPE)
    tl.store(groups_ptr + group, tl.sum(counts, 1))
    tl.store(masses_ptr + group, tl.sum(mass, 1))
    tl.debug_barrier()  # every thread has written before the program is counted
    if tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel") == programs - 1:
        top_k = tl.minimum(tl.maximum(tl.load(top_k_ptr + row), 1), vocab)
        top_p = tl.load(top_p_ptr + row).to(tl.float64)
        uniform = tl.where(greedy, 0.0, tl.load(uniform_ptr + row)).to(tl.float64)
        drawn, ordinal = _draw(counts_ptr, groups_ptr, masses_ptr, top, temperature, top_k, top_p, uniform, DTYPE)
        tl.store(drawn_ptr + row * 2, drawn)
        tl.store(drawn_ptr + row * 2 + 1, ordinal)
        tl.store(arrived_ptr + row, 0)


@triton.jit
def _find(
    logits_ptr, counts_ptr, largest_ptr, found_ptr, arrived_ptr, drawn_ptr, tokens_ptr, vocab,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_P: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_input(PDL)
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    drawn, ordinal = tl.load(drawn_ptr + row * 2), tl.load(drawn_ptr + row * 2 + 1)
    logits_ptr += row * vocab
    found_ptr += row * CHUNKS
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    order = _order_of(tl.load(logits_ptr + at, at < vocab, 0.0))
    tl.store(counts_ptr + row * 65536 + order, 0, at < vocab)
    tl.store(found_ptr + chunk, tl.sum(((order == drawn) & (at < vocab)).to(tl.int32), 0))
    tl.debug_barrier()  # every thread has written before the program is counted
    if tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel") == CHUNKS - 1:
        index = tl.arange(0, CHUNKS_P)
        found = tl.load(found_ptr + index, index < CHUNKS, 0, cache_modifier=".cg")
        before = tl.cumsum(found, 0) - found
        here = tl.max(tl.where((found > 0) & (before <= ordinal), index, 0), 0)
        rest = ordinal - _only(before, index == here)
        at_here = here * CHUNK + tl.arange(0, CHUNK)
        order_here = _order_of(tl.load(logits_ptr + at_here, at_here < vocab, 0.0))
        equal = ((order_here == drawn) & (at_here < vocab)).to(tl.int32)
        token = _only(at_here, (equal > 0) & (tl.cumsum(equal, 0) == rest + 1))
        tl.store(tokens_ptr + row, token.to(tl.int64))
        tl.store(arrived_ptr + row, 0)
        tl.store(largest_ptr + row, 0)


class HistogramSampler:
    """Draws a token for each row of half-precision logits ``[batch, vocab]`` on a CUDA device.

    Attributes:
        temperature, top_p: float32 ``[batch]``; a temperature of 0 takes the most likely token.
        top_k: int32 ``[batch]``; the vocabulary's size or more: all.
    """

    def __init__(self, batch: int, vocab: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int32, device=device)

        self.temperature, self.top_p = (torch.ones(batch, device=device) for _ in range(2))
        self.vocab, self.top_k = vocab, zeros(batch) + vocab
        self.chunks = triton.cdiv(vocab, CHUNK)
        self._counts, self._largest, self._arrived = zeros(batch, VALUES), zeros(batch), zeros(2, batch)
        self._groups, self._masses = zeros(batch, GROUP), zeros(batch, GROUP).float()
        self._found, self._drawn = zeros(batch, self.chunks), zeros(batch, 2)

    def set(self, sampling: Sampling) -> None:
        """Draw every row as ``sampling`` says from now on, also where the draw has been recorded."""
        self.temperature.fill_(sampling.temperature)
        self.top_k.fill_(self.vocab if sampling.top_k is None else min(sampling.top_k, self.vocab))
        self.top_p.fill_(1.0 if sampling.top_p is None else sampling.top_p)

    def choose(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """As :meth:`.Sampling.choose`, for half-precision ``logits``."""
        uniform = torch.rand(logits.shape[0], dtype=torch.float64, device=logits.device, generator=generator)
        tokens = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
        self(logits, uniform, tokens)
        return tokens

    def __call__(self, logits: Tensor, uniform: Tensor, tokens: Tensor, *, pdl: bool = False) -> None:
        """Draw by random numbers in ``[0, 1)``, float32 or float64 ``[batch]``, to ``tokens``, int64 ``[batch]``.

        Args:
            logits: ``[batch, vocab]``, bfloat16 or float16, contiguous.
        """
        batch, vocab = logits.shape
        every_chunk, per_program = (self.chunks, batch), 4
        dtype = tl.bfloat16 if logits.dtype == torch.bfloat16 else tl.float16
        launch(_count, every_chunk, logits, self._counts, self._largest, vocab, CHUNK=CHUNK, pdl=pdl)
        launch(
            _pick, (GROUP // per_program, batch),
            self._counts, self._largest, self._groups, self._masses, self._arrived[0], self._drawn,
            uniform, self.temperature, self.top_k, self.top_p, vocab,
            DTYPE=dtype, GROUPS_OF_PROGRAM=per_program, pdl=pdl,
        )  # fmt: skip
        launch(
            _find, every_chunk,
            logits, self._counts, self._largest, self._found, self._arrived[1], self._drawn, tokens, vocab,
            CHUNK=CHUNK, CHUNKS=self.chunks, CHUNKS_P=triton.next_power_of_2(self.chunks), pdl=pdl,
        )  # fmt: skip
