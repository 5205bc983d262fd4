"""Taking back drafted tokens: what a block overwrites in the ring is kept until the block is known to stay.

Assisted decoding feeds a draft, and crops the cache to the tokens that were right. A ring has overwritten its oldest
tokens by then.
"""

from __future__ import annotations

from torch import Tensor

from .kv_cache import StreamingKVCache
from .positions import Segment


class OverwrittenSlots:
    """The slots of the latest block of tokens as they were before it, in every layer.

    Args:
        cache: the cache about to be fed.
        n_tokens: length of the block.

    Raises:
        ValueError: the block is so long that it overwrites tokens of its own.
    """

    def __init__(self, cache: StreamingKVCache, n_tokens: int) -> None:
        first = cache.layers[0]
        window_size = cache.streaming_config.window_size
        self.start, self.end = first.n_seen, first.n_seen + n_tokens
        self._kept: list[list[tuple[Segment, Tensor, Tensor]]] = []  # per layer: keys and values of runs of slots
        if not first.is_initialized or self.end <= first.layout.capacity:
            return  # nothing is overwritten, or what is held goes back to nothing
        if n_tokens > window_size + 1:
            raise ValueError(
                f"{n_tokens} drafted tokens at once cannot be taken back from a window of {window_size}: draft fewer "
                "(num_assistant_tokens, prompt_lookup_num_tokens)"
            )
        for layer in cache.layers:
            layer.reserve(layer.layout.capacity)
            kept = []
            for run in layer.layout.segments(range(self.start, self.end)):
                slots = slice(run.slot, run.slot + run.length)
                kept.append((run, layer.keys[:, :, slots].clone(), layer.values[:, :, slots].clone()))
            self._kept.append(kept)

    def take_back(self, cache: StreamingKVCache, n_tokens: int) -> None:
        """Forget the last ``n_tokens`` of the block.

        Raises:
            ValueError: they are more than the block, or others have been fed since.
        """
        n_seen = cache.layers[0].n_seen
        if n_seen <= cache.layers[0].layout.capacity:
            cache.crop(-n_tokens)
            return
        if n_seen != self.end or n_tokens > self.end - self.start or not self._kept:
            raise ValueError(f"cannot take back {n_tokens} of {n_seen} tokens: the ones evicted for them are gone")
        for layer, kept in zip(cache.layers, self._kept, strict=True):
            for run, keys, values in kept:
                skipped = max(0, n_seen - n_tokens - run.token)  # those that stay
                if skipped < run.length:
                    target = slice(run.slot + skipped, run.slot + run.length)
                    layer.keys[:, :, target] = keys[:, :, skipped:]
                    layer.values[:, :, target] = values[:, :, skipped:]
            layer.n_seen = n_seen - n_tokens
