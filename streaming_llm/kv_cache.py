"""StreamingKVCache: attention sinks and a ring of recent tokens as a Transformers cache.

Attention scores under rotary positions depend on position differences alone. So a key is stored as it arrives,
rotated to its position in the stream, and keeps its true distance to every later query; only the sinks have to
move along with the query. A step writes one slot and rotates ``n_sink`` keys, however large the window is.

The sinks are rotated afresh from their first copy at every step, in float32 or better: rotating a 16-bit key
again and again would destroy it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from . import saving
from .cache_layer import StreamingLayer
from .config import StreamingConfig, require_int
from .families import bare_refusal, family_of, layer_windows, require_window_fits, rotaries_from_config
from .positions import StreamLayout
from .rope_utils import Rotary
from .sinks import BlockPlan, sink_rotations
from .stream_state import StreamState, model_facts, put, state_of

ATTACHED = "streaming_llm_"
"""Prefix of the attention implementation that a model's configuration names while the model streams."""


class SharedReference:
    """Refers to an object that copies of its holder share; a pickled one refers to nothing."""

    def __init__(self, target: object = None) -> None:
        self.target = target

    def __deepcopy__(self, memo: dict) -> SharedReference:
        return self

    def __reduce__(self):
        return (SharedReference, ())


class StreamingKVCache(Cache):
    """A cache of constant size for endless streams: attention sinks and a window of recent tokens.

    Works on an unmodified model: ``model(ids[:, t:t+1], past_key_values=cache, use_cache=True)`` is exact token by
    token, and so is a first block that fits in the cache. A forward of several tokens that evicts some, or that
    follows an eviction, needs a window of its own for each query, which no cache can give: it raises
    ``ValueError``. While the model is in a :class:`~streaming_llm.StreamingLLMWrapper`, the same cache takes blocks of
    any length, exactly. For inference: what is stored is detached from the graph of gradients. Positions are the
    cache's own; ``position_ids`` must not be passed.

    Limits of the bare cache: rotary angles are Transformers' own, computed in float32 from the absolute position
    (7e-3 in the logits of a small model at position 10,000,000; the wrapper's are exact). Padding cannot be seen
    by a cache: sequences of a batch have to be of equal length. The frequencies have to be those of the
    configuration, which they no longer are once ``model.half()`` has rounded them; where Transformers hands a cache
    cosine and sine (older versions do) that raises ``ValueError``, elsewhere a cache cannot notice. Load the model
    with ``dtype=``, or use the wrapper, which takes the frequencies from the model. The model's own masks and scores
    stay in force: its sliding layers have to see the whole cache, GPT-J's table of rotations ends a stream, and scores
    that the model would soft-cap must not go through ``sdpa``. Each raises ``ValueError``; the wrapper is free of it.

    Args:
        config: the model's Transformers configuration.
        n_sink, window_size: see :class:`~streaming_llm.StreamingConfig`.
        rotary: the rotation of each layer, or of all; read from ``config`` when not given.

    Raises:
        ValueError: a number is out of range, or the model has no rotary positions that can stream.
    """

    def __init__(
        self,
        config,
        n_sink: int = 4,
        window_size: int = 1020,
        *,
        rotary: Rotary | Sequence[Rotary] | None = None,
    ) -> None:
        self.streaming_config = StreamingConfig(n_sink, window_size)
        require_window_fits(config, self.streaming_config)
        layout, windows = StreamLayout(self.streaming_config), layer_windows(config)
        rotary = rotaries_from_config(config) if rotary is None else rotary
        rotations = sink_rotations([rotary] * len(windows) if isinstance(rotary, Rotary) else rotary)
        self._rotations = set(rotations)
        super().__init__(
            layers=[StreamingLayer(layout, *of_layer) for of_layer in zip(rotations, windows, strict=True)]
        )
        self._table_length = family_of(config).table_length(config)
        self._exact_bare_with: str | None = ""  # attention implementation last found exact
        self._model_config = SharedReference(config)
        self.model_facts = model_facts(config)
        self._open_plan: BlockPlan | None = None
        self._next_angle_check = layout.capacity

    @property
    def is_attached(self) -> bool:
        """Whether the model streams now: its angles are exact, and its attention takes blocks of any length."""
        name = getattr(self._model_config.target, "_attn_implementation", None)
        return name is not None and name.startswith(ATTACHED)

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        cache_kwargs: dict[str, Any] | None = None,
        *args,
        **kwargs,
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values, detached; see :meth:`StreamingLayer.update`.

        Raises:
            RuntimeError: an earlier forward ended before its last layer, or its attention did not know of streams.
        """
        layer, q_len = self.layers[layer_idx], key_states.shape[2]
        self._require_whole_forwards(layer_idx, q_len)
        if layer_idx == 0:
            attached = layer.attends_blocks = self.is_attached
            for rotation in self._rotations:
                rotation.exact_angles = attached
            if not attached:
                self._require_exact_bare(q_len)
                if layer.n_seen >= self._next_angle_check:
                    self._check_angles(layer, cache_kwargs)
        layer.attends_blocks = self.layers[0].attends_blocks
        keys, values = layer.update(key_states, value_states, cache_kwargs, layers=self.layers)
        self._open_plan = getattr(keys, "streaming_plan", None) if q_len > 1 else None
        return keys, values

    def _require_whole_forwards(self, layer_idx: int, q_len: int) -> None:
        """Notice, by counting, what would be wrong without a sign."""
        if self._open_plan is not None and not self._open_plan.consumed:
            raise RuntimeError(
                "the attention function did not read the plan of a block of tokens, so its result is wrong: the cache "
                "was made for another model. reset() it, and use a cache of this model"
            )
        first, last = self.layers[0].n_seen, self.layers[-1].n_seen
        if (first != last) if layer_idx == 0 else (first != self.layers[layer_idx].n_seen + q_len):
            raise RuntimeError(
                "an earlier forward with this cache ended before its last layer, so its layers hold different tokens: "
                "reset() it, or use a new cache"
            )

    def _require_exact_bare(self, q_len: int) -> None:
        """Refuse what the model's own attention would compute otherwise than the stream's rule says."""
        seen = self.get_seq_length()
        if self._table_length is not None and seen + q_len > self._table_length:
            raise ValueError(
                f"position {seen + q_len - 1} lies beyond the model's table of {self._table_length} rotations: use "
                "`with StreamingLLMWrapper(model, ...) as stream:`, where a stream has no end"
            )
        config = self._model_config.target
        implementation = getattr(config, "_attn_implementation", None)
        if config is not None and implementation != self._exact_bare_with:
            reason = bare_refusal(config, self.streaming_config)
            if reason is not None:
                raise ValueError(f"this cache would not be exact on the unmodified model: {reason}")
            self._exact_bare_with = implementation

    def _check_angles(self, layer: StreamingLayer, cache_kwargs: dict[str, Any] | None) -> None:
        """From the first eviction on, whenever the stream has doubled: does the model rotate as configured?

        ``model.half()`` rounds the model's frequencies too, which a cache made from the configuration cannot know.
        Newer Transformers pass no cosine and sine, so that there is nothing to compare.
        """
        found = [x.flatten(0, -2)[-1] for name in ("cos", "sin") if (x := (cache_kwargs or {}).get(name)) is not None]
        if len(found) < 2:
            self._next_angle_check = math.inf
            return
        cos, rotary = found[0], layer.rotation.on(found[0].device)
        if not rotary.rotary_dim:
            return
        expected = torch.stack(rotary.cos_sin(layer.get_seq_length())) * rotary.scaling
        # Models lay the same angles out in different ways, or give each once.
        expected = expected.sort(dim=-1).values[:, :: rotary.rotary_dim // cos.shape[-1]]
        error = (torch.stack(found).sort(dim=-1).values - expected).abs().max().item()
        if error > torch.finfo(cos.dtype).eps + 1e-6 * layer.get_seq_length():  # rounding of cosine and of angle
            raise ValueError(
                f"the model's rotary angles are {error:.1e} off those of its configuration: its frequencies were "
                "probably cast to half precision with the weights. Load it with dtype=..., or use "
                "StreamingLLMWrapper, which takes them from the model"
            )
        self._next_angle_check = 2 * layer.n_seen

    def get_mask_sizes(self, cache_position: Tensor | int, layer_idx: int) -> tuple[int, int]:
        """``(kv_length, kv_offset)`` for Transformers' masks; see :meth:`StreamingLayer.get_mask_sizes`."""
        if self._table_length is not None and not self.is_attached:
            self._require_exact_bare(cache_position if isinstance(cache_position, int) else len(cache_position))
        return self.layers[layer_idx].get_mask_sizes(cache_position)

    def reset(self) -> None:
        """Forget the stream; the tensors stay allocated."""
        super().reset()
        self._open_plan = None
        self._next_angle_check = self.layers[0].layout.capacity

    def move_to(self, position: int) -> None:
        """Go on as if ``position`` tokens had been seen: the next token gets that position.

        Every stored key is re-rotated once, so this is for tests and experiments, not for every step.

        Raises:
            ValueError: ``position`` is smaller than the number of tokens that the cache holds.
        """
        require_int("position", position, self.layers[0].n_stored)
        distance = position - self.get_seq_length()
        for layer in self.layers:
            layer.move(distance)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that are held now (slots allocated ahead not counted)."""
        return sum(
            layer.n_stored * x.shape[0] * x.shape[1] * x.shape[3] * x.element_size()
            for layer in self.layers
            if layer.is_initialized
            for x in (layer.keys, layer.values)
        )

    # Saving

    def save(self, path: str | os.PathLike, metadata: Mapping[str, str] | None = None) -> None:
        """Write the stream to a safetensors file, from which it goes on with the same bits; see :meth:`load`.

        Only what is stored is written. An existing file is replaced whole or not at all.

        Args:
            metadata: strings to keep with it; ``streaming_llm.saving.read_metadata(path)`` gives them back.

        Raises:
            OSError: the file cannot be written.
            RuntimeError: a forward ended before its last layer.
        """
        saving.write(path, self.state(), metadata)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        model,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> StreamingKVCache:
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
        return saving.load(path, model, device=device, dtype=dtype)

    def state(self) -> StreamState:
        """Where the stream is, as a value; its tensors are views of the cache, for use before the next forward."""
        return state_of(self)

    def restore(self, state: StreamState, *, device: torch.device | str, dtype: torch.dtype | None = None) -> None:
        """Go on where ``state`` was taken, by a cache of the same model and size; buffers that fit stay in place.

        Raises:
            ValueError: ``state`` is of another model or size, or not whole; this cache is then unchanged.
        """
        put(self, state, device=torch.device(device), dtype=dtype)
