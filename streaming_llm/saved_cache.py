"""Saving and restoring a cache's stream, as a value or in a file: it continues bit for bit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import nn

from . import saving
from .cached_stream import CachedStream
from .families import transformers_model
from .placement import layer_devices
from .recurrent import States
from .saving import StreamState

RECURRENT = "recurrent."
"""What the names of recurrent layers' states begin with."""


class SaveableCache(CachedStream):
    """What :class:`~streaming_llm.StreamingKVCache` can do with its stream as a whole."""

    model_facts: dict[str, Any]

    def require_model(self, facts: dict[str, Any]) -> None:
        """Raise ``ValueError`` where the cache is of another model than that of these :func:`.saving.model_facts`."""
        if facts != self.model_facts and (differing := saving.model_differences(self.model_facts, facts)):
            raise ValueError("this cache is of another model: " + "; ".join(differing))

    def _identity(self) -> dict[str, Any]:
        """The facts that say of which cache a state is."""
        streaming, layouts = self.streaming_config, [layer.layout for layer in self.layers]
        rotations = [saving.rotation_facts(layer.rotation.rotary) for layer in self.layers]
        distinct = [rotation for index, rotation in enumerate(rotations) if rotation not in rotations[:index]]
        facts = {
            "model": self.model_facts,
            "n_sink": streaming.n_sink,
            "window_size": streaming.window_size,
            "rotary": distinct,
            "rotary_of_layer": [distinct.index(rotation) for rotation in rotations],
        }
        if any(layout.config != streaming for layout in layouts):
            facts["windows"] = [layout.config.window_size for layout in layouts]
        if streaming.sliding_layers != "auto":
            facts["sliding_layers"] = streaming.sliding_layers
        return facts

    def state(self) -> StreamState:
        """Where the stream is, as a value; its tensors are views of the cache, for use before the next forward.

        Raises:
            RuntimeError: a forward ended before its last layer.
        """
        self.require_whole()
        first, n_seen = self.layers[0], self.progress.n_seen
        facts = {
            **self._identity(),
            "n_seen": saving.as_fact(self.progress.seen),
            "position_offset": saving.as_fact(self.progress.offset),
            "dtype": str(first.keys.dtype).removeprefix("torch.") if n_seen else None,
            "slots": [layer.keys.shape[2] if n_seen else 0 for layer in self.layers],
        }
        tensors = {f"{i}.{name}": x for i, layer in enumerate(self.layers) for name, x in layer.state().items()}
        if self.progress.taken_back:
            facts["taken_back"] = self.progress.taken_back
        if self.recurrent is not None:
            states = self.recurrent.value
            facts["recurrent"] = states.marks
            tensors |= {f"{RECURRENT}{name}": x for name, x in states.tensors.items()}
        if self.pending is not None:
            tensors["pending"] = self.pending
        return StreamState(facts, tensors)

    def restore(
        self,
        state: StreamState,
        *,
        device: torch.device | str | list[torch.device],
        dtype: torch.dtype | None = None,
    ) -> None:
        """Go on where ``state`` was taken, by a cache of the same model and size; buffers that fit stay in place.

        Args:
            device: where keys and values go, for all layers or for each.
            dtype: what keys and values are converted to; as saved when ``None``.

        Raises:
            ValueError: ``state`` is of another model or size, or not whole; this cache is then unchanged.
        """
        differing = saving.differences(state.facts, self._identity())
        if differing:
            raise ValueError("it is a stream of another model or cache: " + "; ".join(differing))
        tensors = [saving.layer_tensors(state, index, layer.layout) for index, layer in enumerate(self.layers)]
        devices = device if isinstance(device, list) else [torch.device(device)] * len(self.layers)
        self.reset()
        for layer, of_layer, n_slots, where in zip(self.layers, tensors, state.facts["slots"], devices, strict=True):
            layer.restore(n_slots, of_layer, where, dtype)
        if self.recurrent is not None:
            own = {name.removeprefix(RECURRENT): x for name, x in state.tensors.items() if name.startswith(RECURRENT)}
            own = {name: x.to(devices[0], dtype, copy=True) for name, x in own.items()}
            self.recurrent.value = States(own, state.facts.get("recurrent", {}))
        self.progress.set(state.seen, state.offset)
        self.progress.taken_back = state.facts.get("taken_back", 0)
        self.set_pending(state.tensors.get("pending"))

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
        """Write the stream to a safetensors file, from which it goes on with the same bits; see :meth:`load`.

        Only what is stored is written. An existing file is replaced whole or not at all.

        Args:
            metadata: strings to keep with it; :func:`streaming_llm.read_metadata` gives them back.

        Raises:
            OSError: the file cannot be written.
            RuntimeError: a forward ended before its last layer.
        """
        saving.write(path, self.state(), metadata)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: Any,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A cache that goes on where a saved one was, with ``n_sink`` and ``window_size`` as saved.

        Weights are not compared: that they are the same is the caller's to know.

        Args:
            model: the model, streaming or not, or its configuration alone (frequencies and dtype are then taken to be
                those of a freshly loaded model).
            device: where keys and values go; when ``None``, where the model's layers are, or the CPU.
            dtype: convert keys and values, for a model loaded in another dtype; the outputs are then not the same.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is no saved stream, or of a model of other layers, heads, frequencies or dtype.
        """
        make: Any = cls  # a StreamingKVCache
        state = saving.read(path)
        where: Any = "cpu" if device is None else device
        if isinstance(model, nn.Module):
            model = transformers_model(model)
            with saving.naming(path):
                saving.require_dtype(state, model.dtype, dtype)
            cache = make.from_model(model, config=state.streaming_config)
            where = layer_devices(model, cache.family.stores) if device is None else device
        else:
            cache = make(model, config=state.streaming_config)
        with saving.naming(path):
            cache.restore(state, device=where, dtype=dtype)
        return cache
