"""StreamEval (Fig. 9, Table 7): lines of facts, and every ten lines a question about a line some lines back.

Made by a seeded generator from the paper's description and its Fig. 8; the paper's own data were not published.
"""

import random

import numpy as np

from experiments.kept import Found
from experiments.paper.asking import Asked, answered, binned, method_sizes
from experiments.paper.setting import Experiment, Piece, Setting

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
