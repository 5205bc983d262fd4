"""Where generation ends: at a token, by a criterion, or after so many tokens; the host checks once per several tokens.

Rows that have ended are filled with padding, and their streams stay where they ended.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from .engines.base import Engine
from .sampling import Choice, Ending
from .speculative import OverwrittenSlots, most_taken_back

AT_A_TIME = 32
"""Tokens that are generated before the host looks at them, with an engine that runs without it."""

Criterion = Callable[[Tensor, Tensor | None], Tensor | bool]
"""``(ids [batch, n], scores) -> whether to stop``, for each row or for all, as Transformers' criteria."""


def generate_until(
    engine: Engine,
    logits: Tensor,
    max_new_tokens: int,
    choice: Choice,
    ending: Ending,
    criteria: Criterion | None = None,
    streamer: BaseStreamer | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens ``[batch, n]``, until every row has ended or there are enough, and the logits behind each row's end."""
    ids, choice = torch.empty(len(logits), 0, dtype=torch.int64, device=logits.device), replace(choice, ending=ending)
    if streamer is not None:
        streamer.put(torch.empty(1, 0, dtype=torch.int64))  # the prompt's place
    left, most = max_new_tokens, AT_A_TIME if engine.runs_alone else 1
    if criteria is not None:
        most = min(most, most_taken_back(engine.cache))
    while left and bool(ending.active.any()):
        at_a_time = min(left, most)
        # Of a single token nothing is ever taken back.
        overwritten = OverwrittenSlots(engine.cache, at_a_time) if criteria is not None and at_a_time > 1 else None
        before = engine.cache.progress.of_rows(len(logits))
        tokens, logits = engine.generate(logits, at_a_time, choice)
        after = engine.cache.progress.of_rows(len(logits))
        lengths = [now - then for (now, _), (then, _) in zip(after, before, strict=True)]
        if criteria is not None:
            stops = _stops(criteria, torch.cat((ids, tokens), dim=1), tokens.shape[1])
            lengths, logits = _stop(engine, tokens, lengths, stops, logits, ending, overwritten)
        if not ending.active.any():
            tokens = tokens[:, : max(lengths)]
        ids = torch.cat((ids, tokens), dim=1)
        left -= tokens.shape[1]
        if streamer is not None:
            for token in tokens.cpu().unbind(1):
                streamer.put(token)
    if streamer is not None:
        streamer.end()
    return ids, logits


def _stops(criteria: Criterion, ids: Tensor, n_new: int) -> list[int | None]:
    """For each row, after how many of the last ``n_new`` ids a criterion is met first."""
    stops: list[int | None] = [None] * len(ids)
    for n in range(1, n_new + 1):
        met = torch.as_tensor(criteria(ids[:, : ids.shape[1] - n_new + n], None)).expand(len(ids)).tolist()
        stops = [n if now and stop is None else stop for now, stop in zip(met, stops, strict=True)]
        if None not in stops:
            break
    return stops


def _stop(
    engine: Engine,
    tokens: Tensor,
    lengths: list[int],
    stops: list[int | None],
    logits: Tensor,
    ending: Ending,
    overwritten: OverwrittenSlots | None,
) -> tuple[list[int], Tensor]:
    """Take back what rows were fed behind their stops; gives their lengths, and the logits at their ends."""
    ends = [length if stop is None else min(stop, length) for stop, length in zip(stops, lengths, strict=True)]
    ending.active &= torch.tensor([stop is None for stop in stops], device=tokens.device)
    too_far = [end < length for end, length in zip(ends, lengths, strict=True)]
    if overwritten is not None and any(too_far):
        # The last token that stays goes in again, for the logits behind it.
        back = [length - end + 1 if far else 0 for length, end, far in zip(lengths, ends, too_far, strict=True)]
        overwritten.take_back(engine.cache, back)
        last = torch.tensor([max(end - 1, 0) for end in ends], device=tokens.device)[:, None]
        again = engine.step(tokens.gather(1, last)[:, 0])
        engine.cache.progress.take_back([int(not far) for far in too_far])
        logits = torch.where(torch.tensor(too_far, device=logits.device)[:, None], again, logits)
        places = torch.arange(tokens.shape[1], device=tokens.device)
        tokens.masked_fill_(places >= torch.tensor(ends, device=tokens.device)[:, None], ending.pad_token_id)
    return ends, logits
