"""How blocks of tokens go through a model: its own call, or the fused forward of its family."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from .families import decoder_of, rotary_from_model
from .fused import require_fused, why_not_fused
from .inner_model import transformers_model
from .kv_cache import StreamingKVCache

BLOCK_ENGINES = ("eager", "fused")

BlockForward = Callable[[Tensor, StreamingKVCache], Tensor]
"""``(input_ids [batch, length], cache) -> final hidden states [batch, length, hidden]``."""


def resolve_block_engine(model: nn.Module, engine: str = "auto") -> str:
    """What ``engine`` means for blocks of this model: ``eager`` (the plain model call) or ``fused``.

    Args:
        engine: one of these, or ``auto``: fused where it runs.

    Raises:
        ValueError: unknown engine, or fused where it cannot run; says why.
    """
    if engine == "auto":
        return "eager" if why_not_fused(model) else "fused"
    if engine not in BLOCK_ENGINES:
        raise ValueError(f"engine must be one of {', '.join(BLOCK_ENGINES)} or auto, got {engine!r}")
    if engine == "fused":
        require_fused(model)
    return engine


def block_forward(model: nn.Module, engine: str = "auto") -> BlockForward:
    """The forward of an attached model for blocks of any length; see :func:`resolve_block_engine`."""
    if resolve_block_engine(model, engine) == "fused":
        return require_fused(model).BlockForward(model, rotary_from_model(model))

    decoder = decoder_of(transformers_model(model))

    def eager(input_ids: Tensor, cache: StreamingKVCache) -> Tensor:
        return decoder(input_ids=input_ids, past_key_values=cache, use_cache=True).last_hidden_state

    return eager
