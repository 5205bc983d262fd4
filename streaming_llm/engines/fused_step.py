"""A recorded step of this library's kernels."""

from __future__ import annotations

from torch import nn

from ..fused import fused_step
from ..kv_cache import StreamingKVCache
from .recorded_step import RecordedStep, StaticTensors


class FusedStep(RecordedStep):
    """The fused kernels, with the SDPA kernel that is allowed; on a cache that is not full, one that takes a mask."""

    own_attention = False

    def __init__(self, model: nn.Module, cache: StreamingKVCache, static: StaticTensors) -> None:
        self._static = static
        self._forward = fused_step(model, cache, own_attention=self.own_attention, logits=static.logits)
        self.seen = self._forward.rings.seen

    def load(self) -> None:
        self._forward.load()
        self.masked = self._forward.masked

    def run(self) -> None:
        self._forward(self._static.tokens)


class FusedTritonStep(FusedStep):
    """The same with this library's attention kernel, on a cache filled to any degree."""

    own_attention = True

    @staticmethod
    def fills(model: nn.Module) -> bool:
        return True
