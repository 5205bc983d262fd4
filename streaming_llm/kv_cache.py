"""StreamingKVCache: attention sinks and a ring of recent tokens as a Transformers cache.

Attention scores under rotary positions depend on position differences alone. So a key is stored as it arrives,
rotated to its position in the stream, and keeps its true distance to every later query; only the sinks have to
move along with the query. A step writes one slot and rotates ``n_sink`` keys, however large the window is.

The sinks are rotated afresh from their first copy at every step, in float32 or better: rotating a 16-bit key
again and again would destroy it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .config import StreamingConfig, require_int
from .families import rotary_from_config
from .positions import Segment, StreamLayout
from .rope_utils import Rotary, compute_dtype, rotate

FIRST_ALLOCATION = 256


@dataclass
class BlockPlan:
    """What attention over several new tokens needs to know beside queries, keys and values.

    Travels on the key tensor that :meth:`StreamingLayer.update` returns, as the attribute ``streaming_plan``.

    Args:
        layout: the stream's layout.
        rotation: the turns of the stream's sinks.
        first_key: token number of the first key; keys and values are consecutive tokens from there on.
        first_query: token number of the first query.
        sink_keys, sink_values: ``[batch, num_kv_heads, n_sink, head_dim]``, the keys as first rotated; ``None``
            where no query is far enough into the stream to see a sink at other than its true distance.
        consumed: set by the attention function, so that a plan that nobody reads is noticed.
    """

    layout: StreamLayout
    rotation: SinkRotation
    first_key: int
    first_query: int
    sink_keys: Tensor | None
    sink_values: Tensor | None
    consumed: bool = False


class SinkRotation:
    """Cosine and sine for the sinks of all layers, computed once a step for each device.

    Args:
        rotary: the model's rotation.
        exact_angles: whether the model's own angles are exact. If not, they are float32 products of position and
            frequency, and the sinks follow the angle that the query really has.
    """

    def __init__(self, rotary: Rotary, exact_angles: bool) -> None:
        self.rotary = rotary
        self.exact_angles = exact_angles
        self._on_device: dict[torch.device, Rotary] = {}
        self._last: dict[tuple[torch.device, torch.dtype], tuple[int, Tensor, Tensor]] = {}
        self._last_turns: tuple[tuple[int, int, torch.device], Tensor, Tensor] | None = None

    def on(self, device: torch.device) -> Rotary:
        """The rotation with its frequencies on ``device``."""
        if device not in self._on_device:
            self._on_device[device] = self.rotary.to(device)
        return self._on_device[device]

    def cos_sin(self, query: int, anchor: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine, each ``[rotary_dim]``, of the turn from position ``anchor`` to position ``query``."""
        last = self._last.get((device, dtype))
        if last is None or last[0] != query:
            rotary = self.on(device)
            if self.exact_angles:
                angles = rotary.inv_freq * (query - anchor)
            else:
                angles = (rotary.inv_freq.float() * query).double() - rotary.inv_freq * anchor
            cos, sin = rotary.cos_sin_of(angles)
            last = self._last[device, dtype] = (query, cos.to(dtype), sin.to(dtype))
        return last[1], last[2]

    def turns(self, first: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosine and sine, each ``[count, rotary_dim]`` in float64, of turns by ``first``, ``first - 1``, ...

        They bring the queries of a block to where the sinks in their first rotation see them.
        """
        key = (first, count, device)
        if self._last_turns is None or self._last_turns[0] != key:
            positions = torch.arange(first, first - count, -1, device=device)
            self._last_turns = (key, *self.on(device).cos_sin(positions))
        return self._last_turns[1:]


class StreamingLayer(CacheLayerMixin):
    """Keys and values of one attention layer: ``[batch, num_kv_heads, <= n_sink + window_size + 1, head_dim]``.

    The tensors grow by doubling until they hold the whole cache and stay where they are from then on.
    """

    is_compileable = False
    is_sliding = False

    def __init__(self, layout: StreamLayout, rotation: SinkRotation) -> None:
        super().__init__()
        self.is_initialized = False  # before 4.57 Transformers' layers have no such attribute
        self.layout = layout
        self.rotation = rotation
        self.attends_blocks = False
        self.n_seen = 0
        self.position_offset = 0
        self._sink_keys: Tensor | None = None
        self._sink_parts: tuple[Tensor, Tensor] | None = None

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
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros((*old.shape[:2], size, old.shape[3]))
            new[:, :, :allocated] = old
            setattr(self, name, new)

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

    def _move_sinks(self, token: int) -> None:
        """Rotate the stored sinks to their distances from ``token``."""
        n_sink, rotary = self.layout.config.n_sink, self.rotation.rotary
        if not n_sink:
            return
        dtype = compute_dtype(self.dtype)
        if self._sink_parts is None:
            turned = self._keep_sinks()[..., : rotary.rotary_dim].to(dtype)
            self._sink_parts = (turned, rotary.quarter_turn(turned))
        # From the position at which the first copies are right, S + W, to the query's.
        anchor = self.layout.config.cache_size + self.position_offset
        cos, sin = self.rotation.cos_sin(token + self.position_offset, anchor, self.device, dtype)
        target = self.keys[:, :, :n_sink, : rotary.rotary_dim]
        turned, quarter = self._sink_parts
        if dtype == self.dtype:
            torch.mul(turned, cos, out=target)
            target.addcmul_(quarter, sin)
        else:
            target.copy_(torch.addcmul(turned * cos, quarter, sin))

    # The cache protocol

    def update(
        self, key_states: Tensor, value_states: Tensor, cache_kwargs: dict[str, Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values and return those that the new tokens attend to.

        Args:
            key_states, value_states: ``[batch, num_kv_heads, q_len, head_dim]``, keys rotated to their position.

        Returns:
            Keys and values ``[batch, num_kv_heads, kv_len, head_dim]``; views of the cache where possible.

        Raises:
            ValueError: several tokens at once need more than a cache can give (see :class:`StreamingKVCache`), or
                the batch size is another than before.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != self.keys.shape[0]:
            raise ValueError(
                f"this cache holds {self.keys.shape[0]} streams and was given keys of {key_states.shape[0]}: "
                "use a new cache, or reset() and batch_select_indices() / batch_repeat_interleave()"
            )
        q_len, start = key_states.shape[2], self.n_seen
        end = start + q_len
        if q_len == 1 and end > self.layout.capacity:
            return self._step(key_states, value_states)
        if end > self.layout.capacity:
            return self._block(key_states, value_states)
        self.reserve(end)
        self._store([Segment(start, start, q_len)], key_states, value_states, start)
        self.n_seen = end
        keys, values = self.keys[:, :, :end], self.values[:, :, :end]
        if q_len > 1 and self.attends_blocks:
            keys.streaming_plan = self._plan(0, start)
        return keys, values

    def _step(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """One token that evicts another."""
        token = self.n_seen
        slot = self.layout.slot(token)
        self.keys.select(2, slot).copy_(key_states.select(2, 0))
        self.values.select(2, slot).copy_(value_states.select(2, 0))
        self._move_sinks(token)
        self.n_seen = token + 1
        return self.keys, self.values

    def _block(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Several tokens, some of which evict others: returns all keys that any of them attends to."""
        if not self.attends_blocks:
            raise ValueError(
                f"{key_states.shape[2]} tokens at once do not fit: {self.n_seen} have been seen and the cache keeps "
                f"{self.layout.config.cache_size}. A cache sees neither queries nor mask, so this would be inexact. "
                "Feed them one by one, or use `with StreamingLLMWrapper(model, ...) as stream:` and its "
                "stream.new_cache(), which take any length"
            )
        layout, start = self.layout, self.n_seen
        end = start + key_states.shape[2]
        first_key = 0 if start <= layout.capacity else start - layout.config.window_size
        stored = [slice(s.slot, s.slot + s.length) for s in layout.segments(range(first_key, start))]
        keys = torch.cat([*(self.keys[:, :, s] for s in stored), key_states], dim=2)
        values = torch.cat([*(self.values[:, :, s] for s in stored), value_states], dim=2)

        self.reserve(layout.capacity)
        for tokens in layout.survivors(start, end):
            self._store(layout.segments(tokens), key_states, value_states, start)
        self._keep_sinks()
        self.n_seen = end
        keys.streaming_plan = self._plan(first_key, start)
        return keys, values

    def _plan(self, first_key: int, first_query: int) -> BlockPlan:
        moves = self.n_seen > self.layout.capacity and self.layout.config.n_sink > 0
        return BlockPlan(
            self.layout,
            self.rotation,
            first_key,
            first_query,
            self._keep_sinks() if moves else None,
            self.values[:, :, : self.layout.config.n_sink] if moves else None,
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
        self._sink_keys = self._sink_parts = None

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
            self._sink_keys = rotate(self._sink_keys, cos, sin, rotary)
            self._sink_parts = None

    def crop(self, max_length: int) -> None:
        """Forget the last tokens.

        Transformers has changed what it passes from the length that remains to the number of tokens to remove, as a
        negative number or zero. Both are understood: zero removes none, and :meth:`reset` forgets them all.

        Args:
            max_length: positive: so many tokens remain seen; otherwise: its magnitude is the number to forget.

        Raises:
            ValueError: the tokens that would come back into the window have been evicted.
        """
        length = max_length - self.position_offset if max_length > 0 else self.n_seen + max_length
        if length >= self.n_seen:
            return
        if self.n_seen > self.layout.capacity or length < 0:
            raise ValueError(
                f"cannot go back from {self.n_seen} to {length} tokens: a streaming cache has evicted the tokens "
                "that would be in the window then"
            )
        self.n_seen = length

    def _select(self, select) -> None:
        """Replace every tensor by ``select(tensor)``, which acts on the batch dimension."""
        if not self.is_initialized:
            return
        self.keys, self.values = select(self.keys), select(self.values)
        self.batch_size = self.max_batch_size = self.keys.shape[0]
        if self._sink_keys is not None:
            self._sink_keys, self._sink_parts = select(self._sink_keys), None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(lambda x: x[indices.to(x.device)])


class StreamingKVCache(Cache):
    """A cache of constant size for endless streams: attention sinks and a window of recent tokens.

    Works on an unmodified model: ``model(ids[:, t:t+1], past_key_values=cache, use_cache=True)`` is exact token by
    token, and so is a first block that fits in the cache. A forward of several tokens that evicts some, or that
    follows an eviction, needs a window of its own for each query, which no cache can give: it raises
    ``ValueError``. Inside :class:`~streaming_llm.StreamingLLMWrapper`, caches made by its ``new_cache()`` take
    blocks of any length, exactly.

    Limits of the bare cache: rotary angles are Transformers' own, computed in float32 from the absolute position
    (7e-3 in the logits of a small model at position 10,000,000; the wrapper's are exact). Padding cannot be seen
    by a cache: sequences of a batch have to be of equal length. The frequencies have to be those of the
    configuration, which they no longer are once ``model.half()`` has rounded them; where Transformers hands a cache
    cosine and sine (older versions do) that raises ``ValueError``, elsewhere a cache cannot notice. Load the model
    with ``dtype=``, or use the wrapper, which takes the frequencies from the model.

    Args:
        config: the model's Transformers configuration.
        n_sink, window_size: see :class:`~streaming_llm.StreamingConfig`.
        rotary: the model's rotation; read from ``config`` when not given.

    Raises:
        ValueError: a number is out of range, or the model has no rotary positions that can stream.
    """

    def __init__(self, config, n_sink: int = 4, window_size: int = 1020, *, rotary: Rotary | None = None) -> None:
        self.streaming_config = StreamingConfig(n_sink, window_size)
        self._bare = rotary is None
        rotation = SinkRotation(rotary_from_config(config) if rotary is None else rotary, not self._bare)
        layout = StreamLayout(self.streaming_config)
        num_layers = config.get_text_config(decoder=True).num_hidden_layers
        super().__init__(layers=[StreamingLayer(layout, rotation) for _ in range(num_layers)])
        self._attends_blocks = None
        self._open_plan: BlockPlan | None = None
        self._next_angle_check = layout.capacity

    def allow_blocks(self, attends_blocks) -> None:
        """Let forwards of several tokens evict while ``attends_blocks()`` is true: the model's attention then
        reads the :class:`BlockPlan` that comes with the keys."""
        self._attends_blocks = attends_blocks

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        cache_kwargs: dict[str, Any] | None = None,
        *args,
        **kwargs,
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values; see :meth:`StreamingLayer.update`."""
        if self._open_plan is not None and not self._open_plan.consumed:
            self._open_plan = None
            raise RuntimeError(
                "the attention function did not read the plan of a block of tokens, so its result is wrong: "
                "the cache was made by a StreamingLLMWrapper of another model"
            )
        layer = self.layers[layer_idx]
        if self._bare and layer_idx == 0 and layer.n_seen >= self._next_angle_check:
            self._check_angles(layer, cache_kwargs)
        if key_states.shape[2] > 1:
            layer.attends_blocks = self._attends_blocks is not None and self._attends_blocks()
        keys, values = layer.update(key_states, value_states, cache_kwargs)
        self._open_plan = getattr(keys, "streaming_plan", None)
        return keys, values

    def _check_angles(self, layer: StreamingLayer, cache_kwargs: dict[str, Any] | None) -> None:
        """From the first eviction on, whenever the stream has doubled: does the model rotate as configured?

        ``model.half()`` rounds the model's frequencies too, which a cache made from the configuration cannot know.
        Newer Transformers pass no cosine and sine, so that there is nothing to compare.
        """
        self._next_angle_check = 2 * layer.n_seen
        found = [x.flatten(0, -2)[-1] for name in ("cos", "sin") if (x := (cache_kwargs or {}).get(name)) is not None]
        if len(found) < 2:
            return
        cos = found[0]
        rotary = layer.rotation.on(cos.device)
        expected = torch.stack(rotary.cos_sin(layer.get_seq_length())) * rotary.scaling
        error = (torch.stack(found) - expected).abs().max().item()
        if error > torch.finfo(cos.dtype).eps + 1e-6 * layer.get_seq_length():  # rounding of cosine and of angle
            raise ValueError(
                f"the model's rotary angles are {error:.1e} off those of its configuration: its frequencies were "
                "probably cast to half precision with the weights. Load it with dtype=..., or use "
                "StreamingLLMWrapper, which takes them from the model"
            )

    def get_mask_sizes(self, cache_position: Tensor | int, layer_idx: int) -> tuple[int, int]:
        """``(kv_length, kv_offset)`` for Transformers' masks; see :meth:`StreamingLayer.get_mask_sizes`."""
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
