"""What an engine records: one step, from static ids to static logits, and the tensors that it reads and writes."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ..attention.kernel_choice import takes_mask
from ..kv_cache import StreamingKVCache
from ..sampling import Ending

CHUNK = 1024
"""Tokens of a stream that a graph reads or writes without the host."""

MAX_EOS = 16
"""Tokens that may end a row in a recorded step."""


class StaticTensors:
    """Inputs and outputs of a recorded step, in tensors that stay where they are.

    Attributes:
        tokens: ids to feed, ``[batch]``.
        logits: of the last token, ``[batch, vocab]``.
        chunk: ids ``[batch, CHUNK]`` that are given to score, or were generated.
        losses: ``[batch, CHUNK]``, float32 or better.
        index: int64 ``[1]``, the place in the chunk.
        ending: when rows end; of no effect where it is not recorded.
    """

    def __init__(self, batch: int, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self.logits = torch.zeros(batch, vocab, dtype=dtype, device=device)
        self.chunk = torch.zeros(batch, CHUNK, dtype=torch.int64, device=device)
        self.losses = torch.zeros(batch, CHUNK, dtype=torch.promote_types(dtype, torch.float32), device=device)
        self.index = torch.zeros(1, dtype=torch.int64, device=device)
        eos = torch.full((MAX_EOS,), -1, dtype=torch.int64, device=device)
        pad = torch.zeros(1, dtype=torch.int64, device=device)
        self.ending = Ending(eos, pad, torch.ones(batch, dtype=torch.bool, device=device))

    def start(self, logits: Tensor) -> None:
        """Begin a chunk after these logits."""
        self.logits.copy_(logits)
        self.index.zero_()

    def next_of_chunk(self) -> Tensor:
        """The ids at the place in the chunk, ``[batch]``."""
        return self.chunk.index_select(1, self.index).squeeze(1)


class RecordedStep(ABC):
    """One step from static token ids to static logits, with all that depends on the position on the device.

    Args:
        model: attached.
        cache: with every slot allocated.
        static: where ids are read and logits written.

    Attributes:
        seen: tokens that each row has been fed, int64 ``[batch]``, on the device: read and advanced by :meth:`run`.
        masked: whether slots without a token are masked: until the cache is full, in a form of the step that is
            recorded by itself. :meth:`load` sets it.
    """

    seen: Tensor
    masked = False

    @staticmethod
    def fills(model: nn.Module) -> bool:
        """Whether it runs on a cache that is not full, with the attention kernels that are allowed now."""
        return takes_mask(model)

    @abstractmethod
    def __init__(self, model: nn.Module, cache: StreamingKVCache, static: StaticTensors) -> None: ...

    @abstractmethod
    def load(self) -> None:
        """Take over the stream from the cache, as the host knows it."""

    @abstractmethod
    def run(self) -> None:
        """Feed the static ids, write the static logits, and advance the counters on the device."""
