"""The state of recurrent layers beside attention (Mamba, linear attention, short convolutions): left as it is.

A model with such layers is given the cache that its family makes for itself, which holds their states; keys and values
go to the streaming cache. States are of constant size, and nothing of them can be taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .families import native_cache

STATES = ("conv_states", "recurrent_states", "ssm_states", "conv_cache", "linear_cache")
"""Names under which caches of Transformers hold states: a tensor, or several by number."""

MARKS = ("has_previous_state", "is_conv_states_initialized", "is_recurrent_states_initialized", "conv_kernel_size")
"""Names of what says how far they are."""

OURS = ("update", "get_seq_length", "get_mask_sizes")
"""Methods that a native cache borrows from the streaming one while a forward runs."""


@dataclass
class States:
    """The states of all recurrent layers as a value.

    Args:
        tensors: by name, the batch first.
        marks: by name, how far they are; JSON values.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    marks: dict[str, Any] = field(default_factory=dict)

    def select(self, select: Callable[[Tensor], Tensor]) -> States:
        """Every state replaced by ``select(state)``, which acts on the batch dimension."""
        return States({name: select(x) for name, x in self.tensors.items()}, self.marks)

    def with_rows(self, rows: list[int], part: States, n_rows: int) -> States:
        """These states of ``n_rows`` with those of ``part`` as the given rows."""
        joined = {}
        for name, theirs in part.tensors.items():
            own = self.tensors.get(name)
            joined[name] = theirs.new_zeros((n_rows, *theirs.shape[1:])) if own is None else own.clone()
            joined[name][rows] = theirs
        return States(joined, part.marks)


class RecurrentState:
    """The states of one cache's recurrent layers; empty before the first forward."""

    def __init__(self) -> None:
        self._native: Any = None
        self._waiting: States | None = None  # for a decoder to make its native cache

    def native(self, decoder: Any, cache: Any, n_rows: int, device: torch.device) -> Any:
        """The cache to give to the decoder: states are its own, keys and values those of ``cache``."""
        if self._native is None:
            self._native = native_cache(decoder, n_rows, device, decoder.dtype)
            if self._waiting is not None:
                _load(self._native, self._waiting)
                self._waiting = None
        for name in OURS:
            setattr(self._native, name, getattr(cache, name))
        return self._native

    def release(self) -> None:
        """After a forward: the native cache no longer refers to the streaming one."""
        for name in OURS:
            vars(self._native).pop(name, None)

    @property
    def value(self) -> States:
        """The states; their tensors are those of the native cache."""
        if self._native is None:
            return self._waiting or States()
        tensors = {name: held[key] for name, held, key in _places(self._native, STATES)}
        marks = {name: held[key] for name, held, key in _places(self._native, MARKS)}
        return States({name: x for name, x in tensors.items() if isinstance(x, Tensor)}, marks)

    @value.setter
    def value(self, states: States) -> None:
        self._native, self._waiting = None, states if states.tensors else None


def _places(native: Any, names: tuple[str, ...]) -> Iterator[tuple[str, Any, Any]]:
    """Where values lie in a native cache: a name of each, what holds it, and its key there."""
    owners = [("", native), *((f"{i}.", layer) for i, layer in enumerate(getattr(native, "layers", ())))]
    for prefix, owner in owners:
        for name in names:
            held = vars(owner).get(name)
            if isinstance(held, dict | list):
                keys = list(held) if isinstance(held, dict) else range(len(held))
                yield from ((f"{prefix}{name}.{key}", held, key) for key in keys)
            elif name in vars(owner):
                yield f"{prefix}{name}", vars(owner), name


def _load(native: Any, states: States) -> None:
    """Put states into a new native cache."""
    for name in states.tensors:
        owner, _, index = name.rpartition(".")
        held = vars(native).get(owner)
        while isinstance(held, list) and len(held) <= int(index):
            held.append([])
    for name, held, key in _places(native, STATES):
        held[key] = states.tensors.get(name, held[key])
    for name, held, key in _places(native, MARKS):
        held[key] = states.marks.get(name, held[key])
    for name, x in states.tensors.items():
        owner = name.split(".")[0]
        layer = native.layers[int(owner)] if owner.isdigit() else None
        if layer is not None and layer.device is None:
            layer.device, layer.dtype = x.device, x.dtype
