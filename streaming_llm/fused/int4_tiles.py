"""Tiles of integers of 4 bits, and their products with a vector by the matrix units.

The bits of a number, put below the exponent of 16, are a bfloat16: 24 plus the number. Two of them lie in a word
wherever it is shifted to, one in each half, so that a number costs half a shift and half a mask, and no conversion. A
vector in float32 is the sum of three of bfloat16, which are columns of one product. Nothing is lost of elements above
``2 ** -110``; sums have to stay below ``2 ** 120``, and an infinite element gives NaN.

A tile of ``[BLOCK_R, BLOCK_K]`` numbers is ``[4, 8, PARTS, 2, BLOCK_R / 16, words]``: the first two dimensions are the
threads of a warp, the third goes over a program's warps, as the matrix units want them, so that each thread multiplies
what it loaded. (Of any other layout the result is the same, only later.) A part is as many columns as share factors,
at most 128.
"""

from __future__ import annotations

import triton
import triton.language as tl

SIGNS = 0x41C041C0
"""Turns two numbers, in two's complement, into bfloat16. Given at run time: were it known, the compiler would take two
instructions for what the processor does in one."""


@triton.jit
def _by_thread(of_rows):
    """``[BLOCK_R]`` as ``[1, 8, 1, 2, BLOCK_R / 16]``: a thread has rows that follow each other."""
    by_row = tl.permute(tl.reshape(of_rows, (of_rows.shape[0] // 16, 8, 2)), (1, 2, 0))
    return by_row[None, :, None, :, :]


@triton.jit
def _loaded(factors, at, inside):
    """Factors by thread; those of bfloat16 as words of two rows' factors, which :func:`_values` takes apart.

    Nothing is computed with what is loaded until it is used: that would wait for it.
    """
    if factors.dtype.element_ty == tl.bfloat16:
        pairs = tl.reshape(factors.to(tl.int64), (factors.shape[0] // 2, 2))
        pairs, _ = tl.split(pairs)
        inside, _ = tl.split(tl.permute(inside, (0, 1, 2, 4, 3)))
        pairs = tl.permute(tl.reshape(pairs, (factors.shape[0] // 16, 8)), (1, 0))[None, :, None, :] + 2 * at
        return tl.load(pairs.to(tl.pointer_type(tl.uint32)), inside, 0)[:, :, :, None, :]
    else:
        return tl.load(_by_thread(factors) + at[:, :, :, :, None], inside, 0.0)


@triton.jit
def _values(loaded):
    """What :func:`_loaded` gave ``[4, 8, PARTS, 2, BLOCK_R / 16]``, in float32."""
    if loaded.dtype == tl.uint32:
        is_second = tl.arange(0, 2)[None, None, None, :, None] > 0
        return tl.where(is_second, loaded & 0xFFFF0000, loaded << 16).to(tl.float32, bitcast=True)
    else:
        return loaded.to(tl.float32)


@triton.jit
def int4_tile_at(rows, start, K: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr):
    """Words of a tile ``[4, 8, PARTS, 2, BLOCK_R / 16, words]``, and factors and zeros as :func:`_loaded` has them."""
    WIDTH: tl.constexpr = min(GROUP, 128)
    WORDS: tl.constexpr = WIDTH // 32
    thread, part = tl.arange(0, 4)[:, None, None, None], tl.arange(0, BLOCK_K // WIDTH)[None, None, :, None]
    inside = _by_thread(rows[1]) & (part[:, :, :, :, None] < (K - start) // WIDTH)
    at = ((part * 4 + thread + start // WIDTH * 4) * WORDS)[:, :, :, :, None, None] + tl.arange(0, WORDS)
    words = tl.multiple_of(_by_thread(rows[0])[:, :, :, :, :, None], (1, 1, 1, 1, 1, 16))  # `Packed.is_aligned`
    words = tl.load(words + at, inside[:, :, :, :, :, None], 0)
    # Adds 0 in a form that hides that rows follow each other, so that each thread loads the factors of its own.
    hidden = (thread + tl.arange(0, 8)[None, :, None, None]) * tl.minimum(tl.program_id(0), 0)
    at = (start + part * WIDTH) // GROUP * rows[4] + hidden
    return words, _loaded(rows[2], at, inside), _loaded(rows[3], at, inside)


@triton.jit
def _numbers(words, signs):
    """24 plus each number of a tile ``[PARTS, BLOCK_R, columns of a part]``.

    Columns are ordered as in :func:`int4_input`; of 16 rows the even ones come first.
    """
    PARTS: tl.constexpr = words.shape[2]
    BLOCKS: tl.constexpr = words.shape[4]
    WORDS: tl.constexpr = words.shape[5]
    i = tl.arange(0, 4)
    words = words[:, :, :, :, :, :, None]
    pairs = (tl.where(i > 0, words >> (4 * i - 3), words << 3) & 0x00780078) ^ signs
    first = pairs.to(tl.int16).to(tl.bfloat16, bitcast=True)
    second = (pairs >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    both = tl.reshape(tl.join(first, second), (4, 8, PARTS, 2, BLOCKS, WORDS, 2, 2, 2))
    return tl.reshape(tl.permute(both, (2, 4, 3, 1, 5, 6, 0, 7, 8)), (PARTS, 16 * BLOCKS, 32 * WORDS))


@triton.jit
def _split(x):
    """The three numbers in bfloat16 of which ``x`` is the sum."""
    x = x.to(tl.float32)
    first = (x.to(tl.int32, bitcast=True) & -0x10000).to(tl.float32, bitcast=True)
    rest = x - first
    second = (rest.to(tl.int32, bitcast=True) & -0x10000).to(tl.float32, bitcast=True)
    return first.to(tl.bfloat16), second.to(tl.bfloat16), (rest - second).to(tl.bfloat16)


@triton.jit
def int4_input(x, GROUP: tl.constexpr):
    """An input that the program has computed, ``[BLOCK_K]``, float32: each thread prepares a share for all.

    It becomes columns of a product, ``[PARTS, columns of a part, 8]``: twice the three numbers of which it is the sum,
    and 0. Eight are as few as the matrix units take; of a row of the result, each of four threads gets two: the first
    and the second, or the third and 0. Columns of a part are ordered by the words of a thread and their halves, then
    by thread: 0, 4, 1, 5 of each thread's word, then 2, 6, 3, 7 of each. Beside them are the sums of ``x`` over parts,
    in such shares that they, too, are doubled when those of four threads are added up.
    """
    WIDTH: tl.constexpr = min(GROUP, 128)
    PARTS: tl.constexpr = x.shape[0] // WIDTH
    of_x = tl.sum(tl.reshape(x, (PARTS, WIDTH)), 1)[None, None, :, None, None]
    of_x *= 1.0 - tl.arange(0, 4)[:, None, None, None, None] % 2  # the threads that have the first two columns
    first, second, third = _split(x)
    x = tl.join(tl.join(first, second), tl.join(third, tl.zeros_like(first)))
    x = tl.permute(tl.reshape(x, (PARTS, 4, WIDTH // 32, 2, 2, 2, 2, 2)), (0, 2, 4, 1, 5, 3, 7, 6))
    x = tl.reshape(x, (PARTS, WIDTH, 4))[:, :, None, :]
    return tl.reshape(tl.broadcast_to(x, (PARTS, WIDTH, 2, 4)), (PARTS, WIDTH, 8)), of_x


@triton.jit
def int4_request_input(x_ptr, start, K: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr):
    """What :func:`int4_loaded_input` takes, from column ``start`` on.

    ``[4, 8, PARTS, words, 8]``, the same for all eight, which are the columns of the product: of 16 bits each thread
    loads what it multiplies, so that none waits for another. And ``[4, 8, PARTS, words]``, a share of that for each of
    the eight, to be summed up.
    """
    WIDTH: tl.constexpr = min(GROUP, 128)
    WORDS: tl.constexpr = WIDTH // 32
    thread, lane = tl.arange(0, 4)[:, None, None, None], tl.arange(0, 8)[None, :, None, None]
    at = start + tl.arange(0, BLOCK_K // WIDTH)[None, None, :, None] * WIDTH + thread * (8 * WORDS)
    word = tl.arange(0, WORDS)
    share = at + lane * WORDS + word
    of_thread = (at + 0 * lane + word * 8)[:, :, :, :, None] + tl.arange(0, 8)
    return tl.load(x_ptr + of_thread, of_thread < K, 0.0), tl.load(x_ptr + share, share < K, 0.0)


@triton.jit
def int4_loaded_input(loaded):
    """An input in memory, as :func:`int4_input` has it, but for :func:`int4_as_doubled`.

    Of bfloat16, which need not be split, all eight columns are ``x``: products and sums come out eightfold.
    """
    x, share = loaded
    PARTS: tl.constexpr = x.shape[2]
    WORDS: tl.constexpr = x.shape[3]
    of_x = tl.sum(tl.sum(share.to(tl.float32), 3), 1)[:, None, :, None, None]
    if x.dtype == tl.bfloat16:
        of_x *= 8.0
    else:
        of_x *= 2.0
        first, second, third = _split(x)
        column = tl.arange(0, 8)[None, :, None, None, None] % 4
        x = tl.where(column == 0, first, tl.where(column == 1, second, tl.where(column == 2, third, 0.0)))
    x = tl.permute(tl.reshape(x, (4, 8, PARTS, WORDS, 2, 2, 2)), (2, 3, 5, 0, 6, 4, 1))
    return tl.reshape(x, (PARTS, 32 * WORDS, 8)), of_x


@triton.jit
def int4_as_doubled(acc, x_ptr):
    """Products with what :func:`int4_loaded_input` gives, doubled as those with :func:`int4_input` are."""
    if x_ptr.dtype.element_ty == tl.bfloat16:
        return acc * 0.25
    else:
        return acc


@triton.jit
def int4_no_products(BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr):
    """What :func:`int4_add_product` adds to."""
    return tl.zeros((4, 8, BLOCK_K // min(GROUP, 128), 2, BLOCK_R // 16), tl.float32)


@triton.jit
def int4_add_product(acc, tile, x, signs):
    """``acc`` plus the products of a tile with what :func:`int4_input` or :func:`int4_loaded_input` gives."""
    words, scale, zero = tile
    x, of_x = x
    PARTS: tl.constexpr = words.shape[2]
    BLOCKS: tl.constexpr = words.shape[4]
    products = tl.dot(_numbers(words, signs), x)
    products = tl.permute(tl.reshape(products, (PARTS, BLOCKS, 2, 8, 4, 2)), (4, 3, 0, 2, 1, 5))
    one, other = tl.split(products)
    return acc + _values(scale) * (one + other - 24.0 * of_x) + _values(zero) * of_x


@triton.jit
def int4_next_tiles(tiles, rows, start, K: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr):
    """``tiles`` but for the first, which has been used, and the one from column ``start`` on; zeros, where none is."""
    return tiles[1:] + (int4_tile_at(rows, start, K, BLOCK_K, GROUP),)  # noqa: RUF005 - Triton cannot unpack


@triton.jit
def int4_row_sums(acc):
    """The products of whole rows ``[BLOCK_R]``."""
    y = tl.permute(0.5 * tl.sum(tl.sum(acc, 2), 0), (2, 0, 1))
    return tl.reshape(y, (16 * y.shape[0],))
