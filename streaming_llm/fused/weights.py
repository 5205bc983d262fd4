"""How the numbers of a matrix are stored: as they are, or as integers of 8 or 4 bits with factors, as torchao does.

torchao is not imported here: its tensors are known by their class and by what they hold.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


class NotCoveredError(ValueError):
    """A recipe cannot say what this model computes; the message says what that is."""


@dataclass(frozen=True, eq=False)
class Packed:
    """A matrix ``[rows, columns]`` of integers, ``number * scale + zero`` each.

    Args:
        words: ``[rows, columns * bits / 32]``, int32; the number of the first column in the lowest bits.
        bits: of a number, in two's complement.
        scale, zero: ``[columns / group, rows]``, the rows one after the other.
        own: the model's tensor, for PyTorch's products; that of the whole matrix where this is a part of it.
    """

    words: Tensor
    bits: int
    scale: Tensor
    zero: Tensor
    own: Tensor

    @property
    def values(self) -> int:
        """Numbers in a word."""
        return 32 // self.bits

    @property
    def shape(self) -> tuple[int, int]:
        return self.words.shape[0], self.words.shape[1] * self.values

    @property
    def group(self) -> int:
        """Columns that share a factor."""
        return self.shape[1] // self.scale.shape[0]

    def chunk(self, parts: int) -> tuple[Packed, ...]:
        """Equal parts of the rows."""
        of_rows = (self.words, self.scale.T, self.zero.T)
        pieces = zip(*(x.chunk(parts) for x in of_rows), strict=True)
        return tuple(replace(self, words=w, scale=s.T, zero=z.T) for w, s, z in pieces)

    @property
    def is_whole(self) -> bool:
        """Whether the factors of each group follow those of the group before: not so in a part of a matrix."""
        return self.scale.shape[0] == 1 or self.scale.stride(0) == self.shape[0]

    @property
    def is_aligned(self) -> bool:
        """Whether kernels can read several at once: of 4 bits, 16 bytes of numbers, and the factors of two rows."""
        of_rows = self.scale, self.zero
        whole = not self.words.data_ptr() % 16 and not any(x.data_ptr() % (2 * x.element_size()) for x in of_rows)
        return self.bits != 4 or (whole and not self.shape[0] % 2)

    def is_contiguous(self) -> bool:
        """Whether the rows follow each other."""
        return self.words.is_contiguous()


def stored(weight: Tensor) -> Tensor | Packed:
    """How a weight is stored: the tensor itself, or what a tensor of torchao's holds.

    Raises:
        NotCoveredError: no kernel reads it; says why.
    """
    kind = type(weight).__name__
    if type(weight) in (Tensor, nn.Parameter):
        return weight
    if kind not in READERS:
        raise NotCoveredError(f"it has weights of class {kind}, which no kernel reads (only {', '.join(READERS)})")
    for name in ("act_quant_kwargs", "act_pre_scale", "act_quant_scale"):
        _require(getattr(weight, name, None) is None, weight, f"change or quantise their input too ({name})")
    packed = READERS[kind](weight)
    _require(packed.shape == tuple(weight.shape), weight, f"hold {packed.shape} numbers for {tuple(weight.shape)}")
    return packed


def _require(fits: bool, weight: Tensor, otherwise: str) -> None:
    if not fits:
        raise NotCoveredError(f"its weights of class {type(weight).__name__} {otherwise}")


def _words(weight: Any) -> Tensor:
    """The bytes of a weight ``[rows, n]`` as words ``[rows, n / 4]``."""
    qdata = weight.qdata
    _require(qdata.dim() == 2 and qdata.element_size() == 1, weight, "are no matrix of bytes")
    whole = qdata.is_contiguous() and not qdata.shape[1] % 4 and not qdata.storage_offset() % 4
    _require(whole, weight, "have rows that are no whole words of memory")
    return qdata.view(torch.int32)


def _int8(weight: Any) -> Packed:
    rows, columns = weight.shape
    _require(list(weight.block_size) == [1, columns], weight, f"share factors in blocks of {list(weight.block_size)}")
    scale, stands_for_0 = weight.scale.reshape(1, rows).contiguous(), weight.zero_point
    # In float32, in which the product is exact: rounded to 16 bits, it would be wrong by half a step and more.
    zero = torch.zeros_like(scale) if stands_for_0 is None else -scale.float() * stands_for_0.reshape(1, rows)
    return Packed(_words(weight), 8, scale, zero, weight)


def _int4(weight: Any) -> Packed:
    rows, columns = weight.shape
    group, blocks = weight.block_size[-1], list(weight.block_size)
    fits = blocks == [1, group] and group >= 32 and not group & (group - 1) and not columns % group
    _require(fits, weight, f"share factors in blocks of {blocks}")
    plain_input = getattr(weight, "activation_dtype", torch.bfloat16) != torch.float8_e4m3fn
    _require(plain_input, weight, "quantise their input too (activation_dtype)")
    for factors in (weight.scale, weight.zero_point):
        fits = tuple(factors.shape) == (columns // group, rows) and factors.is_contiguous()
        _require(fits, weight, f"have factors of shape {tuple(factors.shape)}")
    return Packed(_words(weight), 4, weight.scale, weight.zero_point, weight)


READERS = {"Int8Tensor": _int8, "Int4Tensor": _int4}
"""Class of a tensor -> what it holds."""
