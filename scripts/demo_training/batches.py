"""Which tokens a training step sees: a pure function of seed and step, so that resuming changes nothing."""

from __future__ import annotations

import numpy as np
import torch

from .byte_bpe import END_OF_TEXT_ID


class Batches:
    """Batches of sequences, each `<|endoftext|>` followed by `context_length - 1` tokens of one document.

    Without that first token in training no attention sink forms (section 3.3 of the StreamingLLM paper). In
    every epoch each document is cut into windows anew, from a random offset, and the windows of all documents
    are shuffled.

    Args:
        ids: token ids of all documents, one after the other, uint16 `[tokens]`.
        lengths: tokens of each document, int64 `[documents]`; those too short for one window are left out.
        device: where batches are put together; the ids are kept there as int32.
    """

    def __init__(
        self,
        ids: np.ndarray,
        lengths: np.ndarray,
        *,
        context_length: int,
        batch_size: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.width = context_length - 1
        self.batch_size = batch_size
        self.seed = seed
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        usable = lengths >= self.width
        # One window fewer than would fit, so that the first can begin anywhere in the first `width` tokens.
        counts = np.where(usable, np.maximum(lengths // self.width - 1, 1), 0)
        self.windows_per_epoch = int(counts.sum())
        if self.windows_per_epoch == 0:
            raise ValueError(
                f"the text is too small: no document has {self.width} tokens (the longest has "
                f"{lengths.max()}), which a training sequence of --context-length {context_length} needs"
            )
        self._slack = (lengths - counts * self.width).clip(max=self.width - 1)
        self._document = np.repeat(np.arange(len(lengths)), counts)
        first = np.repeat(np.cumsum(counts) - counts, counts)
        self._base = starts[self._document] + (np.arange(self.windows_per_epoch) - first) * self.width
        self._tokens = torch.from_numpy(ids.astype(np.int32)).to(device)
        self._offsets = torch.arange(self.width, device=device)
        self._orders: dict[int, torch.Tensor] = {}

    def epochs(self, steps: int) -> float:
        """How often `steps` steps go through the text."""
        return steps * self.batch_size / self.windows_per_epoch

    def batch(self, step: int) -> torch.Tensor:
        """Token ids of step `step` (0-based), int64 `[batch_size, context_length]`."""
        begin = step * self.batch_size
        parts, taken = [], 0
        while taken < self.batch_size:  # a batch may end one epoch and begin the next
            epoch, at = divmod(begin + taken, self.windows_per_epoch)
            part = self._order(epoch)[at : at + self.batch_size - taken]
            parts.append(part)
            taken += len(part)
        windows = self._tokens[torch.cat(parts)[:, None] + self._offsets]  # [batch_size, context_length - 1]
        return torch.nn.functional.pad(windows.long(), (1, 0), value=END_OF_TEXT_ID)

    def _order(self, epoch: int) -> torch.Tensor:
        """First token of every window of an epoch, shuffled, int64 `[windows_per_epoch]`."""
        if epoch not in self._orders:
            random = np.random.default_rng([self.seed, epoch])
            phase = random.integers(0, self._slack + 1)  # one per document
            order = random.permutation(self._base + phase[self._document])
            kept = {epoch - 1: self._orders[epoch - 1]} if epoch - 1 in self._orders else {}
            self._orders = {**kept, epoch: torch.from_numpy(order).to(self._offsets.device)}
        return self._orders[epoch]
