"""Rows of unequal length: each is a stream of its own, fed block by block with those that are as long."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .engines.blocks import BlockForward, feed
from .kv_cache import StreamingKVCache


def rows_of(tokens: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
    """The tokens of each row without their padding.

    Args:
        tokens: ids ``[batch, length]``, or embeddings ``[batch, length, hidden]``.
        attention_mask: ``[batch, length]``, 0 at padding; left or right.

    Raises:
        ValueError: a mask of another shape, or a row without a token.
    """
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


def feed_rows(
    model: nn.Module,
    cache: StreamingKVCache,
    rows: Sequence[Tensor],
    block_size: int | None = None,
    forward: BlockForward | None = None,
) -> Tensor:
    """Feed each row its own tokens; see :func:`streaming_llm.engines.blocks.feed`.

    Args:
        rows: ids ``[n]``, or embeddings ``[n, hidden]``, for each row of the cache.

    Returns:
        The final hidden state of each row's last token, ``[batch, 1, hidden]``.
    """
    n_rows, progress = len(rows), cache.progress.of_rows(len(rows))
    alike: dict[tuple, list[int]] = {}
    for index, row in enumerate(rows):
        alike.setdefault((len(row), *progress[index]), []).append(index)
    if len(alike) == 1:
        return feed(model, cache, torch.stack(list(rows)), block_size, forward)
    hidden: list[Tensor | None] = [None] * n_rows
    for group in alike.values():
        part = cache.take_rows(group, n_rows)
        last = feed(model, part, torch.stack([rows[index] for index in group]), block_size, forward)
        cache.put_rows(group, part, n_rows)
        for index, state in zip(group, last, strict=True):
            hidden[index] = state
    return torch.stack(hidden)
