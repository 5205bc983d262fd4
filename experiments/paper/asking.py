"""Questions within a stream that is longer than the cache: StreamEval, and multiple choice.

The stream holds the right answers, whatever the model says, so that every method is asked the same; see
`experiments.stream_states` for how completions are judged.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.paper.setting import Setting
from experiments.stream_states import judged, states_at
from streaming_llm import StreamingConfig


@dataclass(frozen=True)
class Asked:
    """A stream with questions in it.

    `ids` of the stream; `answers`: (first, end) of each answer's tokens. `distances`: in tokens, from what is asked
    for to the answer, where the stream itself holds it.
    """

    ids: list[int]
    answers: list[tuple[int, int]]
    distances: list[int]


def answered(
    setting: Setting, streams: Sequence[Asked], sizes: StreamingConfig, at_a_time: int = 1
) -> list[np.ndarray]:
    """Of each stream's questions, whether the greedy completion is the answer, by a cache of these sizes."""
    model, forward = setting.loaded.model, setting.block_forward()
    results: dict[int, np.ndarray] = {}
    order = sorted(range(len(streams)), key=lambda index: len(streams[index].ids))
    for batch in (order[start : start + at_a_time] for start in range(0, len(order), at_a_time)):
        wanted = [[p for first, end in streams[i].answers for p in range(first - 1, end - 1)] for i in batch]
        rows = [streams[i].ids[: places[-1] + 1] for i, places in zip(batch, wanted, strict=True)]
        states = states_at(model, forward, sizes, rows, wanted)
        for i, places, hidden in zip(batch, wanted, states, strict=True):
            greedy = judged(model, hidden, [streams[i].ids[place + 1] for place in places])[1].cpu().numpy()
            ends = np.cumsum([end - first for first, end in streams[i].answers])
            results[i] = np.array([part.all() for part in np.split(greedy, ends[:-1])])
    return [results[i] for i in range(len(streams))]


def method_sizes(setting: Setting, method: str, cache: int, length: int) -> StreamingConfig:
    """Sinks and window of a method; `dense` keeps a whole stream of `length` tokens."""
    if method == "dense":
        return StreamingConfig(0, length)
    return setting.sizes(cache, 0 if method == "window" else None)


def binned(places: np.ndarray, right: np.ndarray, n_bins: int = 12) -> dict[str, list]:
    """Accuracy along a stream, in stretches of equal length; `token`: the last of each."""
    ends = np.linspace(0, places.max() + 1, n_bins + 1)
    which = np.digitize(places, ends[1:-1])
    bins = [n for n in range(n_bins) if (which == n).any()]
    return {"token": [int(ends[n + 1]) for n in bins], "accuracy": [float(right[which == n].mean()) for n in bins],
            "questions": [int((which == n).sum()) for n in bins]}  # fmt: skip
