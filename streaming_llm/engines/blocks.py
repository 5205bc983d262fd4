"""How prompts go through a model: block by block, by its own call or the fused forward of its family.

Rows of unequal length are streams of their own, fed together with those of their length.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import require_int
from ..families import decoder_of, transformers_model
from ..fused import fused_blocks
from ..kv_cache import StreamingKVCache
from ..placement import input_device

BlockForward = Callable[[Tensor, StreamingKVCache], Tensor]
"""``(input_ids [batch, length], cache) -> final hidden states [batch, length, hidden]``."""


def block_forward(model: nn.Module, engine: str) -> BlockForward:
    """The forward of an attached model for blocks of any length.

    Args:
        engine: ``eager`` (the plain model call), ``fused`` (this library's kernels, but for attention) or
            ``fused-triton`` (all of them).

    Raises:
        ValueError: fused where it cannot run; says why.
    """
    model = transformers_model(model)
    if engine.startswith("fused"):
        return fused_blocks(model, own_attention=engine == "fused-triton")

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


def rows_of(tokens: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
    """The tokens of each row without their padding.

    Args:
        tokens: ids ``[batch, length]``, or embeddings ``[batch, length, hidden]``.
        attention_mask: ``[batch, length]``, 0 at padding; left or right.

    Raises:
        TypeError: they are no tensor.
        ValueError: ids of another shape, a mask of another, or a row without a token.
    """
    if not isinstance(tokens, Tensor):
        raise TypeError(f"input_ids must be a tensor [batch, length], as tokenizers give, got {type(tokens).__name__}")
    if tokens.dim() not in (2, 3) or not tokens.numel():
        raise ValueError(f"input_ids must be [batch, length >= 1], got {list(tokens.shape)}")
    if attention_mask is None:
        return list(tokens)
    if attention_mask.shape != tokens.shape[:2]:
        raise ValueError(
            f"attention_mask is {list(attention_mask.shape)}, and the tokens are {list(tokens.shape[:2])}"
        )
    rows = [row[keep] for row, keep in zip(tokens, attention_mask.bool().to(tokens.device), strict=True)]
    empty = [index for index, row in enumerate(rows) if not len(row)]
    if empty:
        raise ValueError(f"attention_mask hides every token of row {empty[0]}")
    return rows


def alike(kinds: Iterable[Hashable]) -> list[list[int]]:
    """Places of those that are equal, together."""
    found: dict[Hashable, list[int]] = {}
    for index, kind in enumerate(kinds):
        found.setdefault(kind, []).append(index)
    return list(found.values())


@torch.no_grad()
def feed_rows(
    model: nn.Module,
    cache: StreamingKVCache,
    rows: Sequence[Tensor],
    forward: BlockForward,
    block_size: int | None = None,
) -> Tensor:
    """Feed each row its own tokens, those of a length together, through an attached model block by block.

    Where recurrent layers take no block after others, all goes in at once at the beginning, and later one by one.

    Args:
        rows: ids ``[n]``, or embeddings ``[n, hidden]``, for each row of the cache; not all of them empty.
        forward: how a block runs.
        block_size: tokens at a time; chosen for model and device when ``None``.

    Returns:
        The final hidden state of each row's last token, ``[batch, 1, hidden]``; rows that are fed nothing have none.
    """
    if block_size is None:
        block_size = default_block_size(cache.streaming_config.window_size, model)
    require_int("block_size", block_size, 1)
    cache.require_rows(len(rows))
    n_rows, progress = len(rows), cache.progress.of_rows(len(rows))
    hidden: dict[int, Tensor] = {}
    for group in alike((len(row), *of_row) for row, of_row in zip(rows, progress, strict=True)):
        if not len(rows[group[0]]):  # few models take a block without a token
            continue
        part = cache if len(group) == n_rows else cache.take_rows(group, n_rows)
        tokens = torch.stack([rows[index] for index in group]).to(input_device(model))
        whole_or_single = 1 if part.n_seen else tokens.shape[1]
        for block in tokens.split(block_size if cache.family.blocks_continue else whole_or_single, dim=1):
            states = forward(block, part)
        if part is not cache:
            cache.put_rows(group, part, n_rows)
        hidden.update(zip(group, states[:, -1:], strict=True))
    return torch.stack([hidden[index] for index in sorted(hidden)])
