"""Questions within a stream that is longer than the cache: how they are asked, and StreamEval (Fig. 9, Table 7).

A stream holds the right answers, whatever the model says, so that every method is asked the same; see
`experiments.stream_states` for how completions are judged. StreamEval: lines of facts, and every ten lines a question
about a line some lines back, made by a seeded generator from the paper's description and its Fig. 8; the paper's own
data were not published.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.kept import Found
from experiments.paper.setting import Experiment, Piece, Setting
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


HEAD = "Below is a record of lines I want you to remember.\n"
LINE = "The REGISTER_CONTENT in line {line} is <{value}>\n"
QUERY = "Query: The REGISTER_CONTENT in line {line} is"
ANSWER = " <{value}"
CLOSE = ">\n"  # not judged: to many tokenizers it is one token
EVERY = 10
DISTANCE = 20
DISTANCES = (20, 40, 60, 80, 100, 150, 200, 400, 600, 800, 1000)
METHODS = ("dense", "window", "streaming")


def make_stream(tokenizer, front: list[int], n_queries: int, distance: int, seed: int) -> Asked:
    """A stream of facts with a question after every `EVERY` lines about the line `distance` lines before."""
    numbers, values = random.Random(seed), []
    parts: list[tuple[str, str | None]] = [(HEAD, None)]  # text, and what line of facts or answer it is
    asked: list[int] = []
    line = 0
    while len(asked) < n_queries:
        values.append(numbers.randint(1, 50_000))
        parts.append((LINE.format(line=line, value=values[-1]), "line"))
        if line >= distance and line % EVERY == 0:
            asked.append(line - distance)
            parts.append((QUERY.format(line=line - distance), None))
            parts.append((ANSWER.format(value=values[line - distance]), "answer"))
            parts.append((CLOSE, None))
        line += 1
    encoded = tokenizer([text for text, _ in parts], add_special_tokens=False).input_ids
    ids, lines, answers = list(front), [], []
    for (_, kind), part in zip(parts, encoded, strict=True):
        if kind == "line":
            lines.append(len(ids))
        elif kind == "answer":
            answers.append((len(ids), len(ids) + len(part)))
        ids += part
    return Asked(ids, answers, [end - lines[line] for (_, end), line in zip(answers, asked, strict=True)])


class StreamEval(Experiment):
    """Accuracy along the stream by method, and by distance."""

    name, title, reference = "stream-eval", "StreamEval: facts in a stream", "Fig. 9, Table 7"

    def _streams(self, setting: Setting, distance: int, n_samples: int, n_queries: int) -> list[Asked]:
        tokenizer, front = setting.info.tokenizer, list(setting.beginning.ids)
        seeds = [1000 * setting.config.seed + sample for sample in range(n_samples)]
        return [make_stream(tokenizer, front, n_queries, distance, seed) for seed in seeds]

    def _piece(self, setting: Setting, method: str, distance: int, n_samples: int, n_queries: int) -> Piece:
        cache = setting.lengths.cache

        def compute() -> Found:
            streams = self._streams(setting, distance, n_samples, n_queries)
            sizes = method_sizes(setting, method, cache, max(len(stream.ids) for stream in streams))
            right = np.concatenate(answered(setting, streams, sizes))
            places = np.array([end for stream in streams for _, end in stream.answers])
            values = {
                "accuracy": float(right.mean()),
                "questions": len(right),
                "distance_tokens": float(np.mean([d for stream in streams for d in stream.distances])),
                "stream_tokens": max(len(stream.ids) for stream in streams),
            }
            return Found(values, {"right": right, "places": places})

        config = {"what": "stream-eval", "method": method, "distance": distance, "samples": n_samples}
        config |= {"queries": n_queries, "cache": cache, "n_sink": setting.n_sink, "seed": setting.config.seed}
        tokens = n_samples * (n_queries * EVERY + distance) * 20
        return Piece(f"{method} {distance}", config, compute, (setting.source.name, "stream-eval", method), tokens)

    def pieces(self, setting: Setting) -> list[Piece]:
        lengths = setting.lengths
        along = [self._piece(setting, m, DISTANCE, lengths.stream_samples, lengths.stream_queries) for m in METHODS]
        far = [distance for distance in DISTANCES if distance > DISTANCE and distance * 20 <= 4 * lengths.cache]
        few = min(lengths.stream_queries, 100)
        return along + [self._piece(setting, "streaming", d, lengths.stream_samples, few) for d in far]

    def result(self, setting: Setting, found: dict[str, Found]) -> dict:
        rows, curves = [], {}
        for name, one in found.items():
            method, distance = name.split()
            rows.append({"method": method, "distance_lines": int(distance)} | one.values)
            if int(distance) == DISTANCE:
                curves[method] = binned(one.arrays["places"], one.arrays["right"])
        example = self._streams(setting, DISTANCE, 1, 1)[0]
        text = setting.info.tokenizer.decode(example.ids[-60:])
        return {"cache_size": setting.lengths.cache, "n_sink": setting.n_sink, "rows": rows, "curves": curves,
                "context_length": setting.info.context_length, "example": text}  # fmt: skip
