"""From stored losses and memory figures to curves over the position in a stream."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from .lines import Line
from .records import LossCurve, Record

MIN_BIN_TOKENS = 64
BIN_RATIO = 2**0.5
NUM_MEMORY_POINTS = 96


def bin_edges(length: int) -> list[int]:
    """Positions that part a stream into bins: of equal width on a log axis, and of at least ``MIN_BIN_TOKENS``.

    The last bin takes a remainder too small for a bin of its own.
    """
    edges = [1]
    while edges[-1] < length:
        edges.append(max(edges[-1] + MIN_BIN_TOKENS, round(edges[-1] * BIN_RATIO)))
    edges[-1] = length
    if len(edges) > 2 and edges[-1] - edges[-2] < MIN_BIN_TOKENS:
        del edges[-2]
    return edges


def perplexity_line(curve: LossCurve) -> Line:
    """Perplexity by position: exp of the mean loss in each bin, at the bin's geometric middle."""
    edges = bin_edges(int(curve.position[-1]) + 1)
    x, y = [], []
    for low, high in pairwise(edges):
        inside = (curve.position >= low) & (curve.position < high)
        if inside.any():
            x.append(float(np.sqrt(low * (high - 1.0))) if low > 1 else float(high - 1) / 2)
            y.append(float(np.exp(np.mean(curve.nll[inside]))))
    return Line(curve.series, tuple(x), tuple(y))


def memory_line(record: Record, length: int) -> Line | None:
    """Keys and values held by position, in MB, up to stream position ``length``; None where the file has no figures.

    They grow by ``kv_bytes_per_token`` per token, up to what was held at the end of the run (``kv_cache_mb``); a
    method that held every token it was fed grows on.
    """
    held, per_token = record.values.get("kv_cache_mb"), record.values.get("kv_bytes_per_token")
    if held is None or per_token is None:
        return None
    position = np.unique(np.geomspace(1, length, NUM_MEMORY_POINTS).round())
    megabytes = (position + 1) * per_token / 1e6
    if held < 0.99 * (_tokens_fed(record, length) - 1) * per_token / 1e6 or per_token == 0:
        megabytes = np.minimum(megabytes, held)
    return Line(record.series, tuple(position.tolist()), tuple(megabytes.tolist()))


def _tokens_fed(record: Record, length: int) -> float:
    """How many tokens the run that was measured had fed at its end (a sample, where losses were scored apart)."""
    prompt, decoded = record.values.get("prompt_tokens"), record.values.get("decode_tokens")
    if prompt is not None and decoded is not None:
        return prompt + decoded
    return float(record.conditions.num_tokens or length)


def without_curve(records: Sequence[Record], curves: Sequence[LossCurve]) -> list[Record]:
    """The records of the curves' data sets for which no losses were stored."""
    have = {(c.dataset, c.series) for c in curves}
    datasets = {c.dataset for c in curves}
    return [r for r in records if r.dataset in datasets and (r.dataset, r.series) not in have]
