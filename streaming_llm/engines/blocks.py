"""How blocks of tokens go through a model: its own call, or the fused forward of its family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..config import require_int
from ..families import decoder_of, transformers_model
from ..fused import fused_blocks
from ..kv_cache import StreamingKVCache
from ..placement import input_device

BLOCK_ENGINES = ("eager", "fused")
"""The plain model call, and this library's kernels."""

BlockForward = Callable[[Tensor, StreamingKVCache], Tensor]
"""``(input_ids [batch, length], cache) -> final hidden states [batch, length, hidden]``."""


def block_forward(model: nn.Module, engine: str) -> BlockForward:
    """The forward of an attached model for blocks of any length.

    Args:
        engine: one of ``BLOCK_ENGINES``.

    Raises:
        ValueError: fused where it cannot run; says why.
    """
    model = transformers_model(model)
    if engine == "fused":
        return fused_blocks(model)

    decoder = decoder_of(model)

    def eager(tokens: Tensor, cache: StreamingKVCache) -> Tensor:
        name = "input_ids" if tokens.dim() == 2 else "inputs_embeds"
        return decoder(**{name: tokens}, past_key_values=cache, use_cache=True).last_hidden_state

    return eager


def default_block_size(window_size: int, model: Any) -> int:
    """Tokens to process at a time: enough to keep the device busy, a multiple of the window where that is larger."""
    hidden = model.get_input_embeddings().weight.shape[1]
    least = max(16384, (1 << 24) // hidden) if input_device(model).type == "cuda" else 512
    return max(1, -(-least // window_size)) * window_size


def cut(tokens: Tensor, cache: StreamingKVCache, block_size: int) -> tuple[Tensor, ...]:
    """Tokens ``[batch, length]`` in blocks that the model takes.

    Where recurrent layers take no block after others, all go in at once at the beginning, and later one by one.
    """
    if cache.family.blocks_continue:
        return tokens.split(block_size, dim=1)
    return tokens.split(1, dim=1) if cache.n_seen else (tokens,)


@torch.no_grad()
def feed(
    model: nn.Module,
    cache: StreamingKVCache,
    tokens: Tensor,
    block_size: int | None = None,
    forward: BlockForward | None = None,
) -> Tensor:
    """Run tokens through an attached model block by block.

    Args:
        tokens: ids ``[batch, length >= 1]``, or embeddings ``[batch, length, hidden]``.
        block_size: tokens at a time; chosen for model and device when ``None``.
        forward: how a block runs; the plain model call if not given.

    Returns:
        The final hidden state of the last token, ``[batch, 1, hidden]``.
    """
    if block_size is None:
        block_size = default_block_size(cache.streaming_config.window_size, model)
    require_int("block_size", block_size, 1)
    forward = block_forward(model, "eager") if forward is None else forward
    for block in cut(tokens.to(input_device(model)), cache, block_size):
        hidden = forward(block, cache)
    return hidden[:, -1:]
