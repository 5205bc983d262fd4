"""Rows of a matrix as a program reads them, tile by tile, and their products with a vector.

A matrix is stored as it is (``BITS`` is 0), or as integers of 8 or 4 bits in words of 32 (:class:`.weights.Packed`).
Then a tile has the factors and zeros of its groups of columns beside its words; those of whole rows (``GROUP`` is
``K``) are left to :func:`row_sums`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_at(
    rows, start: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr
):
    """Weights ``[BLOCK_R, BLOCK_K]`` from column ``start`` on, which nothing reads again in this step.

    Args:
        rows: where they begin and which of them there are ``[BLOCK_R]``, where their factors and zeros begin
            ``[BLOCK_R]``, and how far these are from those of the next group of columns.
    """
    VALUES: tl.constexpr = 32 // BITS if BITS > 0 else 1
    POLICY: tl.constexpr = "" if BITS > 0 else "evict_first"  # costs more instructions than words have
    columns = tl.arange(0, BLOCK_K // VALUES)
    if BITS > 0:  # adds 0 in a form that hides its divisors, so that each thread loads the words of 8 columns
        columns += tl.minimum(tl.program_id(0), 0) * (8 // VALUES)
    mask = rows[1][:, None] & (start // VALUES + columns < K // VALUES)[None, :]
    tile = tl.load(rows[0][:, None] + columns[None, :] + start // VALUES, mask, 0.0, eviction_policy=POLICY)
    if GROUP < K:
        groups = start // GROUP + tl.arange(0, max(1, BLOCK_K // GROUP))
        mask = rows[1][:, None] & (groups < K // GROUP)[None, :]
        at = groups[None, :] * rows[4]
        return tile, tl.load(rows[2][:, None] + at, mask, 0.0), tl.load(rows[3][:, None] + at, mask, 0.0)
    else:
        return tile


@triton.jit
def first_tiles(
    rows, K: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """Up to ``AHEAD`` tiles, requested at once."""
    tiles = ()
    for start in tl.static_range(0, min(K, AHEAD * BLOCK_K), BLOCK_K):
        tiles = tiles + (tile_at(rows, start, K, BLOCK_K, BITS, GROUP),)  # type: ignore[assignment]  # noqa: RUF005 - Triton cannot unpack
    return tiles


@triton.jit
def next_tile(
    tiles, rows, start: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The tile from column ``start`` on: one of the first, or requested now."""
    if start < AHEAD * BLOCK_K:
        return tiles[start // BLOCK_K]
    else:
        return tile_at(rows, start, K, BLOCK_K, BITS, GROUP)


@triton.jit
def _products_of_words(words, x, BITS: tl.constexpr):
    """Sums over the numbers of each word: of products with ``x``, by ``2 ** -53``, ``[BLOCK_R, n]``; of ``x`` ``[n]``.

    The numbers count from the lowest. They are read as float32 without a conversion: where they lie in a word, they
    are the last bits of a float without an exponent, multiples of ``2 ** -149``. ``x`` makes up for that, exactly, as
    long as it is below ``2 ** 31``.
    """
    SIGNS: tl.constexpr = -0x77777778 if BITS == 4 else -0x7F7F7F80
    place = tl.arange(0, 32 // BITS)[None, None, :] * BITS
    shift = tl.where(place + BITS > 23, 16, 0)
    first = place - shift
    words = tl.reshape(words ^ SIGNS, (words.shape[0], words.shape[1], 1))
    numbers = ((words >> shift) & (((1 << BITS) - 1) << first)).to(tl.float32, bitcast=True)
    factor = ((127 + 149 - 53 - first) << 23).to(tl.float32, bitcast=True)
    x = tl.reshape(x, (1, words.shape[1], 32 // BITS))
    return tl.sum(numbers * (x * factor), 2), tl.reshape(tl.sum(x, 2), (words.shape[1],))


@triton.jit
def no_products(
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """What :func:`add_product` adds to."""
    if GROUP < K:
        x_total = tl.zeros((BLOCK_R, max(1, BLOCK_K // GROUP)), tl.float32)
    else:
        x_total = tl.zeros((BLOCK_K * BITS // 32 if BITS > 0 else 1,), tl.float32)
    return tl.zeros((BLOCK_R, BLOCK_K * BITS // 32 if BITS > 0 else BLOCK_K), tl.float32), x_total


@triton.jit
def add_product(acc, x_total, tile, x, BITS: tl.constexpr, GROUPED: tl.constexpr):
    """``acc`` plus the products of a tile with ``x`` ``[BLOCK_K]``; packed, ``x_total`` plus the sum of ``x``.

    With factors of groups, ``x_total`` is what their zeros add to each row ``[BLOCK_R, groups of a tile]``.
    """
    if BITS == 0:
        return acc + tile.to(tl.float32) * x[None, :], x_total
    else:
        products, x_sum = _products_of_words(tile[0] if GROUPED else tile, x, BITS)
        if GROUPED:
            GROUPS: tl.constexpr = tile[1].shape[1]
            WORDS: tl.constexpr = x_sum.shape[0] // GROUPS
            scale, zero = tile[1].to(tl.float32), tile[2].to(tl.float32)
            total = tl.reshape(acc, (acc.shape[0], GROUPS, WORDS))
            total += scale[:, :, None] * tl.reshape(products, total.shape)
            of_x = tl.sum(tl.reshape(x_sum, (GROUPS, WORDS)), 1)
            x_total += (zero - scale * (1 << (BITS - 1))) * of_x[None, :]
            return tl.reshape(total, acc.shape), x_total
        else:
            return acc + products, x_total + x_sum


@triton.jit
def row_factors(rows, BITS: tl.constexpr, GROUPED: tl.constexpr):
    """Factors and zeros of whole rows ``[BLOCK_R]``, where packed weights have such."""
    if BITS == 0 or GROUPED:
        return 1.0, 0.0
    else:
        scale, zero = tl.load(rows[2], rows[1], 0.0), tl.load(rows[3], rows[1], 0.0)
        return scale.to(tl.float32), zero.to(tl.float32)


@triton.jit
def row_sums(acc, x_total, scale, zero, BITS: tl.constexpr, GROUPED: tl.constexpr):
    """The products of whole rows ``[BLOCK_R]``, with what :func:`row_factors` gave."""
    y = tl.sum(acc, 1)
    if BITS > 0:
        y *= 2.0**53
        if GROUPED:
            y += tl.sum(x_total, 1)
        else:
            x = tl.sum(x_total, 0)
            y = (y - x * (1 << (BITS - 1))) * scale + x * zero
    return y
