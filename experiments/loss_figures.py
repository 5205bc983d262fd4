"""From losses to what is written down: perplexity overall, by position, by tenths, and of a fresh tail.

A loss is that of a token of the stream, numbered from 0; ranges of tokens are half-open. Sums are in float64.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

EQUAL_BINS = 50
LOG_BINS_PER_OCTAVE = 2


def perplexity_of(mean_nll: float) -> float | None:
    """exp of a mean loss in nats; None where that is beyond a float's range."""
    return math.exp(mean_nll) if mean_nll < 700 else None


def summary(losses: np.ndarray) -> dict[str, Any]:
    """Number, mean and perplexity of losses ``[n]``, n >= 1."""
    mean = float(losses.mean(dtype=np.float64))
    return {"tokens": len(losses), "mean_nll": mean, "perplexity": perplexity_of(mean)}


def log_edges(num_tokens: int) -> list[int]:
    """Edges of ranges of tokens 1 .. num_tokens - 1, two to an octave as far as integers allow."""
    steps = range(LOG_BINS_PER_OCTAVE * num_tokens.bit_length() + 1)
    inner = {round(2 ** (step / LOG_BINS_PER_OCTAVE)) for step in steps}
    return [*sorted(edge for edge in inner if edge < num_tokens), num_tokens]


def equal_edges(num_tokens: int, bins: int) -> list[int]:
    """Edges of `bins` ranges of tokens 1 .. num_tokens - 1, of equal width to one token (fewer for few tokens)."""
    bins = min(bins, num_tokens - 1)
    return [1 + (num_tokens - 1) * i // bins for i in range(bins + 1)]


def curve(losses: np.ndarray, edges: list[int]) -> list[dict[str, Any]]:
    """Losses by position: for each range of tokens its summary and the running perplexity at its end.

    Args:
        losses: of tokens 1, 2, ...: ``[num_tokens - 1]``.
    """
    rows, total = [], 0.0
    for start, stop in itertools.pairwise(edges):
        row = summary(losses[start - 1 : stop - 1])
        total += row["mean_nll"] * row["tokens"]
        rows.append({"start": start, "stop": stop, **row, "running_perplexity": perplexity_of(total / (stop - 1))})
    return rows


def stream_figures(losses: np.ndarray) -> dict[str, Any]:
    """All figures of a stream, from the losses of tokens 1, 2, ...."""
    num_tokens, total = len(losses) + 1, summary(losses)
    curves = {"log": log_edges(num_tokens), "equal": equal_edges(num_tokens, EQUAL_BINS)}
    return {
        "mean_nll": total["mean_nll"],
        "perplexity": total["perplexity"],
        "scored_tokens": total["tokens"],
        "tenths": curve(losses, equal_edges(num_tokens, 10)),
        "curve": {name: curve(losses, edges) for name, edges in curves.items()},
    }


def in_words(value: dict[str, Any]) -> str:
    """A result in a few lines."""
    lines = [
        f"{value['num_tokens']:,} tokens of {value['dataset']} at {value['toks_per_sec']:,.0f} tokens/s: perplexity "
        f"{value['perplexity']:.3f}",
        "by tenths: " + " ".join(f"{row['perplexity']:.2f}" for row in value["tenths"]),
    ]
    if value["fresh_tail"] is not None:
        row = value["fresh_tail"]["settled"] or value["fresh_tail"]["all"]
        lines.append(
            f"the last {row['tokens']:,} tokens: {row['in_stream']['perplexity']:.3f} in the stream, "
            f"{row['fresh']['perplexity']:.3f} as a fresh one ({row['drift_percent']:+.2f}%)"
        )
    return "\n".join(lines)


def tail_length(num_tokens: int, fraction: float) -> int:
    """Tokens in the last `fraction` of a stream, at least 1; the first token, which nothing predicts, is never one."""
    return min(max(1, round(fraction * num_tokens)), num_tokens - 1)


def tail_figures(losses: np.ndarray, fresh: np.ndarray, fraction: float, cache_size: int) -> dict[str, Any]:
    """The stream's last tokens as they were in the stream, and as a stream of their own.

    The first `cache_size` tokens of the fresh stream see less text than they did in the long one; `settled` leaves
    them out, and only it tells drift from difficulty.

    Args:
        losses: of the whole stream.
        fresh: of the tail's tokens ``[n]`` as a fresh stream.
    """
    in_stream = losses[len(losses) - len(fresh) :]

    def compared(since: int) -> dict[str, Any] | None:
        if since >= len(fresh):
            return None
        old, new = summary(in_stream[since:]), summary(fresh[since:])
        return {
            "tokens": old["tokens"],
            "in_stream": {key: old[key] for key in ("mean_nll", "perplexity")},
            "fresh": {key: new[key] for key in ("mean_nll", "perplexity")},
            "drift_percent": 100 * math.expm1(old["mean_nll"] - new["mean_nll"]),
        }

    value = {"fraction": fraction, "start": len(losses) + 1 - len(fresh), "all": compared(0)}
    value["settled"] = compared(cache_size)
    if value["settled"] is None:
        value["settled_reason"] = f"the tail is not longer than the cache of {cache_size} tokens"
    return value
