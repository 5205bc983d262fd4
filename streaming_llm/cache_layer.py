"""Where the tensors of one attention layer lie: a ring of slots, and the sinks in front of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .attention.plan import BlockPlan, Plan, StepPlan
from .attention.wide_copies import joined
from .positions import Progress, Segment, StreamLayout
from .rope_utils import rotate
from .sinks import SinkRotation

FIRST_ALLOCATION = 256


class StreamingLayer(CacheLayerMixin):
    """Keys and values of one attention layer: ``[batch, num_kv_heads, <= layout.capacity, head_dim]``.

    The tensors grow by doubling until they hold the whole cache and stay where they are from then on.

    Args:
        layout: which tokens are kept, and where.
        rotation: the layer's rotation, shared with those that rotate alike.
        progress: of the cache that the layer belongs to, which alone changes it.
        is_sliding: whether the layout is that of a sliding window of the model's own.

    Attributes:
        keys, values: slots of the layer; the first ``layout.stored(n_seen)`` hold tokens.
        sinks: keys of the sinks as first rotated, ``[batch, num_kv_heads, n_sink, head_dim]``. Those in ``keys`` are
            turned to the query's distance at every step that evicts.
    """

    is_compileable = False

    def __init__(
        self, layout: StreamLayout, rotation: SinkRotation, progress: Progress, is_sliding: bool = False
    ) -> None:
        super().__init__()
        self.is_initialized = False  # before 4.57 Transformers' layers have no such attribute
        self.is_sliding = is_sliding
        self.layout = layout
        self.rotation = rotation
        self.progress = progress

    @property
    def sinks_turn(self) -> bool:
        """Whether there are sinks that turn."""
        return self.layout.config.n_sink > 0 and self.rotation.rotary.rotary_dim > 0

    @property
    def n_stored(self) -> int:
        """Slots that hold a token, in the fullest row."""
        return self.layout.stored(self.progress.n_seen)

    # Storage

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        value_states = key_states if value_states is None else value_states
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size = self.max_batch_size = key_states.shape[0]  # the newer and the older name
        self.keys = key_states.new_empty((*key_states.shape[:2], 0, key_states.shape[3]))
        self.values = value_states.new_empty((*value_states.shape[:2], 0, value_states.shape[3]))
        with torch.inference_mode(False):
            shape = (*key_states.shape[:2], self.layout.config.n_sink, key_states.shape[3])
            self.sinks = torch.zeros(shape, dtype=self.dtype, device=self.device)
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

    def _write(self, segments: list[Segment], key_states: Tensor, value_states: Tensor, start: int) -> None:
        for segment in segments:
            source = slice(segment.token - start, segment.token - start + segment.length)
            target = slice(segment.slot, segment.slot + segment.length)
            self.keys[:, :, target] = key_states[:, :, source]
            self.values[:, :, target] = value_states[:, :, source]

    def _require_fitting(self, key_states: Tensor, value_states: Tensor) -> None:
        given = [(x.shape[0], x.dtype, x.device) for x in (key_states, value_states)]
        held = [(x.shape[0], x.dtype, x.device) for x in (self.keys, self.values)] if self.is_initialized else None
        if given == held:
            return
        if held is None or self.progress.n_seen == 0:
            self.lazy_initialization(key_states, value_states)
            return
        if key_states.shape[0] != self.batch_size:
            raise ValueError(
                f"this cache holds {self.batch_size} streams and was given keys of {key_states.shape[0]}: use a new "
                "cache, reset(), batch_select_indices() or batch_repeat_interleave()"
            )
        there, here = (" and ".join(f"{dtype} on {device}" for _, dtype, device in x) for x in (held, given))
        raise ValueError(
            f"this cache holds keys and values of {there} and was given {here}: run all forwards of a stream under "
            "the same autocast, or none, and leave the model where it is"
        )

    # New tokens

    def update(
        self, key_states: Tensor, value_states: Tensor, cache_kwargs: dict[str, Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`store`, without the plan."""
        return self.store(key_states, value_states)[:2]

    def store(
        self, key_states: Tensor, value_states: Tensor, slots: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Plan]:
        """Store new keys and values and return those that the new tokens attend to.

        Args:
            key_states, value_states: ``[batch, num_kv_heads, q_len, head_dim]``, keys rotated to their position.
            slots: where one token of each row goes, ``[batch]``, int64, for rows that are not equally far.

        Returns:
            Keys and values ``[batch, num_kv_heads, kv_len, head_dim]``, views of the cache where possible, and how
            the new tokens attend to them.

        Raises:
            ValueError: the batch size, dtype or device is another than before.
        """
        self._require_fitting(key_states, value_states)
        if slots is not None:
            return self._step_of_rows(key_states, value_states, slots)
        start, q_len, n_sink = self.progress.seen[0], key_states.shape[2], self.layout.config.n_sink
        end = start + q_len
        if start < n_sink:
            self.sinks[:, :, start:end] = key_states[:, :, : n_sink - start]
        if end > self.layout.capacity:
            return self._block(key_states, value_states) if q_len > 1 else self._step(key_states, value_states)
        self.reserve(end)
        self._write([Segment(start, start, q_len)], key_states, value_states, start)
        keys, values = self.keys[:, :, :end], self.values[:, :, :end]
        return keys, values, StepPlan() if q_len == 1 else self._plan(0, end)

    def _step(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor, Plan]:
        """One token that evicts another."""
        slot = self.layout.slot(self.progress.seen[0])
        self.keys.narrow(2, slot, 1).copy_(key_states)
        self.values.narrow(2, slot, 1).copy_(value_states)
        return self.keys, self.values, StepPlan()

    def _step_of_rows(self, key_states: Tensor, value_states: Tensor, slots: Tensor) -> tuple[Tensor, Tensor, Plan]:
        """One token for each row, each row at a place of its own."""
        lengths = tuple(self.layout.stored(seen + 1) for seen in self.progress.seen)
        self.reserve(max(lengths))
        rows = torch.arange(len(lengths), device=slots.device)
        self.keys[rows, :, slots] = key_states[:, :, 0]
        self.values[rows, :, slots] = value_states[:, :, 0]
        for row, seen in enumerate(self.progress.seen):
            if seen < self.layout.config.n_sink:
                self.sinks[row, :, seen] = key_states[row, :, 0]
        longest = max(lengths)
        keys, values = self.keys[:, :, :longest], self.values[:, :, :longest]
        return keys, values, StepPlan(None if min(lengths) == longest else lengths)

    def _block(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor, Plan]:
        """Several tokens, some of which evict others: returns them, with those before them in their plan."""
        layout, start = self.layout, self.progress.seen[0]
        end = start + key_states.shape[2]
        first_key = 0 if start <= layout.config.cache_size else start - layout.config.window_size
        stored = [slice(s.slot, s.slot + s.length) for s in layout.segments(range(first_key, start))]
        previous = tuple(joined([x[:, :, s] for s in stored], dim=2) for x in (self.keys, self.values) if stored)
        self.reserve(layout.capacity)
        for tokens in layout.survivors(start, end):
            self._write(layout.segments(tokens), key_states, value_states, start)
        return key_states, value_states, self._plan(first_key, end, previous)

    def _plan(self, first_key: int, end: int, previous: tuple[Tensor, ...] = ()) -> BlockPlan:
        n_sink = self.layout.config.n_sink
        far = n_sink > 0 and end > self.layout.capacity
        sinks = (self.sinks, self.values[:, :, :n_sink]) if far else (None, None)
        return BlockPlan(self.layout, first_key, self.progress.seen[0], self.rotation, *sinks, previous)

    # Sizes, as Transformers asks for them

    def get_seq_length(self) -> int:
        """Tokens seen, which is the next token's position; not the number kept."""
        return self.progress.position

    def get_mask_sizes(self, cache_position: Tensor | int) -> tuple[int, int]:
        """``(kv_length, kv_offset)`` of the keys that a forward of these positions attends to.

        Args:
            cache_position: positions of the new tokens, or (newer Transformers) their number.
        """
        q_len = cache_position.shape[0] if isinstance(cache_position, Tensor) else cache_position
        n_seen = self.progress.n_seen
        kept = self.layout.kept(n_seen) if q_len == 1 or self.is_sliding else n_seen
        return kept + q_len, self.get_seq_length() - kept

    def get_max_length(self) -> int:
        """Tokens held at most. As with Transformers' sliding windows, many more may have been seen."""
        return self.layout.capacity

    def get_max_cache_shape(self) -> int:
        """What :meth:`get_max_length` is called in older Transformers."""
        return self.get_max_length()

    # Whole-stream operations; the cache changes the progress

    def reset(self) -> None:
        """Nothing to do: the tensors stay allocated, and the cache forgets what they hold."""

    def move(self, distance: int) -> None:
        """Rotate every stored key by ``distance`` positions, once."""
        if self.n_stored:
            rotary = self.rotation.on(self.device)
            cos, sin = rotary.cos_sin(distance)
            for stored in (self.keys[:, :, : self.n_stored], self.sinks):
                stored.copy_(rotate(stored, cos, sin, rotary))

    def put_sinks_back(self) -> None:
        """Leave the sinks in the ring as they were first rotated."""
        n_sink = min(self.layout.config.n_sink, self.n_stored)
        if n_sink:
            self.keys[:, :, :n_sink].copy_(self.sinks[:, :, :n_sink])

    def select(self, select: Callable[[Tensor], Tensor]) -> None:
        """Replace what every tensor holds by ``select(tensor)``, which acts on the batch dimension."""
        if not self.is_initialized:
            return
        with torch.inference_mode(False):
            for name in ("keys", "values", "sinks"):
                before, selected = getattr(self, name), select(getattr(self, name))
                if selected.shape == before.shape:
                    before.copy_(selected)  # where a recorded step reads it
                else:
                    setattr(self, name, selected)
        self.batch_size = self.max_batch_size = self.keys.shape[0]

    def take_rows(self, rows: list[int], progress: Progress) -> StreamingLayer:
        """A layer of copies of these rows; an empty one, where nothing has been fed."""
        layer = StreamingLayer(self.layout, self.rotation, progress, self.is_sliding)
        if self.progress.n_seen:
            with torch.inference_mode(False):
                keys, values, sinks = self.keys[rows], self.values[rows], self.sinks[rows]
            layer.lazy_initialization(keys[:, :, :0], values[:, :, :0])
            layer.keys, layer.values, layer.sinks = keys, values, sinks
        return layer

    def put_rows(self, rows: list[int], other: StreamingLayer, n_rows: int) -> None:
        """Take over ``other``'s rows as these of ``n_rows``."""
        if not self.is_initialized or self.batch_size != n_rows:
            self.lazy_initialization(*(x[:1, :, :0].expand(n_rows, -1, -1, -1) for x in (other.keys, other.values)))
        n_slots = other.keys.shape[2]
        self.reserve(n_slots)
        self.keys[rows, :, :n_slots], self.values[rows, :, :n_slots] = other.keys, other.values
        self.sinks[rows] = other.sinks

    # The stream as a value

    def state(self) -> dict[str, Tensor]:
        """Views of what everything to come depends on, beside the progress; empty while nothing is stored.

        ``keys`` and ``values`` ``[batch, num_kv_heads, n_stored, head_dim]`` as they lie, and, once the sinks have
        moved, ``sink_keys`` ``[batch, num_kv_heads, n_sink, head_dim]`` as first rotated.
        """
        if not self.n_stored:
            return {}
        stored = {"keys": self.keys[:, :, : self.n_stored], "values": self.values[:, :, : self.n_stored]}
        moved = self.layout.config.n_sink > 0 and self.progress.n_seen > self.layout.capacity
        return stored | ({"sink_keys": self.sinks} if moved else {})

    def restore(
        self, n_slots: int, tensors: dict[str, Tensor], device: torch.device, dtype: torch.dtype | None = None
    ) -> None:
        """Hold what was taken by :meth:`state`; buffers of the right kind stay where they are.

        Args:
            n_slots: slots to allocate, at least those stored.
            device, dtype: where and as what to keep the tensors; ``dtype=None``: their own.
        """
        if not tensors:
            return
        empty = [tensors[name][:, :, :0].to(device, dtype) for name in ("keys", "values")]
        own = [x[:, :, :0] for x in (self.keys, self.values)] if self.is_initialized else []
        if [(x.shape, x.device, x.dtype) for x in own] != [(x.shape, x.device, x.dtype) for x in empty]:
            self.lazy_initialization(*empty)
        self.reserve(n_slots)
        n_stored, n_sink = tensors["keys"].shape[2], self.layout.config.n_sink
        with torch.inference_mode(False):
            self.keys[:, :, :n_stored].copy_(tensors["keys"])
            self.values[:, :, :n_stored].copy_(tensors["values"])
            first = tensors.get("sink_keys", tensors["keys"])[:, :, :n_sink]
            self.sinks[:, :, : first.shape[2]].copy_(first)
