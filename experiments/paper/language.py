"""Experiments on perplexity and speed: Figs. 3, 5 and 10, Tables 1, 2 and 6, and where kept tokens are placed."""

import statistics

import numpy as np

from experiments.kept import Found
from experiments.paper.setting import Experiment, Piece, Setting, curve, doubling
from experiments.perplexity import perplexity
from experiments.results import median


def _row(found: Found, **also) -> dict:
    return also | {name: found.values[name] for name in ("perplexity", "tokens")}


class Curves(Experiment):
    """Perplexity along 20,000 tokens by method."""

    name, title, reference = "methods", "Perplexity along a text, by method", "Fig. 3"
    _methods = ("dense", "window", "baseline", "streaming")

    def pieces(self, setting: Setting) -> list[Piece]:
        lengths = setting.lengths
        return [setting.losses(method, method, lengths.cache, lengths.curve) for method in self._methods]

    def result(self, setting: Setting, found: dict[str, Found]) -> dict:
        rows, curves = [], {}
        for method, one in found.items():
            nll = one.arrays["nll"]
            beyond = nll[min(setting.lengths.cache, len(nll) - 1) :]
            rows.append(_row(one, method=method, beyond_cache=perplexity(beyond)))
            curves[method] = curve(nll, 40)
        return {"cache_size": setting.lengths.cache, "n_sink": setting.n_sink, "rows": rows, "curves": curves,
                "context_length": setting.info.context_length}  # fmt: skip


