"""What a cache does with its stream between forwards: how large it is, moved, taken back, its rows chosen."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .cache_forward import BROKEN, CacheForward
from .cache_layer import StreamingLayer
from .config import StreamingConfig, require_int
from .families import Family
from .positions import Progress
from .recurrent import RecurrentState
from .sinks import MovingSinks


class CachedStream(Cache):
    """The stream of a :class:`~streaming_llm.StreamingKVCache` as a whole.

    Args:
        layers: of the cache, all with ``progress``.
        streaming_config: sinks and window.
        progress: how far the streams are.
        family: what is known of the model's family.
    """

    layers: list[StreamingLayer]  # type: ignore[assignment]

    def __init__(
        self, layers: list[StreamingLayer], streaming_config: StreamingConfig, progress: Progress, family: Family
    ) -> None:
        super().__init__(layers=layers)  # type: ignore[arg-type]
        self.streaming_config, self.progress, self.family = streaming_config, progress, family
        self.recurrent = RecurrentState() if family.has_state else None
        self._forward: CacheForward | None = None
        self._moving: list[MovingSinks] | None = None  # derived from the layers' tensors; None once these have changed
        self._pending: tuple[int, Tensor | None] = (0, None)  # the progress's version, and ids

    # Sizes

    @property
    def n_seen(self) -> int:
        """Tokens that have been fed, to the row that has most."""
        return self.progress.n_seen

    @property
    def n_until_full(self) -> int:
        """Tokens until every row holds, in every layer, as many as the next one attends to."""
        return max(0, max(layer.layout.config.cache_size for layer in self.layers) - min(self.progress.seen))

    @property
    def is_full(self) -> bool:
        """Whether no row holds, in any layer, fewer tokens than the next one attends to at most."""
        return self.n_until_full == 0

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

    @property
    def is_broken(self) -> bool:
        """Whether a forward is half done: its layers hold different tokens."""
        forward = self._forward
        return forward is not None and (forward.layers_done > 0 or forward.state_changes)

    def require_whole(self) -> None:
        """Raise ``RuntimeError`` where a forward ended before its last layer."""
        if self.is_broken:
            raise RuntimeError(BROKEN)

    def require_rows(self, n_rows: int) -> None:
        """Raise ``ValueError`` where the cache holds other than ``n_rows`` streams."""
        if self.n_seen and self.batch_size != n_rows:
            raise ValueError(
                f"this cache holds {self.batch_size} streams and was given tokens of {n_rows}: use a new cache, "
                "reset(), batch_select_indices() or batch_repeat_interleave()"
            )

    @property
    def _running(self) -> CacheForward:
        """The forward that has begun; ``RuntimeError`` where there is none."""
        if self._forward is None:
            raise RuntimeError(BROKEN)
        return self._forward

    # Changed as a whole

    def clear_empty_slots(self) -> None:
        """Zero the slots that hold no token, of all that are allocated: an earlier stream may have left anything."""
        for layer in self.layers:
            seen = torch.tensor(self.progress.seen, device=layer.device)
            empty = (torch.arange(layer.keys.shape[2], device=layer.device) >= seen[:, None])[:, None, :, None]
            for stored in (layer.keys, layer.values):
                stored.masked_fill_(empty, 0.0)
            layer.sinks.masked_fill_(empty[:, :, : layer.sinks.shape[2]], 0.0)

    def reset(self) -> None:
        """Forget the streams; the tensors stay allocated."""
        self.forget_derived()
        if self.recurrent is not None:
            self.recurrent = RecurrentState()
        self.progress.set((0,), (0,))

    def forget_derived(self) -> None:
        """Forget what was derived from the tensors or their places."""
        self._forward = self._moving = None

    def move_to(self, position: int) -> None:
        """Go on as if ``position`` tokens had been seen: the next token (of the furthest row) gets that position.

        Every stored key is re-rotated once, so this is for tests and experiments, not for every step.

        Raises:
            ValueError: ``position`` is smaller than the number of tokens that the cache holds.
        """
        self.require_whole()
        require_int("position", position, min(self.n_seen, self.streaming_config.cache_size + 1))
        distance = position - self.progress.position
        for layer in self.layers:
            layer.move(distance)
        self.forget_derived()
        self.progress.move(distance)

    def crop(self, max_length: int) -> None:
        """Forget the last tokens: as many as the cache has not evicted others for, and the last that was fed.

        Transformers has changed what it passes from the length that remains to the number of tokens to remove, as a
        negative number or zero. Both are understood: zero removes none, and :meth:`reset` forgets them all.

        Args:
            max_length: positive: so many tokens remain seen; otherwise: its magnitude is the number to forget.

        Raises:
            ValueError: the tokens that would come back into the window have been evicted, or rows are not equally far.
        """
        self.require_whole()
        max_length = int(max_length)  # some versions pass a tensor
        if not self.progress.together:
            raise ValueError("rows that are not equally far cannot be cropped together")
        seen, offset = self.progress.seen[0], self.progress.offset[0]
        length = max_length - offset if max_length > 0 else seen + max_length
        if length >= seen:
            return
        # What the last token overwrote had just left the window, so that one step back is always exact, and no more.
        written = seen + self.progress.taken_back
        has_evicted = written - length > 1 and any(written > layer.layout.capacity for layer in self.layers)
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
        self.forget_derived()
        self.progress.take_back(n_tokens)

    def states_of(self, rows: list[int]) -> Callable[[], None]:
        """Remembers the recurrent states of rows, which a step is not to change; what it returns puts them back."""
        recurrent = self.recurrent
        if recurrent is None or not rows or not self.n_seen:
            return lambda: None
        before = recurrent.value.select(lambda x: x[rows].clone())

        def put_back() -> None:
            recurrent.value = recurrent.value.with_rows(rows, before, self.layers[0].batch_size)

        return put_back

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(lambda x: x[indices.to(x.device)])

    def take_rows(self, rows: list[int], n_rows: int) -> Self:
        """A cache of copies of these of its ``n_rows`` rows; an empty one, where nothing has been fed."""
        self.require_whole()
        part = copy.copy(self)
        part.progress = copy.copy(self.progress)
        part.progress.select(rows, n_rows)
        part.forget_derived()
        part.layers = [layer.take_rows(rows, part.progress) for layer in self.layers]
        if self.recurrent is not None:
            part.recurrent = RecurrentState()
            part.recurrent.value = self.recurrent.value.select(lambda x: x[rows])
        return part

    def put_rows(self, rows: list[int], part: Self, n_rows: int) -> None:
        """Take over ``part``'s rows as these of ``n_rows``; buffers that fit stay in place."""
        for layer, of_part in zip(self.layers, part.layers, strict=True):
            layer.put_rows(rows, of_part, n_rows)
        if self.recurrent is not None and part.recurrent is not None:
            self.recurrent.value = self.recurrent.value.with_rows(rows, part.recurrent.value, n_rows)
        progress = self.progress.of_rows(n_rows)
        for row, of_row in zip(rows, part.progress.of_rows(len(rows)), strict=True):
            progress[row] = of_row
        self.forget_derived()
        self.progress.set(*zip(*progress, strict=True))

    def _select(self, select: Callable[[Tensor], Tensor]) -> None:
        """Rows that ``select`` takes of a tensor's first dimension."""
        self.require_whole()
        if not self.progress.together:
            n_rows = len(self.progress.seen)
            self.progress.select(select(torch.arange(n_rows)).tolist(), n_rows)
        for layer in self.layers:
            layer.select(select)
        if self.recurrent is not None:
            self.recurrent.value = self.recurrent.value.select(select)
        self.forget_derived()
        self.progress.version += 1

    def become(self, other: CachedStream) -> None:
        """Be ``other`` under a second name: what is done to one of the two is done to both."""
        self.__dict__ = other.__dict__

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
