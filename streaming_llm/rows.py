"""Rows of unequal length: each is a stream of its own, fed block by block together with those of its length."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

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
        ValueError: ids of another shape, a mask of another, or a row without a token.
    """
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


def feed_rows(
    model: nn.Module,
    cache: StreamingKVCache,
    rows: Sequence[Tensor],
    block_size: int | None = None,
    forward: BlockForward | None = None,
) -> Tensor:
    """Feed each row its own tokens; see :func:`streaming_llm.engines.blocks.feed`.

    Args:
        rows: ids ``[n]``, or embeddings ``[n, hidden]``, for each row of the cache; not all of them empty.

    Returns:
        The final hidden state of each row's last token, ``[batch, 1, hidden]``; rows that are fed nothing have none.
    """
    n_rows, progress = len(rows), cache.progress.of_rows(len(rows))
    groups = alike([(len(row), *of_row) for row, of_row in zip(rows, progress, strict=True)])
    groups = [group for group in groups if len(rows[group[0]])]  # few models take a block without a token
    if len(groups[0]) == n_rows:
        return feed(model, cache, torch.stack(list(rows)), block_size, forward)
    hidden: dict[int, Tensor] = {}
    for group in groups:
        part = cache.take_rows(group, n_rows)
        last = feed(model, part, torch.stack([rows[index] for index in group]), block_size, forward)
        cache.put_rows(group, part, n_rows)
        for index, state in zip(group, last, strict=True):
            hidden[index] = state
    return torch.stack([hidden[index] for index in sorted(hidden)])
