"""StreamingKVCache: attention sinks and a ring of recent tokens as a Transformers cache.

Attention scores under rotary positions depend on position differences alone. So a key is stored as it arrives,
rotated to its position in the stream, and keeps its true distance to every later query; only the sinks have to
move along with the query. A step writes one slot and rotates ``n_sink`` keys, however large the window is.

The sinks are rotated afresh from their first copy at every step, in float32 or better: rotating a 16-bit key
again and again would destroy it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .attention.plan import BlockPlan, Plan
from .attention.wide_copies import joined
from .bare_cache import BareChecks
from .cache_forward import BROKEN, CacheForward
from .cache_layer import StreamingLayer
from .config import StreamingConfig, require_int
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
from .recurrent import RecurrentState
from .rope_utils import Rotary
from .saved_cache import SaveableCache
from .sinks import MovingSinks, sink_rotations
from .stream_state import model_facts


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
        model_config,
        n_sink: int = 4,
        window_size: int = 1020,
        *,
        config: StreamingConfig | None = None,
        rotary: Rotary | Sequence[Rotary] | None = None,
        family: Family | None = None,
    ) -> None:
        self.streaming_config = StreamingConfig.given(n_sink, window_size, config)
        self.progress = Progress()
        self.family = family_of(model_config) if family is None else family
        self._index = {layer_idx: index for index, layer_idx in enumerate(self.family.stores)}
        self.recurrent = RecurrentState() if self.family.has_state else None
        layouts = layer_layouts(model_config, self.streaming_config, self.family)
        rotary = rotaries_from_config(model_config) if rotary is None else rotary
        rotaries = [rotary] * len(layouts) if isinstance(rotary, Rotary) else list(rotary)
        self._of_keys = sink_rotations(rotaries) if self.family.latents else []
        if self.family.latents:  # what is stored is rotated from its first dimension on
            stored = {id(rotary): replace(rotary, offset=0) for rotary in rotaries}
            rotaries = [stored[id(rotary)] for rotary in rotaries]
        rotations = sink_rotations(rotaries)
        self._rotations = set(rotations)
        super().__init__(
            layers=[
                StreamingLayer(layout, rotation, self.progress, is_sliding=layout.config != self.streaming_config)
                for layout, rotation in zip(layouts, rotations, strict=True)
            ]
        )
        self._bare = BareChecks(model_config, self.streaming_config, self.family)
        self.model_facts = model_facts(model_config)
        self._forward: CacheForward | None = None
        self._pending: tuple[int, Tensor | None] = (0, None)  # the progress's version, and ids
        self._moving: MovingSinks | None = None  # derived from the layers' tensors; None once these have changed

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
        if self.is_broken:
            raise RuntimeError(BROKEN)
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
        self._forward = CacheForward(n_tokens, len(self.layers), self.progress, attached)
        if n_tokens == 1 and self.progress.n_seen > self.streaming_config.cache_size:
            if self._moving is None:
                self._moving = MovingSinks([layer for layer in self.layers if layer.sinks_turn])
            self._moving.move(self.progress)

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        cache_kwargs: dict[str, Any] | None = None,
        *args,
        **kwargs,
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
        forward = self._forward
        if forward is None:
            raise RuntimeError(BROKEN)
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
            if forward.is_complete:
                self.end()
        return keys, values

    def take_plan(self, layer_idx: int) -> Plan:
        """How the tokens that a layer has just stored attend; see :meth:`CacheForward.take_plan`."""
        if self._forward is None:
            raise RuntimeError(BROKEN)
        source = self.family.sources.get(layer_idx)
        if source is not None:
            return self._forward.plan_again(self._index[source])
        return self._forward.take_plan(self._index[layer_idx])

    def end(self) -> None:
        """End a forward: its tokens have been seen.

        Raises:
            RuntimeError: not every layer has stored them.
        """
        if self._forward is None:
            raise RuntimeError(BROKEN)
        if not self._forward.layers_done:
            self._forward = None
            raise RuntimeError(
                "the model ran a forward without the stream's cache, so that its result is of no stream: it does not "
                "take past_key_values here"
            )
        self._forward.require_turn(len(self.layers), self._forward.n_tokens)
        self.progress.advance(self._forward.n_tokens)
        self._forward = None

    def abandon(self) -> None:
        """A forward raised an error: if no layer has stored anything, it has not been."""
        if not self.is_broken:
            self._forward = None

    @property
    def is_broken(self) -> bool:
        """Whether a forward is half done: its layers hold different tokens."""
        return self._forward is not None and self._forward.layers_done > 0

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

    # Whole-stream operations

    def reset(self) -> None:
        """Forget the streams; the tensors stay allocated."""
        self._changed()
        if self.recurrent is not None:
            self.recurrent = RecurrentState()
        self.progress.set((0,), (0,))
        self._bare.forget_angles()

    def _changed(self) -> None:
        self._forward = self._moving = None

    def move_to(self, position: int) -> None:
        """Go on as if ``position`` tokens had been seen: the next token (of the furthest row) gets that position.

        Every stored key is re-rotated once, so this is for tests and experiments, not for every step.

        Raises:
            ValueError: ``position`` is smaller than the number of tokens that the cache holds.
        """
        require_int("position", position, min(self.n_seen, self.streaming_config.cache_size + 1))
        distance = position - self.get_seq_length()
        for layer in self.layers:
            layer.move(distance)
        self._changed()
        self.progress.move(distance)

    def crop(self, max_length: int) -> None:
        """Forget the last tokens: as many as the cache has not evicted others for, and one in any case.

        Transformers has changed what it passes from the length that remains to the number of tokens to remove, as a
        negative number or zero. Both are understood: zero removes none, and :meth:`reset` forgets them all.

        Args:
            max_length: positive: so many tokens remain seen; otherwise: its magnitude is the number to forget.

        Raises:
            ValueError: the tokens that would come back into the window have been evicted, or rows are not equally far.
        """
        max_length = int(max_length)  # some versions pass a tensor
        if not self.progress.together:
            raise ValueError("rows that are not equally far cannot be cropped together")
        seen, offset = self.progress.seen[0], self.progress.offset[0]
        length = max_length - offset if max_length > 0 else seen + max_length
        if length >= seen:
            return
        # What the last token overwrote had just left the window, so that one step back is always exact.
        has_evicted = seen - length > 1 and any(seen > layer.layout.capacity for layer in self.layers)
        if length < 0 or has_evicted:
            raise ValueError(
                f"cannot go back from {seen} to {length} tokens: a streaming cache has evicted the tokens "
                "that would be in the window then"
            )
        self.take_back([seen - length] * (self.batch_size or 1))

    def take_back(self, n_tokens: Sequence[int]) -> None:
        """Forget the last ``n_tokens`` of each row; what they had overwritten has to be there again.

        Raises:
            ValueError: the model has recurrent layers, whose state cannot go back.
        """
        if self.recurrent is not None and any(n_tokens):
            raise ValueError("tokens cannot be taken back: the state of the model's recurrent layers has gone on")
        for layer in self.layers:
            layer.put_sinks_back()
        self._changed()
        self.progress.take_back(n_tokens)

    def states_of(self, rows: list[int]) -> Callable[[], None]:
        """Remembers the recurrent states of rows, which a step is not to change; what it returns puts them back."""
        if self.recurrent is None or not rows or not self.n_seen:
            return lambda: None
        before = self.recurrent.value.select(lambda x: x[rows].clone())

        def put_back() -> None:
            self.recurrent.value = self.recurrent.value.with_rows(rows, before, self.batch_size)

        return put_back

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(lambda x: x.index_select(0, beam_idx.to(x.device)), lambda rows: beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(
            lambda x: x.repeat_interleave(repeats, dim=0), lambda rows: [row for row in rows for _ in range(repeats)]
        )

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(lambda x: x[indices.to(x.device)], lambda rows: torch.tensor(list(rows))[indices.cpu()].tolist())

    def take_rows(self, rows: list[int], n_rows: int) -> StreamingKVCache:
        """A cache of copies of these of its ``n_rows`` rows; an empty one, where nothing has been fed."""
        part = copy.copy(self)
        part._forward, part.progress = None, Progress()
        part.layers = [layer.take_rows(rows, part.progress) for layer in self.layers]
        if self.recurrent is not None:
            part.recurrent = RecurrentState()
            part.recurrent.value = self.recurrent.value.select(lambda x: x[rows])
        progress = self.progress.of_rows(n_rows)
        part.progress.set(*zip(*(progress[row] for row in rows), strict=True))
        return part

    def put_rows(self, rows: list[int], part: StreamingKVCache, n_rows: int) -> None:
        """Take over ``part``'s rows as these of ``n_rows``; buffers that fit stay in place."""
        for layer, of_part in zip(self.layers, part.layers, strict=True):
            layer.put_rows(rows, of_part, n_rows)
        if self.recurrent is not None:
            self.recurrent.value = self.recurrent.value.with_rows(rows, part.recurrent.value, n_rows)
        progress = self.progress.of_rows(n_rows)
        for row, of_row in zip(rows, part.progress.of_rows(len(rows)), strict=True):
            progress[row] = of_row
        self._changed()
        self.progress.set(*zip(*progress, strict=True))

    def _select(self, of_tensor: Callable[[Tensor], Tensor], of_rows: Callable[[range], list[int]]) -> None:
        if not self.progress.together:
            n_rows = len(self.progress.seen)
            self.progress.select(of_rows(range(n_rows)), n_rows)
        for layer in self.layers:
            layer.select(of_tensor)
        if self.recurrent is not None:
            self.recurrent.value = self.recurrent.value.select(of_tensor)
        self._changed()
        self.progress.version += 1

    # The token between two calls of generate()

    @property
    def pending(self) -> Tensor | None:
        """Ids ``[batch]`` that the last ``generate`` returned at its end and did not feed; ``None`` if not known.

        Any other use of the cache forgets them.
        """
        version, ids = self._pending
        return ids if version == self.progress.version else None

    def set_pending(self, token_ids: Tensor | None) -> None:
        """Remember ids ``[batch]`` as :attr:`pending`."""
        self._pending = self.progress.version, token_ids

    # Sizes

    @property
    def n_seen(self) -> int:
        """Tokens that have been fed, to the row that has most."""
        return self.progress.n_seen

    @property
    def is_full(self) -> bool:
        """Whether every row holds, in every layer, as many tokens as the next one attends to."""
        return min(self.progress.seen) >= max(layer.layout.config.cache_size for layer in self.layers)

    @property
    def batch_size(self) -> int | None:
        """Rows; ``None`` before the first forward."""
        first = self.layers[0]
        return first.batch_size if first.is_initialized else None

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that are held now (slots allocated ahead not counted)."""
        return sum(
            layer.n_stored * x.shape[0] * x.shape[1] * x.shape[3] * x.element_size()
            for layer in self.layers
            if layer.is_initialized
            for x in (layer.keys, layer.values)
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_moving": None}  # a pickled view would be a tensor of its own
