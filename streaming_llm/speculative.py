"""Taking back tokens: what they overwrite in the ring is kept until they are known to stay.

Assisted decoding feeds a draft, and crops the cache to the tokens that were right; a criterion is looked at after some
tokens more have been generated. A ring has overwritten its oldest tokens by then.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .kv_cache import StreamingKVCache


def most_taken_back(cache: StreamingKVCache) -> int:
    """How many tokens at once overwrite none of their own, and so can be taken back."""
    if cache.recurrent is not None:
        return 1
    return min(layer.layout.config.window_size for layer in cache.layers) + 1


class OverwrittenSlots:
    """The slots of the next tokens of every row as they were before these, in every layer.

    Args:
        cache: the cache about to be fed.
        n_tokens: how many.

    Raises:
        ValueError: they are so many that they overwrite tokens of their own.
    """

    def __init__(self, cache: StreamingKVCache, n_tokens: int) -> None:
        self._n_tokens, self._taken_back = n_tokens, cache.progress.taken_back
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []  # per layer: slots, keys, values
        self._start = [0]
        if cache.batch_size is None or not cache.n_seen:
            return  # what is held goes back to nothing
        progress = cache.progress.of_rows(cache.batch_size)
        self._start = [seen for seen, _ in progress]
        rows = torch.arange(cache.batch_size)[:, None]
        for layer in cache.layers:
            window_size, capacity = layer.layout.config.window_size, layer.layout.capacity
            end = cache.n_seen + n_tokens
            if n_tokens > window_size + 1 and end > capacity:
                raise ValueError(
                    f"{n_tokens} drafted tokens at once cannot be taken back from a window of {window_size}: "
                    "draft fewer (num_assistant_tokens, prompt_lookup_num_tokens)"
                )
            layer.reserve(min(end, capacity))
            places = [[layer.layout.slot(seen + i) for i in range(n_tokens)] for seen, _ in progress]
            slots = torch.tensor(places, device=layer.device)
            at = rows.to(layer.device), slice(None), slots
            self._kept.append((slots, layer.keys[at], layer.values[at]))

    def take_back(self, cache: StreamingKVCache, n_tokens: Sequence[int]) -> None:
        """Forget the last ``n_tokens`` of each row.

        Raises:
            ValueError: they are more than were fed, or others have been fed since.
        """
        if not self._kept:
            cache.crop(-n_tokens[0])
            return
        fed = [
            seen - start for (seen, _), start in zip(cache.progress.of_rows(len(n_tokens)), self._start, strict=True)
        ]
        if max(fed) > self._n_tokens or any(n > of_row for n, of_row in zip(n_tokens, fed, strict=True)):
            raise ValueError(f"cannot take back {max(n_tokens)} tokens: the ones evicted for them are gone")
        # Also what a row that has ended overwrote with padding, behind the tokens that it was fed.
        pairs = [(row, i) for row, n in enumerate(n_tokens) for i in range(fed[row] - n, self._n_tokens)]
        rows, places = zip(*pairs, strict=True)
        for layer, (slots, keys, values) in zip(cache.layers, self._kept, strict=True):
            at = torch.tensor(rows, device=slots.device), torch.tensor(places, device=slots.device)
            layer.keys[at[0], :, slots[at]] = keys[at]
            layer.values[at[0], :, slots[at]] = values[at]
        cache.take_back(n_tokens)
        cache.progress.taken_back = self._taken_back  # their slots are as they were
