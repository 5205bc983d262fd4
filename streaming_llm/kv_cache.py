"""StreamingKVCache: attention sinks and a ring of recent tokens as a Transformers cache.

Attention scores under rotary positions depend on position differences alone. So a key is stored as it arrives,
rotated to its position in the stream, and keeps its true distance to every later query; only the sinks have to
move along with the query. A step writes one slot and rotates ``n_sink`` keys, however large the window is.

The sinks are rotated afresh from their first copy at every step, in float32 or better: rotating a 16-bit key
again and again would destroy it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from .attention.plan import BlockPlan, Plan
from .attention.wide_copies import joined
from .bare_cache import BareChecks
from .cache_forward import CacheForward
from .cache_layer import StreamingLayer
from .config import StreamingConfig
from .families import (
    Family,
    family_of,
    family_of_model,
    layer_layouts,
    rotaries_from_config,
    rotaries_from_model,
    transformers_model,
)
from .positions import Progress
from .rope_utils import Rotary
from .saved_cache import SaveableCache
from .saving import model_facts
from .sinks import moving_sinks, sink_rotations


class StreamingKVCache(SaveableCache):
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
        model_config: the model's Transformers configuration.
        n_sink, window_size: see :class:`~streaming_llm.StreamingConfig`, or
        config: both in one.
        rotary: the rotation of each layer, or of all; read from ``model_config`` when not given.
        family: what is known of the model's family; measured when not given.

    Attributes:
        streaming_config: sinks and window.
        progress: how far the streams are.

    Raises:
        ValueError: a number is out of range, or the model has no rotary positions that can stream.
    """

    def __init__(
        self,
        model_config: Any,
        n_sink: int = 4,
        window_size: int = 1020,
        *,
        config: StreamingConfig | None = None,
        rotary: Rotary | Sequence[Rotary] | None = None,
        family: Family | None = None,
    ) -> None:
        streaming, progress = StreamingConfig.given(n_sink, window_size, config), Progress()
        family = family_of(model_config) if family is None else family
        layouts = layer_layouts(model_config, streaming, family)
        rotary = rotaries_from_config(model_config) if rotary is None else rotary
        rotaries = [rotary] * len(layouts) if isinstance(rotary, Rotary) else list(rotary)
        self._of_keys = sink_rotations(rotaries) if family.latents else []
        if family.latents:  # what is stored is rotated from its first dimension on
            stored = {id(rotary): replace(rotary, offset=0) for rotary in rotaries}
            rotaries = [stored[id(rotary)] for rotary in rotaries]
        rotations = sink_rotations(rotaries)
        self._rotations = set(rotations)
        layers = [
            StreamingLayer(layout, rotation, progress, is_sliding=layout.config != streaming)
            for layout, rotation in zip(layouts, rotations, strict=True)
        ]
        super().__init__(layers, streaming, progress, family)
        self.model_facts = model_facts(model_config)
        self._index = {layer_idx: index for index, layer_idx in enumerate(family.stores)}
        self._bare = BareChecks(model_config, streaming, family)

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        n_sink: int = 4,
        window_size: int = 1020,
        *,
        config: StreamingConfig | None = None,
    ) -> StreamingKVCache:
        """A cache with the frequencies that ``model`` holds, also where they were rounded with the weights."""
        model = transformers_model(model)
        family, rotary = family_of_model(model), rotaries_from_model(model)
        return cls(model.config, n_sink, window_size, config=config, rotary=rotary, family=family)

    # A forward

    def begin(self, n_tokens: int, *, attached: bool = False) -> None:
        """Begin a forward of ``n_tokens`` for each row.

        Done by the attachment of a model, and by the first layer's :meth:`update` on an unmodified one.

        Args:
            attached: the model streams: its angles are exact, and its attention takes plans.

        Raises:
            RuntimeError: an earlier forward ended before its last layer.
            ValueError: these tokens would not be exact.
        """
        self.require_whole()
        if n_tokens > 1 and self.n_seen and not self.family.blocks_continue:
            raise ValueError(
                "recurrent layers of this model take several tokens at the beginning of a stream alone, under the "
                "installed Transformers: feed the others one by one, as stream.generate() and prefill() do"
            )
        if n_tokens > 1 and not self.progress.together:
            raise ValueError("rows that are not equally far take single tokens together, and blocks one by one")
        if not attached:
            self._bare.require_exact(self.progress, n_tokens)
        for rotation in self._rotations:
            rotation.exact_angles = attached
        self._forward = CacheForward(n_tokens, self.progress, attached)
        if n_tokens == 1 and self.progress.n_seen > self.streaming_config.cache_size:
            if self._moving is None or min(self.progress.seen) <= self.streaming_config.n_sink:  # some still come
                self._moving = moving_sinks(layer for layer in self.layers if layer.sinks_turn)
            for sinks in self._moving:
                sinks.move(self.progress)

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        cache_kwargs: dict[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values, detached; see :meth:`StreamingLayer.store`.

        Raises:
            RuntimeError: an earlier forward ended before its last layer, or its attention did not know of streams.
        """
        index, n_tokens = self._index[layer_idx], key_states.shape[2]
        layer = self.layers[index]
        if index == 0 and (self._forward is None or self._forward.layers_done):
            self._bare.require_angles(layer, cache_kwargs)
            self.begin(n_tokens)
        forward = self._running
        forward.require_turn(index, n_tokens)
        if key_states.requires_grad or value_states.requires_grad:
            key_states, value_states = key_states.detach(), value_states.detach()
        slots = forward.slots(layer.layout, key_states.device)
        if self.family.latents:
            values, keys, plan = layer.store(value_states, key_states, slots)
            if isinstance(plan, BlockPlan):
                values, keys, plan = plan.all_in_one(values, keys, self._of_keys[index])
        else:
            keys, values, plan = layer.store(key_states, value_states, slots)
        forward.stored(plan)
        if not forward.attached:
            if isinstance(plan, BlockPlan) and plan.previous:  # a sliding layer's own mask takes all of them
                keys, values = (joined(x, dim=2) for x in zip(plan.previous, (keys, values), strict=True))
            if forward.layers_done == len(self.layers):
                self.end()
        return keys, values

    def take_plan(self, layer_idx: int) -> Plan:
        """How the tokens that a layer has just stored attend; see :meth:`CacheForward.take_plan`."""
        source = self.family.sources.get(layer_idx)
        if source is not None:
            return self._running.taken[self._index[source]]
        return self._running.take_plan(self._index[layer_idx])

    def end(self) -> None:
        """End a forward: its tokens have been seen.

        Raises:
            RuntimeError: not every layer has stored them.
        """
        forward = self._running
        if not forward.layers_done:
            self._forward = None
            raise RuntimeError(
                "the model ran a forward without the stream's cache, so that its result is of no stream: it does not "
                "take past_key_values here"
            )
        forward.require_turn(len(self.layers), forward.n_tokens)
        self.progress.advance(forward.n_tokens)
        self._forward = None

    def first_layer_begins(self) -> None:
        """The first layer of the model begins, which may be a recurrent one."""
        self._running.state_changes = self.recurrent is not None

    def abandon(self) -> None:
        """A forward raised an error: if no layer has stored anything, it has not been."""
        if not self.is_broken:
            self._forward = None

    # What Transformers asks for

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, which is the next token's position (of the row that is furthest); not the number kept."""
        return self.progress.position

    def get_mask_sizes(self, cache_position: Tensor | int, layer_idx: int) -> tuple[int, int]:
        """``(kv_length, kv_offset)`` for Transformers' masks; see :meth:`StreamingLayer.get_mask_sizes`."""
        if self._forward is None:  # of an unmodified model, which makes its masks before any layer stores
            n_tokens = cache_position if isinstance(cache_position, int) else len(cache_position)
            self._bare.require_positions(self.progress, n_tokens)
        return self.layers[self._index.get(layer_idx, 0)].get_mask_sizes(cache_position)

    # When the stream is changed between forwards

    def reset(self) -> None:
        super().reset()
        self._bare.forget_angles()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_moving": None}  # a pickled view would be a tensor of its own
