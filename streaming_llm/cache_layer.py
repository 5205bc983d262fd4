"""Where the tensors of one attention layer lie: a ring of slots, and the sinks in front of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .copies import joined
from .positions import Segment, StreamLayout
from .rope_utils import rotate
from .sinks import BlockPlan, MovingSinks, SinkRotation

FIRST_ALLOCATION = 256


class StreamingLayer(CacheLayerMixin):
    """Keys and values of one attention layer: ``[batch, num_kv_heads, <= n_sink + window_size + 1, head_dim]``.

    The tensors grow by doubling until they hold the whole cache and stay where they are from then on.

    Args:
        layout: which tokens are kept, and where.
        rotation: the layer's rotation, shared with those that rotate alike.
        model_window: sliding window of the model's own in this layer. Keys from such a layer carry an attribute
            ``streaming_plan`` also where there is none, which tells attention that the stream's rule holds instead.
    """

    is_compileable = False
    is_sliding = False

    def __init__(self, layout: StreamLayout, rotation: SinkRotation, model_window: int | None = None) -> None:
        super().__init__()
        self.is_initialized = False  # before 4.57 Transformers' layers have no such attribute
        self.layout = layout
        self.rotation = rotation
        self.model_window = model_window
        self.attends_blocks = False
        self.n_seen = 0
        self.position_offset = 0
        self._sinks_turn = layout.config.n_sink > 0 and rotation.rotary.rotary_dim > 0
        self._sink_keys: Tensor | None = None
        self._moving: MovingSinks | None = None  # derived from the first copies; None where these or the slots changed
        self._place = 0  # among the layers whose sinks move together
        self._sink_slots: Tensor | None = None  # what moves of `keys`

    # Storage

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        value_states = key_states if value_states is None else value_states
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size = self.max_batch_size = key_states.shape[0]  # the newer and the older name
        self.keys = key_states.new_empty((*key_states.shape[:2], 0, key_states.shape[3]))
        self.values = value_states.new_empty((*value_states.shape[:2], 0, value_states.shape[3]))
        self.is_initialized = True

    def reserve(self, n_slots: int) -> None:
        """Make room for ``n_slots`` slots (at most the capacity)."""
        allocated = self.keys.shape[2]
        if n_slots <= allocated:
            return
        size = min(self.layout.capacity, max(n_slots, 2 * allocated, FIRST_ALLOCATION))
        with torch.inference_mode(False):  # a cache filled in inference mode can be used outside it
            for name in ("keys", "values"):
                old = getattr(self, name)
                new = torch.zeros((*old.shape[:2], size, old.shape[3]), dtype=old.dtype, device=old.device)
                new[:, :, :allocated].copy_(old)
                setattr(self, name, new)
        self._moving = None
        if self.model_window is not None:
            self.keys.streaming_plan = None

    def _store(self, segments: list[Segment], key_states: Tensor, value_states: Tensor, start: int) -> None:
        for segment in segments:
            source = slice(segment.token - start, segment.token - start + segment.length)
            target = slice(segment.slot, segment.slot + segment.length)
            self.keys[:, :, target] = key_states[:, :, source]
            self.values[:, :, target] = value_states[:, :, source]

    # Sinks

    def _keep_sinks(self) -> Tensor:
        """The sinks' keys as first rotated; copied when they are about to move for the first time."""
        if self._sink_keys is None:
            self._sink_keys = self.keys[:, :, : self.layout.config.n_sink].clone()
        return self._sink_keys

    def _move_sinks(self, token: int, layers: Sequence[StreamingLayer]) -> None:
        """Bring the stored sinks to their distances from ``token``."""
        if not self._sinks_turn:
            return
        if self._moving is None:
            in_step = (token, token + 1)  # the second: those whose turn in this forward has been
            _move_together(layer for layer in layers or (self,) if layer._sinks_turn and layer.n_seen in in_step)
        # From the position at which the first copies are right, S + W, to the query's.
        anchor = self.layout.config.cache_size + self.position_offset
        self._sink_slots.copy_(self._moving.at(token + self.position_offset, anchor)[self._place])

    def _slots_that_move(self) -> Tensor:
        with torch.inference_mode(False):
            return self.keys[:, :, : self.layout.config.n_sink, : self.rotation.rotary.rotary_dim]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_moving": None, "_sink_slots": None}  # a pickled view would be a tensor of its own

    # The cache protocol

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        cache_kwargs: dict[str, Any] | None = None,
        *,
        layers: Sequence[StreamingLayer] = (),
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values and return those that the new tokens attend to.

        Args:
            key_states, value_states: ``[batch, num_kv_heads, q_len, head_dim]``, keys rotated to their position.
            layers: all layers of the cache, whose sinks can then move together; this one's own move alone without.

        Returns:
            Keys and values ``[batch, num_kv_heads, kv_len, head_dim]``; views of the cache where possible.

        Raises:
            ValueError: several tokens at once need more than a cache can give (see :class:`StreamingKVCache`), or
                the batch size is another than before.
        """
        if key_states.requires_grad or value_states.requires_grad:
            key_states, value_states = key_states.detach(), value_states.detach()
        if not self.is_initialized or (self.n_seen == 0 and key_states.shape[0] != self.batch_size):
            self.lazy_initialization(key_states, value_states)
        batch_size, _, q_len, _ = key_states.shape
        if batch_size != self.batch_size:
            raise ValueError(
                f"this cache holds {self.batch_size} streams and was given keys of {batch_size}: use a new cache, "
                "reset(), batch_select_indices() or batch_repeat_interleave()"
            )
        start = self.n_seen
        end = start + q_len
        if q_len == 1 and end > self.layout.capacity:
            return self._step(key_states, value_states, layers)
        if end > self.layout.capacity:
            return self._block(key_states, value_states)
        self.reserve(end)
        self._store([Segment(start, start, q_len)], key_states, value_states, start)
        self.n_seen = end
        keys, values = self.keys[:, :, :end], self.values[:, :, :end]
        if q_len > 1 and self.attends_blocks:
            keys.streaming_plan = self._plan(0, start)
        elif self.model_window is not None:
            keys.streaming_plan = None
        return keys, values

    def _step(
        self, key_states: Tensor, value_states: Tensor, layers: Sequence[StreamingLayer]
    ) -> tuple[Tensor, Tensor]:
        """One token that evicts another."""
        token = self.n_seen
        slot = self.layout.slot(token)
        self.keys.narrow(2, slot, 1).copy_(key_states)
        self.values.narrow(2, slot, 1).copy_(value_states)
        self._move_sinks(token, layers)
        self.n_seen = token + 1
        if self.model_window is not None:
            self.keys.streaming_plan = None
        return self.keys, self.values

    def _block(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Several tokens, some of which evict others: returns them, with those before them in their plan."""
        if not self.attends_blocks:
            raise ValueError(
                f"{key_states.shape[2]} tokens at once do not fit: {self.n_seen} have been seen and the cache keeps "
                f"{self.layout.config.cache_size}. A cache sees neither queries nor mask, so this would be inexact. "
                "Feed them one by one, or inside `with StreamingLLMWrapper(model, ...) as stream:`, where blocks of "
                "any length are exact"
            )
        layout, start = self.layout, self.n_seen
        end = start + key_states.shape[2]
        first_key = 0 if start <= layout.capacity else start - layout.config.window_size
        stored = [slice(s.slot, s.slot + s.length) for s in layout.segments(range(first_key, start))]
        previous = tuple(joined([x[:, :, s] for s in stored], dim=2) for x in (self.keys, self.values) if stored)

        self.reserve(layout.capacity)
        for tokens in layout.survivors(start, end):
            self._store(layout.segments(tokens), key_states, value_states, start)
        self._keep_sinks()
        self.n_seen = end
        key_states.streaming_plan = self._plan(first_key, start, previous)
        return key_states, value_states

    def _plan(self, first_key: int, first_query: int, previous: tuple[Tensor, ...] = ()) -> BlockPlan:
        moves = self.n_seen > self.layout.capacity and self.layout.config.n_sink > 0
        return BlockPlan(
            self.layout,
            self.rotation,
            first_key,
            first_query,
            self._keep_sinks() if moves else None,
            self.values[:, :, : self.layout.config.n_sink] if moves else None,
            previous,
        )

    def get_seq_length(self) -> int:
        """Tokens seen, which is the next token's position; not the number kept."""
        return self.n_seen + self.position_offset

    def get_mask_sizes(self, cache_position: Tensor | int) -> tuple[int, int]:
        """``(kv_length, kv_offset)`` of the keys that a forward of these positions attends to.

        Args:
            cache_position: positions of the new tokens, or (newer Transformers) their number.
        """
        q_len = cache_position.shape[0] if isinstance(cache_position, Tensor) else cache_position
        kept = self.layout.kept(self.n_seen) if q_len == 1 else self.n_seen
        return kept + q_len, self.get_seq_length() - kept

    def get_max_length(self) -> int:
        """Tokens held at most. As with Transformers' sliding windows, many more may have been seen."""
        return self.layout.capacity

    def get_max_cache_shape(self) -> int:
        """What :meth:`get_max_length` is called in older Transformers."""
        return self.get_max_length()

    # Whole-stream operations

    @property
    def n_stored(self) -> int:
        """Slots that hold a token."""
        return min(self.n_seen, self.layout.capacity)

    def reset(self) -> None:
        """Forget the stream; the tensors stay allocated."""
        self.n_seen = self.position_offset = 0
        self._sink_keys = self._moving = None

    def move(self, distance: int) -> None:
        """Shift the stream's position by ``distance``: every stored key is re-rotated once."""
        self.position_offset += distance
        if not self.n_stored:
            return
        rotary = self.rotation.on(self.device)
        cos, sin = rotary.cos_sin(distance)
        stored = self.keys[:, :, : self.n_stored]
        stored.copy_(rotate(stored, cos, sin, rotary))
        if self._sink_keys is not None:
            self._sink_keys, self._moving = rotate(self._sink_keys, cos, sin, rotary), None

    def crop(self, max_length: int) -> None:
        """Forget the last tokens.

        Transformers has changed what it passes from the length that remains to the number of tokens to remove, as a
        negative number or zero. Both are understood: zero removes none, and :meth:`reset` forgets them all.

        Args:
            max_length: positive: so many tokens remain seen; otherwise: its magnitude is the number to forget.

        Raises:
            ValueError: the tokens that would come back into the window have been evicted.
        """
        max_length = int(max_length)  # some versions pass a tensor
        length = max_length - self.position_offset if max_length > 0 else self.n_seen + max_length
        if length >= self.n_seen:
            return
        if self.n_seen > self.layout.capacity or length < 0:
            raise ValueError(
                f"cannot go back from {self.n_seen} to {length} tokens: a streaming cache has evicted the tokens "
                "that would be in the window then"
            )
        self.n_seen = length
        if self._sink_keys is not None:  # nothing is evicted any more, and other tokens may become the sinks
            self.keys[:, :, : self.layout.config.n_sink].copy_(self._sink_keys)
            self._sink_keys = self._moving = None

    def _select(self, select) -> None:
        """Replace every tensor by ``select(tensor)``, which acts on the batch dimension."""
        if not self.is_initialized:
            return
        with torch.inference_mode(False):
            self.keys, self.values = select(self.keys), select(self.values)
        self.batch_size = self.max_batch_size = self.keys.shape[0]
        self._moving = None
        if self._sink_keys is not None:
            self._sink_keys = select(self._sink_keys)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(lambda x: x[indices.to(x.device)])

    # The stream as a value

    def state(self) -> dict[str, Tensor]:
        """Views of what everything to come depends on, beside the counters; empty while nothing is stored.

        ``keys`` and ``values`` ``[batch, num_kv_heads, n_stored, head_dim]`` as they lie, and, once the sinks have
        moved, ``sink_keys`` ``[batch, num_kv_heads, n_sink, head_dim]`` as first rotated.
        """
        if not self.n_stored:
            return {}
        stored = {"keys": self.keys[:, :, : self.n_stored], "values": self.values[:, :, : self.n_stored]}
        moved = self.layout.config.n_sink > 0 and self.n_seen > self.layout.capacity
        return stored | ({"sink_keys": self._keep_sinks()} if moved else {})

    def restore(
        self,
        n_seen: int,
        position_offset: int,
        n_slots: int,
        tensors: dict[str, Tensor],
        device: torch.device,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Go on where ``tensors`` was taken by :meth:`state`; buffers of the right kind stay where they are.

        Args:
            n_slots: slots to allocate, at least those stored.
            device, dtype: where and as what to keep the tensors; ``dtype=None``: their own.
        """
        self.reset()
        self.n_seen, self.position_offset = n_seen, position_offset
        if not tensors:
            return
        empty = [tensors[name][:, :, :0].to(device, dtype) for name in ("keys", "values")]
        own = [x[:, :, :0] for x in (self.keys, self.values)] if self.is_initialized else []
        if [(x.shape, x.device, x.dtype) for x in own] != [(x.shape, x.device, x.dtype) for x in empty]:
            self.lazy_initialization(*empty)
        self.reserve(n_slots)
        with torch.inference_mode(False):
            for own, name in ((self.keys, "keys"), (self.values, "values")):
                own[:, :, : self.n_stored].copy_(tensors[name])
            sink_keys = tensors.get("sink_keys")
            self._sink_keys = None if sink_keys is None else sink_keys.to(device, dtype, copy=True)


def _move_together(layers: Iterable[StreamingLayer]) -> None:
    """Let the sinks of those ``layers`` that rotate and lie alike move together."""
    alike: dict[tuple, list[StreamingLayer]] = {}
    for layer in layers:
        keys = layer._keep_sinks()
        alike.setdefault((id(layer.rotation), keys.shape, keys.dtype, keys.device), []).append(layer)
    for group in alike.values():
        moving = MovingSinks(group[0].rotation, [layer._keep_sinks() for layer in group])
        for place, layer in enumerate(group):
            layer._moving, layer._place, layer._sink_slots = moving, place, layer._slots_that_move()