class Long(Experiment):
    """Perplexity along as many tokens as there are, with two cache sizes; dense attention up to its context."""

    name, title, reference = "long", "Perplexity along millions of tokens", "Fig. 5"

    def pieces(self, setting: Setting) -> list[Piece]:
        lengths, context = setting.lengths, setting.info.context_length
        caches = dict.fromkeys((lengths.large_cache, lengths.cache))
        pieces = [setting.losses(f"streaming {cache}", "streaming", cache, lengths.longest) for cache in caches]
        pieces.append(setting.losses(f"window {lengths.large_cache}", "window", lengths.large_cache, lengths.longest))
        return [*pieces, setting.losses("dense", "dense", context, min(lengths.longest, context))]

    def result(self, setting: Setting, found: dict[str, Found]) -> dict:
        rows, curves, starts, context = [], {}, {}, setting.info.context_length
        for name, one in found.items():
            method, _, cache = name.partition(" ")
            nll, speed = one.arrays["nll"], one.values["tokens"] / one.values["seconds"]
            row = {"method": method} | ({"cache_size": int(cache)} if cache else {})
            rows.append(_row(one, **row, within_context=perplexity(nll[: context - 1]), tokens_per_sec=speed))
            starts[name] = doubling(nll)
            if cache:
                curves[name] = curve(nll, min(200, max(2, len(nll) // 400)))
        return {"cache_size": setting.lengths.large_cache, "n_sink": setting.n_sink, "rows": rows, "curves": curves,
                "starts": starts, "context_length": context}  # fmt: skip


class LineBreaks(Experiment):
    """The first tokens as sinks, against line breaks put in their place."""

    name, title, reference = "line-breaks", "Do sinks need to mean anything?", "Table 1"

    def pieces(self, setting: Setting) -> list[Piece]:
        cache, limit = setting.lengths.cache, setting.lengths.book

        def line_breaks():
            ids = setting.ids(limit).clone()
            ids[:, : setting.n_sink] = setting.info.tokenizer("\n", add_special_tokens=False).input_ids[-1]
            return ids

        broken = setting.losses("line breaks", "streaming", cache, limit, first="line breaks", ids=line_breaks)
        window = setting.losses("window", "streaming", cache, limit, n_sink=0)
        return [window, setting.losses("first tokens", "streaming", cache, limit), broken]

    def result(self, setting: Setting, found: dict[str, Found]) -> dict:
        rows = []
        for name, one in found.items():
            n_sink = 0 if name == "window" else setting.n_sink
            row = _row(one, sinks=name, n_sink=n_sink, window_size=setting.lengths.cache - n_sink)
            # The first tokens themselves are another text where line breaks stand in their place.
            rows.append(row | {"perplexity": perplexity(one.arrays["nll"][setting.n_sink :])})
        return {"cache_size": setting.lengths.cache, "rows": rows}


class Sinks(Experiment):
    """How many sinks it takes, in a cache of one size."""

    name, title, reference = "sinks", "How many sinks?", "Table 2"

    def pieces(self, setting: Setting) -> list[Piece]:
        cache, limit = setting.lengths.large_cache, setting.lengths.table
        return [setting.losses(str(n), "streaming", cache, limit, n_sink=n) for n in (0, 1, 2, 4, 8)]

    def result(self, setting: Setting, found: dict[str, Found]) -> dict:
        cache = setting.lengths.large_cache
        rows = [_row(one, n_sink=int(n), window_size=cache - int(n)) for n, one in found.items()]
        return {"cache_size": cache, "rows": rows}


class CacheSizes(Experiment):
    """How much cache it takes."""

    name, title, reference = "cache-sizes", "Does more cache help?", "Table 6"

    def pieces(self, setting: Setting) -> list[Piece]:
        limit = setting.lengths.table
        return [setting.losses(str(cache), "streaming", cache, limit) for cache in setting.lengths.caches]

    def result(self, setting: Setting, found: dict[str, Found]) -> dict:
        sizes = [(int(cache), setting.n_sink, one) for cache, one in found.items()]
        return {"rows": [_row(one, n_sink=s, window_size=cache - s, cache_size=cache) for cache, s, one in sizes]}


class Speed(Experiment):
    """Latency and memory of a token, against re-computation by the same engine."""

    name, title, reference = "latency", "Latency and memory per token", "Fig. 10"
    _methods = ("baseline", "streaming")

    def pieces(self, setting: Setting) -> list[Piece]:
        return [
            setting.timed(f"{method} {cache} {repeat}", method, cache, repeat)
            for cache in setting.lengths.timed_caches
            for repeat in range(setting.config.repeats)
            for method in self._methods
        ]

    def result(self, setting: Setting, found: dict[str, Found]) -> dict:
        runs: dict[tuple[str, int], list[dict]] = {}
        for name, one in found.items():
            method, cache, _ = name.split()
            runs.setdefault((method, int(cache)), []).append(one.values)
        rows = []
        for (method, cache), values in runs.items():
            row = {"method": method, "cache_size": cache, "engine": values[0]["engine"], "runs": len(values)}
            for figure in ("tpot_ms", "peak_memory_mb", "kv_cache_mb", "prefill_sec"):
                row[figure] = median([value[figure] for value in values])
            row["peak_memory_kind"] = values[0]["peak_memory_kind"]
            rows.append(row)
        times = {(row["method"], row["cache_size"]): row["tpot_ms"] for row in rows}
        for row in rows:
            theirs = times.get(("baseline", row["cache_size"]))
            row["speedup"] = theirs / row["tpot_ms"] if theirs and row["tpot_ms"] else None
        return {"rows": rows}


class Positions(Experiment):
    """Where kept tokens are placed: perplexity, drift from exact positions, and the cost of a step."""

    name, title, reference = "positions", "Where kept tokens are placed", "not in the paper"
    _methods = ("streaming", "gapped", "rerotated")

    def pieces(self, setting: Setting) -> list[Piece]:
        cache, limit = setting.lengths.cache, setting.lengths.positions
        pieces = [setting.losses(method, method, cache, limit) for method in self._methods]
        for repeat in range(setting.config.repeats):
            pieces += [setting.timed(f"time {name} {repeat}", name, cache, repeat, True) for name in self._methods]
        return pieces

    def result(self, setting: Setting, found: dict[str, Found]) -> dict:
        rows, curves, drifts = [], {}, {}
        exact = found["streaming"].arrays["nll"] if "streaming" in found else None
        for method in (name for name in self._methods if name in found):
            nll = found[method].arrays["nll"]
            times = [one.values for name, one in found.items() if name.startswith(f"time {method} ")]
            row = _row(found[method], method=method)
            if times:
                row |= {"tpot_ms": statistics.median(one["tpot_ms"] for one in times), "engine": times[0]["engine"]}
            curves[method] = curve(nll)
            if exact is not None and method != "streaming":
                difference = np.abs(nll.astype(np.float64) - exact)
                row["drift"] = float(difference[setting.lengths.cache :].mean())
                ends = curves[method]["token"]
                parts = np.split(difference, ends[:-1])
                drifts[method] = {"token": ends, "drift": [float(part.mean()) for part in parts]}
            rows.append(row)
        return {"cache_size": setting.lengths.cache, "n_sink": setting.n_sink, "rows": rows, "curves": curves,
                "drifts": drifts}  # fmt: skip
