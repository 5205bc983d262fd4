"""Weights quantised as torchao stores them: tensors with the names and contents of its own, which need no torchao."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streaming_llm.fused.weights import Packed

KINDS = {"int8": (8, None)} | {f"int4 by {group}": (4, group) for group in (32, 64, 128, 256)}
"""Name -> bits, and columns that share a factor, all of a row if ``None``."""


class _Quantised(Tensor):
    """Holds other tensors, and has products with them; ``exact`` is what they stand for, float64."""

    qdata: Tensor
    scale: Tensor
    zero_point: Tensor | None
    block_size: list[int]
    exact: Tensor

    def __new__(cls, shape: tuple[int, int], dtype: torch.dtype, **held: Any) -> _Quantised:
        device = held["qdata"].device
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device, requires_grad=False)
        vars(made).update(held)
        return made

    def __init__(self, *args: Any, **held: Any) -> None:
        pass

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return [name for name in ("qdata", "scale", "zero_point") if getattr(self, name) is not None], None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.exact.to(x.dtype), *bias, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            (weight,) = args
            return cls(tuple(weight.shape), weight.dtype, **vars(weight))
        raise NotImplementedError(func)


class Int8Tensor(_Quantised):
    pass


class Int4Tensor(_Quantised):
    pass


def quantised(weight: Tensor, bits: int, group: int | None) -> Int8Tensor | Int4Tensor:
    """``weight`` ``[rows, columns]`` as torchao's weight-only quantisation stores it."""
    rows, columns = weight.shape
    size = columns if group is None else group
    groups = weight.detach().double().unflatten(1, (-1, size))
    if bits == 8:
        scale = groups.abs().amax(-1).div(127).float()
        numbers = (groups / scale.unsqueeze(-1)).round().clamp(-128, 127)
        exact, zero = numbers * scale.double().unsqueeze(-1), torch.zeros_like(scale, dtype=torch.int8)
        qdata = numbers.flatten(1).to(torch.int8)
    else:
        low, high = groups.amin(-1), groups.amax(-1)
        scale = ((high - low) / 15).to(weight.dtype)
        zero = (low + 8 * (high - low) / 15).to(weight.dtype)
        factors = scale.double().unsqueeze(-1), zero.double().unsqueeze(-1)
        numbers = ((groups - factors[1]) / factors[0]).round().clamp(-8, 7)
        exact = numbers * factors[0] + factors[1]
        even, odd = numbers.flatten(1).to(torch.int64).unflatten(1, (-1, 2)).unbind(-1)
        qdata = ((odd << 4) | (even & 15)).to(torch.int8)
        scale, zero = scale.T.contiguous(), zero.T.contiguous()
    kind = Int8Tensor if bits == 8 else Int4Tensor
    held = {"qdata": qdata, "scale": scale, "zero_point": zero, "block_size": [1, size], "exact": exact.flatten(1)}
    return kind((rows, columns), weight.dtype, **held)


def unpacked(packed: Packed) -> Tensor:
    """What a packed matrix stands for, in float64."""
    half = 1 << (packed.bits - 1)
    places = packed.bits * torch.arange(packed.values, device=packed.words.device)
    unsigned = (packed.words.to(torch.int64).unsqueeze(-1) >> places) & (2 * half - 1)
    numbers = ((unsigned + half) % (2 * half) - half).flatten(1).double()
    scale, zero = (x.double().T.repeat_interleave(packed.group, dim=1) for x in (packed.scale, packed.zero))
    return numbers * scale + zero


def whole_groups(case: str) -> dict[str, int]:
    """Sizes for a case of `family_models`, so that every matrix has whole groups of 32 columns."""
    return {"intermediate_size": 64} | ({"head_dim": 16} if case == "gemma3" else {})


def quantise_(model: nn.Module, kind: str) -> nn.Module:
    """Quantise the linear layers of a model in place.

    Returns:
        A copy that is de-quantised.
    """
    plain = copy.deepcopy(model)
    for layer, other in zip(model.modules(), plain.modules(), strict=True):
        if isinstance(layer, nn.Linear):
            weight = quantised(layer.weight, *KINDS[kind])
            layer.weight = nn.Parameter(weight, requires_grad=False)
            other.weight = nn.Parameter(weight.exact.to(weight.dtype), requires_grad=False)
    return plain
