"""Rotary position embedding (Su et al., 2021) as pure functions of tensor and position.

Angles are computed in float64. Transformers computes them in float32 from the absolute position, which is
7e-3 off in the logits of a small model at position 10,000,000; in float64 a stream's outputs do not depend on
how far into it one is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Rotary:
    """The rotation of one model: its frequencies and how it pairs dimensions.

    Args:
        inv_freq: angle per position, ``[rotary_dim / 2]``, float64, with the values that the model itself uses.
        interleaved: rotates neighbours ``(0, 1), (2, 3), ...`` (GPT-J) instead of halves ``(i, i + rotary_dim / 2)``.
        scaling: factor that the model puts on cosine and sine (YaRN); part of a key, not of a re-rotation.
        offset: first dimension of a head that is rotated (DeepSeek rotates the last ones).
    """

    inv_freq: Tensor
    interleaved: bool = False
    scaling: float = 1.0
    offset: int = 0

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that are rotated; the others pass."""
        return 2 * self.inv_freq.shape[0]

    @property
    def span(self) -> slice:
        """Where in a head the rotated dimensions are."""
        return slice(self.offset, self.offset + self.rotary_dim)

    def to(self, device: torch.device) -> Rotary:
        """The same rotation with its frequencies on ``device``."""
        return replace(self, inv_freq=self.inv_freq.to(device))

    def cos_sin(self, positions: Tensor | int) -> tuple[Tensor, Tensor]:
        """Unscaled cosine and sine for integer ``positions`` of any shape ``[...]``.

        Returns:
            Two float64 tensors ``[..., rotary_dim]`` on the device of ``inv_freq``, laid out for :func:`rotate`.
        """
        if isinstance(positions, Tensor):
            positions = positions.to(torch.float64).unsqueeze(-1)
        return self.cos_sin_of(positions * self.inv_freq)

    def cos_sin_of(self, angles: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of ``angles`` ``[..., rotary_dim / 2]``, laid out for :func:`rotate`."""
        angles = angles.repeat_interleave(2, dim=-1) if self.interleaved else torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()

    def quarter_turn(self, x: Tensor) -> Tensor:
        """``x`` ``[..., rotary_dim]`` with every pair turned by 90 degrees: ``(a, b) -> (-b, a)``."""
        if self.interleaved:
            return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        half = x.shape[-1] // 2
        return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to rotate in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, rotary: Rotary) -> Tensor:
    """Rotate the dimensions ``rotary.span`` of ``x`` by the given angles.

    Args:
        x: ``[..., head_dim]``.
        cos, sin: broadcastable to ``[..., rotary_dim]``.

    Returns:
        A new tensor of the shape and dtype of ``x``; the arithmetic is in float32 or better.
    """
    dtype = compute_dtype(x.dtype)
    turned = x[..., rotary.span].to(dtype)
    turned = turned * cos.to(dtype) + rotary.quarter_turn(turned) * sin.to(dtype)
    return torch.cat((x[..., : rotary.offset], turned.to(x.dtype), x[..., rotary.span.stop :]), dim=-1)


@dataclass(frozen=True)
class AngleLayout:
    """How a rotary module lays out what it returns.

    Args:
        kind: ``halves`` (all angles twice), ``pairs`` (each angle twice in a row), ``once``, or ``complex`` (one
            complex number for each angle instead of cosine and sine).
        one_axis: whether positions of several axes (of images: time, height, width) are merged into one.
    """

    kind: str = "halves"
    one_axis: bool = False

    def of(self, angles: Tensor, scaling: float = 1.0) -> tuple[Tensor, Tensor] | Tensor:
        """What a module returns for ``angles`` ``[..., rotary_dim / 2]``, in their dtype."""
        if self.kind == "complex":
            return torch.polar(torch.full_like(angles, scaling), angles)
        if self.kind == "halves":
            angles = torch.cat((angles, angles), dim=-1)
        elif self.kind == "pairs":
            angles = angles.repeat_interleave(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return (cos * scaling, sin * scaling) if scaling != 1.0 else (cos, sin)


class ExactRotaryEmbedding(nn.Module):
    """Stands in for a model's rotary module and computes its angles in float64.

    Takes and returns what the replaced module does: ``forward(x, position_ids) -> (cos, sin)``, in most models each
    ``[batch, q_len, rotary_dim]`` in the dtype of ``x``.

    Args:
        replaced: the model's module.
        rotaries: its rotation for each ``layer_type`` that it is asked with, ``None`` for none.
        layout: of what the module returns.
        stands_in: whether it does, in the forward at hand; always when ``None``.
        positions: those of the tokens at hand, where the model is given others; ``None`` where it is given these.
    """

    def __init__(
        self,
        replaced: nn.Module,
        rotaries: dict[str | None, Rotary],
        layout: AngleLayout,
        stands_in: Callable[[], bool] | None = None,
        positions: Callable[[], Tensor | None] | None = None,
    ) -> None:
        super().__init__()
        self.replaced, self.rotaries, self.layout = replaced, rotaries, layout
        self.stands_in, self.positions = stands_in, positions

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("replaced"), name)  # a model may ask its module for its configuration

    @torch.no_grad()
    def forward(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> tuple[Tensor, Tensor] | Tensor:
        if self.stands_in is not None and not self.stands_in():
            return self.replaced(x, position_ids) if layer_type is None else self.replaced(x, position_ids, layer_type)
        true_positions = None if self.positions is None else self.positions()
        position_ids = position_ids if true_positions is None else true_positions
        rotary = self.rotaries[layer_type]
        if rotary.inv_freq.device != x.device:
            rotary = self.rotaries[layer_type] = rotary.to(x.device)
        if self.layout.one_axis and position_ids.dim() == 3:
            position_ids = position_ids[0]  # of text, all axes have the same
        angles = position_ids.to(torch.float64).unsqueeze(-1) * rotary.inv_freq
        found = self.layout.of(angles, rotary.scaling)
        return found.to(torch.complex64) if isinstance(found, Tensor) else (found[0].to(x.dtype), found[1].to(x.dtype))
