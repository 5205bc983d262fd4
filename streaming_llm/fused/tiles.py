"""Rows of a matrix as a program reads them, tile by tile, and their products with a vector.

A matrix is stored as it is (``BITS`` is 0), or as integers in words of 32 bits (:class:`.weights.Packed`): of 8, with
a factor and a zero for each row, which are left to :func:`row_sums`, or of 4 (:mod:`.int4_tiles`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .int4_tiles import int4_no_products, int4_row_sums, int4_tile_at


@triton.jit
def tile_at(rows, start, K: tl.constexpr, BLOCK_K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr):
    """Weights ``[BLOCK_R, BLOCK_K]`` from column ``start`` on, which nothing reads again in this step.

    Of 8 bits: their words. Of 4: what :func:`.int4_tile_at` gives.

    Args:
        rows: where they begin and which of them there are ``[BLOCK_R]``, where their factors and zeros begin
            ``[BLOCK_R]``, and how far these are from those of the next group of columns.
    """
    if BITS == 4:
        return int4_tile_at(rows, start, K, BLOCK_K, GROUP)
    else:
        VALUES: tl.constexpr = 4 if BITS > 0 else 1
        POLICY: tl.constexpr = "" if BITS > 0 else "evict_first"  # costs more instructions than words have
        columns = tl.arange(0, BLOCK_K // VALUES)
        if BITS > 0:  # adds 0 in a form that hides its divisors, so that each thread loads the words of 8 columns
            columns += tl.minimum(tl.program_id(0), 0) * (8 // VALUES)
        mask = rows[1][:, None] & (start // VALUES + columns < K // VALUES)[None, :]
        return tl.load(rows[0][:, None] + columns[None, :] + start // VALUES, mask, 0.0, eviction_policy=POLICY)


@triton.jit
def first_tiles(
    rows, K: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """``AHEAD`` tiles, requested at once; fewer where there are no more, unless they are of 4 bits."""
    tiles = ()
    for start in tl.static_range(0, AHEAD * BLOCK_K if BITS == 4 else min(K, AHEAD * BLOCK_K), BLOCK_K):
        tiles = tiles + (tile_at(rows, start, K, BLOCK_K, BITS, GROUP),)  # type: ignore[assignment]  # noqa: RUF005 - Triton cannot unpack
    return tiles


@triton.jit
def next_tile(
    tiles, rows, start: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr, BITS: tl.constexpr
):
    """The tile from column ``start`` on, not of 4 bits: one of the first, or requested now."""
    if start < AHEAD * BLOCK_K:
        return tiles[start // BLOCK_K]
    else:
        return tile_at(rows, start, K, BLOCK_K, BITS, K)


@triton.jit
def _products_of_words(words, x):
    """Sums over the numbers of each word: of products with ``x``, by ``2 ** -53``, ``[BLOCK_R, n]``; of ``x`` ``[n]``.

    The numbers count from the lowest. They are read as float32 without a conversion: where they lie in a word, they
    are the last bits of a float, multiples of ``2 ** -149``, also where they reach the lowest bit of its exponent,
    since exponents 0 and 1 have the same steps. ``x`` makes up for that, exactly, as long as it is below ``2 ** 31``
    and above ``2 ** -70``.
    """
    place = tl.arange(0, 4)[None, None, :] * 8
    shift = tl.where(place == 24, 16, 0)
    first = place - shift
    words = tl.reshape(words ^ -0x7F7F7F80, (words.shape[0], words.shape[1], 1))
    numbers = ((words >> shift) & (255 << first)).to(tl.float32, bitcast=True)
    factor = ((127 + 149 - 53 - first) << 23).to(tl.float32, bitcast=True)
    x = tl.reshape(x, (1, words.shape[1], 4))
    return tl.sum(numbers * (x * factor), 2), tl.reshape(tl.sum(x, 2), (words.shape[1],))


@triton.jit
def no_products(BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr):
    """What products are added to; of 4 bits there is nothing in the second place."""
    if BITS == 4:
        return int4_no_products(BLOCK_R, BLOCK_K, GROUP), 0.0
    else:
        WIDTH: tl.constexpr = BLOCK_K // 4 if BITS > 0 else BLOCK_K
        return tl.zeros((BLOCK_R, WIDTH), tl.float32), tl.zeros((WIDTH,), tl.float32)


@triton.jit
def add_product(acc, rest, tile, x, BITS: tl.constexpr):
    """``acc`` plus the products of a tile with ``x`` ``[BLOCK_K]``, and ``rest`` plus the sum of ``x``, by word."""
    if BITS == 0:
        return acc + tile.to(tl.float32) * x[None, :], rest
    else:
        products, x_sum = _products_of_words(tile, x)
        return acc + products, rest + x_sum


@triton.jit
def row_factors(rows, BITS: tl.constexpr):
    """Factors and zeros of whole rows ``[BLOCK_R]``, where weights have such."""
    if BITS == 8:
        scale, zero = tl.load(rows[2], rows[1], 0.0), tl.load(rows[3], rows[1], 0.0)
        return scale.to(tl.float32), zero.to(tl.float32)
    else:
        return 1.0, 0.0


@triton.jit
def row_sums(acc, rest, scale, zero, BITS: tl.constexpr):
    """The products of whole rows ``[BLOCK_R]``, with what :func:`row_factors` gave."""
    if BITS == 4:
        return int4_row_sums(acc)
    elif BITS == 8:
        x = tl.sum(rest, 0)
        return (tl.sum(acc, 1) * 2.0**53 - x * 128) * scale + x * zero
    else:
        return tl.sum(acc, 1)
