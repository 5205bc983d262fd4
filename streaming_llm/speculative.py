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
        cache: the cache about to be fed; a single stream.
        n_tokens: length of the block.

    Raises:
        ValueError: the block is so long that it overwrites tokens of its own.
    """

    def __init__(self, cache: StreamingKVCache, n_tokens: int) -> None:
        self.start = cache.progress.seen[0]
        self.end = self.start + n_tokens
        self._kept: list[list[tuple[Segment, Tensor, Tensor]]] = []  # per layer: keys and values of runs of slots
        for layer in cache.layers:
            kept = []
            if self.end > layer.layout.capacity and layer.is_initialized:  # else nothing is overwritten
                window_size = layer.layout.config.window_size
                if n_tokens > window_size + 1:
                    raise ValueError(
                        f"{n_tokens} drafted tokens at once cannot be taken back from a window of {window_size}: "
                        "draft fewer (num_assistant_tokens, prompt_lookup_num_tokens)"
                    )
                layer.reserve(layer.layout.capacity)
                for run in layer.layout.segments(range(self.start, self.end)):
                    slots = slice(run.slot, run.slot + run.length)
                    kept.append((run, layer.keys[:, :, slots].clone(), layer.values[:, :, slots].clone()))
            self._kept.append(kept)

    def take_back(self, cache: StreamingKVCache, n_tokens: int) -> None:
        """Forget the last ``n_tokens`` of the block.

        Raises:
            ValueError: they are more than the block, or others have been fed since.
        """
        n_seen = cache.progress.seen[0]
        if all(n_seen <= layer.layout.capacity for layer in cache.layers):
            cache.crop(-n_tokens)
            return
        if n_seen != self.end or n_tokens > self.end - self.start or not any(self._kept):
            raise ValueError(f"cannot take back {n_tokens} of {n_seen} tokens: the ones evicted for them are gone")
        for layer, kept in zip(cache.layers, self._kept, strict=True):
            for run, keys, values in kept:
                skipped = max(0, n_seen - n_tokens - run.token)  # those that stay
                if skipped < run.length:
                    target = slice(run.slot + skipped, run.slot + run.length)
                    layer.keys[:, :, target] = keys[:, :, skipped:]
                    layer.values[:, :, target] = values[:, :, skipped:]
        cache.take_back_to(n_seen - n_tokens)
